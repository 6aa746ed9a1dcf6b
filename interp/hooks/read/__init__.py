"""Reading attention: what to keep, when to read it, and how chunks become positions."""
