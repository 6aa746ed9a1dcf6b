"""Which keys of a prompt a head may still see: selectors, the context that applies one, and an evaluation."""

from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.curve import KeyCurve
from interp.analyses.kv.duo_attention import DuoAttention, RazorAttention
from interp.analyses.kv.evaluate import key_curve
from interp.analyses.kv.from_scores import selectors_of
from interp.analyses.kv.head_budgets import HeadKV, TaskKV
from interp.analyses.kv.layer_errors import layer_errors
from interp.analyses.kv.questions import KVTask, asked
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selector import KeySelector
from interp.analyses.kv.shares import full_heads
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import RandomKeys, Streaming

__all__ = [
    "CompressKV",
    "DuoAttention",
    "HeadKV",
    "KVTask",
    "KeyCurve",
    "KeySelector",
    "RandomKeys",
    "RazorAttention",
    "SnapKV",
    "Streaming",
    "TaskKV",
    "asked",
    "full_heads",
    "key_curve",
    "layer_errors",
    "selecting",
    "selectors_of",
]
