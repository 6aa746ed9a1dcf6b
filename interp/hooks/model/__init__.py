"""Properties of one model: its heads, layers, attention mask, provenance and module state."""
