"""Finding heads: one file per published method, each `f(model, prompts, **settings) -> HeadScores`.

Patching takes pairs of prompts, `f(model, clean, corrupt, metric, **settings)`.
"""

from interp.analyses.identify.activation_patching import activation_patching, path_patching
from interp.analyses.identify.attention_influence import attention_influence
from interp.analyses.identify.attention_tracker import attention_tracker
from interp.analyses.identify.attribution_patching import attribution_patching
from interp.analyses.identify.concept_induction import concept_induction
from interp.analyses.identify.context_entropy import context_entropy
from interp.analyses.identify.duo_gates import duo_gates, duo_heads
from interp.analyses.identify.duplicate_token import duplicate_token
from interp.analyses.identify.function_vectors import function_vector, function_vectors
from interp.analyses.identify.gradient_importance import gradient_importance
from interp.analyses.identify.induction import induction
from interp.analyses.identify.logit_attribution import logit_attribution
from interp.analyses.identify.lookback import lookback
from interp.analyses.identify.positional import positional
from interp.analyses.identify.previous_token import previous_token
from interp.analyses.identify.qada import qada
from interp.analyses.identify.qk_score import qk_score
from interp.analyses.identify.qrhead import qrhead
from interp.analyses.identify.razor_attention import razor_echo, razor_induction, razor_protected
from interp.analyses.identify.retrieval import retrieval
from interp.analyses.identify.retrieval_reasoning import retrieval_reasoning
from interp.analyses.identify.sahara import sahara
from interp.analyses.identify.semantic_retrieval import semantic_retrieval
from interp.analyses.identify.ships import ships
from interp.analyses.identify.sinks import sinks
from interp.analyses.identify.task_kv import heterogeneous, task_kv

__all__ = [
    "activation_patching",
    "attention_influence",
    "attention_tracker",
    "attribution_patching",
    "concept_induction",
    "context_entropy",
    "duo_gates",
    "duo_heads",
    "duplicate_token",
    "function_vector",
    "function_vectors",
    "gradient_importance",
    "heterogeneous",
    "induction",
    "logit_attribution",
    "lookback",
    "path_patching",
    "positional",
    "previous_token",
    "qada",
    "qk_score",
    "qrhead",
    "razor_echo",
    "razor_induction",
    "razor_protected",
    "retrieval",
    "retrieval_reasoning",
    "sahara",
    "semantic_retrieval",
    "ships",
    "sinks",
    "task_kv",
]
