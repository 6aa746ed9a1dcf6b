"""Prompts with known answers: needles, repeated tokens, plain prose; and how to judge a reply."""

from interp.analyses.tasks.needle import judge, needle, rouge1_recall
from interp.analyses.tasks.passages import passages
from interp.analyses.tasks.repeated import repeated

__all__ = ["judge", "needle", "passages", "repeated", "rouge1_recall"]
