"""Finding heads: one file per published method, each `f(model, prompts, **settings) -> HeadScores`.

Patching takes pairs of prompts, `f(model, clean, corrupt, metric, **settings)`.
"""

from interp.analyses.identify.attribution import attribution_patching
from interp.analyses.identify.duplicate_token import duplicate_token
from interp.analyses.identify.importance import importance
from interp.analyses.identify.induction import induction
from interp.analyses.identify.influence import attention_influence
from interp.analyses.identify.logit_attribution import logit_attribution
from interp.analyses.identify.patching import activation_patching, path_patching
from interp.analyses.identify.previous_token import previous_token
from interp.analyses.identify.retrieval import retrieval
from interp.analyses.identify.sahara import sahara
from interp.analyses.identify.ships import ships
from interp.analyses.identify.sinks import sinks

__all__ = [
    "activation_patching",
    "attention_influence",
    "attribution_patching",
    "duplicate_token",
    "importance",
    "induction",
    "logit_attribution",
    "path_patching",
    "previous_token",
    "retrieval",
    "sahara",
    "ships",
    "sinks",
]
