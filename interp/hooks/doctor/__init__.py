"""Checks of what works for a model, and why not."""
