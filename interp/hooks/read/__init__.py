"""Reading attention: the reductions to keep, captures that read them, and the assembly of their results."""
