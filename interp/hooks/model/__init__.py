"""The model at hand: its heads, its layers, its mask, its provenance."""
