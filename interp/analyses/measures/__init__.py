"""Numbers that a model gives on prompts: losses, continuations, refusals, head outputs."""
