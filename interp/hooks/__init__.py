"""One running model: its heads, its tokens, and what passes through it."""
