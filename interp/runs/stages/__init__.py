"""The stages of each recipe."""
