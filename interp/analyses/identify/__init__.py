"""Finding heads: one file per published method, each `f(model, prompts, **settings) -> HeadScores`."""

from interp.analyses.identify.duplicate_token import duplicate_token
from interp.analyses.identify.induction import induction
from interp.analyses.identify.previous_token import previous_token
from interp.analyses.identify.retrieval import retrieval
from interp.analyses.identify.sinks import sinks

__all__ = ["duplicate_token", "induction", "previous_token", "retrieval", "sinks"]
