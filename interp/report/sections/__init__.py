"""Sections of a report, one module for each type of result; other packages add theirs with `section.register`."""

from interp.report.sections import (
    explored,
    head_roles,
    head_scores,
    logit_lens,
    ov_tokens,
    qk_projection,
    steering,
    token_attention,
    trials,
)
from interp.report.sections.dispatch import section

__all__ = [
    "explored",
    "head_roles",
    "head_scores",
    "logit_lens",
    "ov_tokens",
    "qk_projection",
    "section",
    "steering",
    "token_attention",
    "trials",
]
