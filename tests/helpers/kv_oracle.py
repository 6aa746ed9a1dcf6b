"""Every key selector with settings for small prompts, what it does to a continuation, and the same literally."""

from functools import partial
from typing import Any

import torch

from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.duo_attention import DuoAttention
from interp.analyses.kv.head_kv import HeadKV
from interp.analyses.kv.random_keys import RandomKeys
from interp.analyses.kv.razor_attention import RazorAttention
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.analyses.kv.task_kv import TaskKV
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.testing.selectors import continued, literal_logits

LENGTHS, MORE = (41, 33), 6


def scores(model: Any) -> HeadScores:
    layout = HeadLayout.of(model)
    values = torch.rand(3, layout.layers, layout.heads, generator=torch.Generator().manual_seed(4))
    return HeadScores("made", values, kv_heads=layout.kv_heads)


# each selector of its share, with the few tokens of these prompts
SELECTORS: dict[str, Any] = {
    "streaming": lambda table: Streaming(0.4, n_sink=2, n_recent=3),
    "random": lambda table: RandomKeys(0.4, n_sink=2, n_recent=3, seed=5),
    "snapkv": lambda table: SnapKV(0.4, n_sink=2, n_recent=3, window=4, kernel_size=3),
    "compresskv": lambda table: CompressKV.from_scores(table, 0.4, n_voters=2, n_sink=2, n_recent=3, window=4),
    "headkv": lambda table: HeadKV.from_scores(table, 0.4, n_sink=2, n_recent=3, window=4),
    "taskkv": lambda table: TaskKV(0.6, part=0.5, top=9, n_sink=2, n_recent=3, window=4),
    "taskkv of a table": lambda table: TaskKV.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3, window=4),
    "duo": lambda table: DuoAttention.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3),
    "razor": lambda table: RazorAttention.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3),
}


def prompts(rows: int = 2) -> Prompts:
    draw = torch.Generator().manual_seed(1)
    return Prompts.from_ids([torch.randint(5, 60, (n,), generator=draw).tolist() for n in LENGTHS[:rows]])


def continuation() -> torch.Tensor:
    return torch.randint(5, 60, (2, MORE), generator=torch.Generator().manual_seed(2))


SHARE = {"keep_ratio": 0.6}


def of_scores(kind: Any, **settings: Any) -> Any:
    """A maker of a selector that takes the scores of the model."""

    def make(*, model: Any, keep_ratio: float, **more: Any) -> Any:
        return kind.from_scores(scores(model), keep_ratio, **settings, **more)

    return make


CONTRACTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "random_keys": (RandomKeys, {}),
    "streaming": (Streaming, {}),
    "snapkv": (partial(SnapKV, window=4, kernel_size=3), {}),
    "task_kv": (partial(TaskKV, part=0.5, top=9, window=4), SHARE),
    "compress_kv": (of_scores(CompressKV, n_voters=2, window=4), {}),
    "head_kv": (of_scores(HeadKV, window=4), {}),
    "duo_attention": (of_scores(DuoAttention, part=0.5), SHARE),
    # its mean key stands for the dropped ones, which a mask does not show
    "razor_attention": (of_scores(RazorAttention, part=0.5), SHARE | {"literal": False}),
}


literal = literal_logits
__all__ = ["CONTRACTS", "SELECTORS", "continuation", "continued", "literal", "prompts", "scores"]
