"""What dropping keys costs: loss and accuracy of known answers against the kept share, beside random keys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.causal import bootstrap, paired
from interp.analyses.keys.base import KeySelector, selecting
from interp.analyses.tasks import get, needle, repeated
from interp.analyses.tasks.task import following
from interp.hooks.capture import check_context
from interp.hooks.edit import Edits, steering
from interp.hooks.modules import plain
from interp.hooks.prompts import Prompts
from interp.kernels.errors import PromptError, UsageError

Make = Callable[[float], KeySelector]
"""a selector for a share"""


@dataclass(frozen=True)
class Asked:
    """A context whose keys are dropped, and what is read after it: a question and the tokens of its right answer."""

    name: str
    contexts: Prompts
    rest: tuple[tuple[int, ...], ...]
    """of each context, the tokens after it"""
    answers: tuple[int, ...]
    """of each, how many tokens at the end of `rest` are the answer"""

    @classmethod
    def cut(cls, name: str, prompts: Prompts, ends: Sequence[int], answers: Sequence[Sequence[int]]) -> "Asked":
        """Prompts cut after `ends` tokens, with the tokens of an answer put behind. Raises PromptError."""
        rows, rest = [], []
        for prompt, end, answer in zip(prompts, ends, answers, strict=True):
            if not 0 < end < len(prompt) or not answer:
                raise PromptError(f"a prompt of {len(prompt)} tokens was cut at {end} for an answer of {len(answer)}.")
            rows.append(prompt.ids[:end])
            rest.append((*prompt.ids[end:], *answer))
        contexts = Prompts.from_ids(rows, pad_id=prompts.pad_id, tokenizer=prompts.tokenizer)
        return cls(name, contexts, tuple(rest), tuple(map(len, answers)))


def asked(tokenizer: Any, n: int = 16, length: int = 400, seed: int = 0) -> tuple[Asked, ...]:
    """Three tasks: a needle asked for after the text, random tokens that come again, new facts asked about.

    The keys of the text, of the first copy, of the facts are dropped before the question, the second copy, comes: what
    is kept has to be chosen without knowing what will be asked.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needles = needle(tokenizer, lengths=(length,), n=n, seed=seed)
    answers = [ids(following(prompt.text, prompt.meta["answer"])) for prompt in needles]
    first = Asked.cut("needle", needles, [prompt.spans["question"][0][0] for prompt in needles], answers)
    copies = repeated(tokenizer, n=length // 4, batch=n, seed=seed)
    half = [prompt.spans["second"][0][0] + 4 for prompt in copies]
    parts = [prompt.ids[:end] for prompt, end in zip(copies, half, strict=True)]
    given = Prompts.from_ids(parts, pad_id=copies.pad_id, tokenizer=tokenizer)
    later = [prompt.ids[end : end + length // 8] for prompt, end in zip(copies, half, strict=True)]
    second = Asked.cut("repeated tokens", given, [end - 4 for end in half], later)
    facts = get("counterfact").prompts(tokenizer, "test", min(n, 40))
    right = [ids(prompt.meta["right"][0]) for prompt in facts]
    third = Asked.cut("new facts", facts, [prompt.spans["mark"][-1][1] for prompt in facts], right)
    return first, second, third


@dataclass(frozen=True)
class KeyPoint:
    """One selector at one share on one task."""

    selector: str
    share: float
    task: str
    kept: float
    """of the context's keys, over layers and kv heads"""
    loss: tuple[float, ...] = field(repr=False)
    """of each prompt, nats per token of the answer"""
    right: tuple[float, ...] = field(repr=False)
    """share of the answer's tokens that are the most likely ones"""


@dataclass(frozen=True)
class KeyCurve:
    """All points; "whole" is the model with every key."""

    points: tuple[KeyPoint, ...]
    seed: int = 0

    def at(self, selector: str, share: float, task: str, measure: str = "right") -> tuple[float, float, float]:
        """Mean and 95% interval over prompts."""
        values = self._values(selector, share, task, measure)
        return sum(values) / len(values), *bootstrap([values], seed=self.seed)

    def gain(self, selector: str, share: float, task: str, measure: str = "right") -> tuple[float, float, float]:
        """The measure less that of random keys of the same share, prompt by prompt, and its 95% interval."""
        return paired(
            [self._values(selector, share, task, measure)], [self._values("random", share, task, measure)],
            seed=self.seed,
        )  # fmt: skip

    def _values(self, selector: str, share: float, task: str, measure: str) -> tuple[float, ...]:
        for point in self.points:
            if (point.selector, point.share, point.task) == (selector, share, task):
                return point.loss if measure == "loss" else point.right
        raise UsageError(f"no point of {selector!r} at {share} on {task!r}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"seed": self.seed, "points": [vars(point) for point in self.points]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "KeyCurve":
        """The inverse of to_dict."""
        points = [
            KeyPoint(**{**point, "loss": tuple(point["loss"]), "right": tuple(point["right"])})
            for point in content["points"]
        ]
        return cls(tuple(points), content["seed"])


def key_curve(
    model: nn.Module,
    tasks: Sequence[Asked],
    selectors: Mapping[str, Make],
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.4, 0.7),
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> KeyCurve:
    """Loss and accuracy of known answers when only a share of the context's keys is left, for each selector.

    A context is read once, whole; every selector chooses from that reading; then the question and its right answer are
    read with the kept keys. loss = mean over the answer's tokens of -log p, right = share of them that are the most
    likely token, so that 1 means greedy decoding writes the answer. selectors: by name, a function of the share;
    "random" (RandomKeys) is the control and has to be among them. Intervals are over prompts.
    Raises UsageError without a control, PromptError where a prompt does not fit.
    Source: the protocol of kvpress, which compresses a context before it knows the question; the retrieval tests of the
    papers. Cannot show: quality of long replies, nor speed.
    """
    if "random" not in selectors or "whole" in selectors:
        raise UsageError(f'selectors {list(selectors)}: "random" is the control and has to be there, "whole" is taken.')
    from tqdm.auto import tqdm

    made = [(name, share, make(share)) for name, make in selectors.items() for share in shares]
    points: list[KeyPoint] = []
    bar = tqdm(total=sum(len(task.contexts) for task in tasks), desc="key selectors", disable=not progress, delay=2)
    with bar:
        for task in tasks:
            check_context(model, task.contexts, max(map(len, task.rest)))
            found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
            for start in range(0, len(task.contexts), batch_size):
                part = slice(start, start + batch_size)
                for key, rows in _batch(model, task, part, made).items():
                    found.setdefault(key, []).extend(rows)
                bar.update(len(task.contexts[part]))
            for (name, share), rows in found.items():
                kept, loss, right = zip(*rows, strict=True)
                points.append(KeyPoint(name, share, task.name, sum(kept) / len(kept), loss, right))
    return KeyCurve(tuple(points), seed)


@torch.no_grad()
def _batch(
    model: nn.Module, task: Asked, part: slice, made: list[tuple[str, float, KeySelector]]
) -> dict[tuple[str, float], list[tuple[float, float, float]]]:
    """(kept, loss, right) of each prompt, for the model as it is and every selector at its share."""
    network: Any = plain(model)
    contexts = task.contexts[part]
    inputs = contexts.tensors(device=next(network.parameters()).device)
    mask = inputs["attention_mask"]
    edits = Edits(tuple(selector for _, _, selector in made))
    with steering(network, edits, contexts) as read:
        first = network(
            input_ids=inputs["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True, logits_to_keep=1,
        ).past_key_values  # fmt: skip
    rest, answers = task.rest[part], task.answers[part]
    found = {("whole", 1.0): [(1.0, *row) for row in _answered(network, first, mask, contexts, rest, answers)]}
    lengths = torch.tensor(contexts.lengths)
    for number, (name, share, selector) in enumerate(made):
        notes = {(0, layer): noted for (which, layer), noted in read.memory.items() if which == number}
        with selecting(network, selector, contexts, noted=notes):
            rows = _answered(network, first, mask, contexts, rest, answers)
        shares = torch.stack([noted.kept.float().sum(-1).mean(1).cpu() for noted in notes.values()]).mean(0) / lengths
        found[name, share] = [(float(kept), *row) for kept, row in zip(shares, rows, strict=True)]
    return found


def _answered(
    network: Any, cache: Any, mask: Tensor, contexts: Prompts, rest: Sequence[Sequence[int]], answers: Sequence[int]
) -> list[tuple[float, float]]:
    """(loss, share right) of each row's answer, read after a cache that stays as it is."""
    width, device = max(map(len, rest)), mask.device
    tokens = torch.full((len(rest), width), contexts.pad_id, device=device)
    live = torch.zeros(len(rest), width, dtype=mask.dtype, device=device)
    for row, ids in enumerate(rest):
        tokens[row, : len(ids)] = torch.tensor(ids, device=device)
        live[row, : len(ids)] = 1
    position = torch.tensor(contexts.lengths, device=device)[:, None] + torch.arange(width, device=device)
    logits = network(
        input_ids=tokens, attention_mask=torch.cat([mask, live], 1), position_ids=position,
        past_key_values=_copied(cache), use_cache=True,
    ).logits.float()  # fmt: skip
    found = []
    for row, (ids, count) in enumerate(zip(rest, answers, strict=True)):
        before: Float[Tensor, "a v"] = logits[row, len(ids) - count - 1 : len(ids) - 1]
        wanted = tokens[row, len(ids) - count : len(ids)]
        loss = torch.nn.functional.cross_entropy(before, wanted)
        found.append((float(loss), float((before.argmax(-1) == wanted).float().mean())))
    return found


def _copied(cache: Any) -> Any:
    from copy import copy

    made = copy(cache)
    # update() makes new tensors, so that layers may share the old ones
    made.layers = [copy(layer) for layer in cache.layers]
    return made
