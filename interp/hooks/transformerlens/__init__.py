"""TransformerLens tools on an unmodified transformers model, and attention without its rotary embedding."""
