"""Which keys of a prompt a head may still see: selectors, the context that applies one, and an evaluation."""

from interp.analyses.keys.applied import selecting
from interp.analyses.keys.base import KeySelector
from interp.analyses.keys.budgets import HeadKV, TaskKV
from interp.analyses.keys.choice import selectors_of
from interp.analyses.keys.compress import CompressKV
from interp.analyses.keys.curve import KeyCurve
from interp.analyses.keys.duo import DuoAttention, RazorAttention
from interp.analyses.keys.evaluate import key_curve
from interp.analyses.keys.layers import layer_errors
from interp.analyses.keys.questions import Asked, asked
from interp.analyses.keys.shares import full_heads
from interp.analyses.keys.simple import RandomKeys, Streaming
from interp.analyses.keys.window import SnapKV

__all__ = [
    "Asked",
    "CompressKV",
    "DuoAttention",
    "HeadKV",
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
