"""TransformerLens on the user's own model."""
