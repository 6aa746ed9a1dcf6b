"""Editing attention and the outputs of heads while the model runs."""
