"""Prompts as token ids with named spans, and the position of these spans in a running batch."""
