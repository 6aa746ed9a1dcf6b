"""The table of all head detectors, which crosses every invariance: a new method is tested by a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import planted
import torch

from interp.analyses import identify
from interp.hooks.prompts import Prompts


@dataclass(frozen=True)
class Method:
    """A detector as the tests call it, and the planted job that it must find."""

    name: str
    run: Callable[..., Any]
    kind: str
    controls: tuple[str, ...] = ("weights",)
    low: float = 0.45
    """the planted head's score in a control stays below"""


METHODS = (
    Method("induction", identify.induction, "induction", ("weights", "data")),
    Method("previous_token", identify.previous_token, "previous_token"),
    Method("duplicate_token", identify.duplicate_token, "duplicate_token"),
    Method("sinks", identify.sinks, "sink"),
    Method("retrieval", identify.retrieval, "retrieval", ("weights", "data")),
    # teacher forcing gives the answer away token by token, so a key that is not there is no control
    Method("retrieval_forced", lambda *a, **k: identify.retrieval(*a, form="forced", **k), "retrieval"),
)
BY_NAME = {method.name: method for method in METHODS}


def prompts(kind: str, seed: int, shuffled: bool = False, batch: int = 4) -> Prompts:
    """The planted task as Prompts."""
    task = planted.prompts(kind, seed, shuffled=shuffled, batch=batch)
    return Prompts.from_ids(task.ids, spans=task.spans, meta=task.meta, pad_id=planted.PAD)


def random_prompts(kind: str, vocab: int, lengths: tuple[int, ...], seed: int = 0) -> Prompts:
    """Random tokens with the spans that a detector of this kind needs, for models in which nothing was planted."""
    rng = torch.Generator().manual_seed(seed)
    ids, spans = [], []
    for n in lengths:
        half = torch.randint(3, vocab, (n // 2,), generator=rng).tolist()
        ids.append([1, *half, *half])
        marks = {"first": (1, n // 2 + 1), "second": (n // 2 + 1, 2 * (n // 2) + 1)}
        # nearly every key is an answer, so that random heads paste some of it
        spans.append(marks if kind == "induction" else {"answer": (1, 2 * (n // 2))})
    return Prompts.from_ids(ids, spans=spans)
