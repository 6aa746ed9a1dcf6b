"""Editing attention and head outputs while the model runs."""
