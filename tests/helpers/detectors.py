"""The table of all head detectors, which crosses every invariance: a new method is tested by a row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from interp.analyses import identify
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted


@dataclass(frozen=True)
class Method:
    """A detector as the tests call it, and the planted job that it must find."""

    name: str
    run: Callable[..., Any]
    kind: str
    controls: tuple[str, ...] = ("weights",)
    low: float = 0.45
    """the planted head's score in a control stays below"""


def null_twins(batch: Prompts) -> Prompts:
    """The same prompts with BOS, which asks for nothing, as their last token."""
    return replace(batch, items=tuple(replace(prompt, ids=(*prompt.ids[:-1], planted.BOS)) for prompt in batch))


def qrhead(model: Any, batch: Prompts, **settings: Any) -> Any:
    return identify.qrhead(model, batch, null_twins(batch), **settings)


METHODS = (
    Method("induction", identify.induction, "induction", ("weights", "data")),
    Method("previous_token", identify.previous_token, "previous_token"),
    Method("duplicate_token", identify.duplicate_token, "duplicate_token"),
    Method("sinks", identify.sinks, "sink"),
    Method("retrieval", identify.retrieval, "retrieval", ("weights", "data")),
    # teacher forcing gives the answer away token by token, so a key that is not there is no control
    Method("retrieval_forced", lambda *a, **k: identify.retrieval(*a, form="forced", **k), "retrieval"),
    # a sum over the answer's tokens, 4 for a perfect head
    Method("semantic_retrieval", identify.semantic_retrieval, "retrieval", ("weights", "data"), 0.45 * planted.ANSWER),
    Method("retrieval_reasoning", identify.retrieval_reasoning, "retrieval", ("weights", "data")),
    Method("razor_induction", identify.razor_induction, "induction", ("weights", "data")),
    Method("razor_echo", identify.razor_echo, "echo", ("weights", "data")),
    Method("qrhead", qrhead, "documents", ("weights", "data")),
    # no planted head writes the letter of its option
    Method("qk_score", partial(identify.qk_score, right_only=False), "options", ("weights", "data"), 0.6),
    Method(
        "qk_score_attention",
        partial(identify.qk_score, attention=True, right_only=False),
        "options",
        ("weights", "data"),
        0.6,
    ),
    Method("positional", identify.positional, "previous_token"),
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
        apart = [(i, i + 4) for i in range(1, n - 6, 4)]
        jobs = {
            "induction": marks,
            "echo": marks,
            "documents": {"documents": apart, "gold": apart[1:3], "query": (len(ids[-1]) - 3, len(ids[-1]))},
            "options": {"options": apart},
        }
        if kind == "options":
            for _, stop in apart:
                ids[-1][stop - 1] = planted.END
        spans.append(jobs.get(kind, {"answer": (1, 2 * (n // 2))}))
    return Prompts.from_ids(ids, spans=spans, meta=[{"option": number % 5} for number in range(len(ids))])
