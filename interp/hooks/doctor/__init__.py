"""Compatibility checks: whether interp reads and edits a model correctly."""
