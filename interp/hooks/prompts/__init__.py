"""Prompts as token ids with named spans, and their spans in a running batch."""
