"""What dropping keys costs: loss and accuracy of known answers against the kept share, beside random keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.kv.curve import CONTROL, WHOLE, KeyCurve, KeyPoint
from interp.analyses.kv.questions import KVTask
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selector import KeySelector
from interp.errors import UsageError
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.model.layers import unwrap
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

WINDOWS = (
    "every layer of this model has a window of its own: leave key selectors out, which have no keys to drop there."
)
Make = Callable[[float], KeySelector]
"""a selector for a share"""
SHARES = (0.1, 0.2, 0.4, 0.7)


def key_curve(
    model: nn.Module,
    tasks: Sequence[KVTask],
    selectors: Mapping[str, Make],
    *,
    shares: Sequence[float] = SHARES,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> KeyCurve:
    """Loss and accuracy of known answers when only a share of the context's keys is left, for each selector.

    A context is read once, whole; every selector chooses from that reading; then the question and its right answer are
    read with the kept keys. loss = mean over the answer's tokens of -log p, right = share of them that are the most
    likely token, so that 1 means greedy decoding writes the answer. selectors: by name, a function of the share;
    "random" (RandomKeys) is the control and has to be among them. Intervals are over prompts.
    Layers with a window of their own keep their keys and are not counted.
    Raises UsageError without a control, tasks or shares, or where every layer has a window; PromptError where a prompt
    does not fit.
    Source: the protocol of kvpress, which compresses a context before it knows the question; the retrieval tests of the
    papers. Cannot show: quality of long replies, nor speed.
    """
    if CONTROL not in selectors or WHOLE in selectors:
        raise UsageError(f'selectors {list(selectors)}: "random" is the control and has to be there, "whole" is taken.')
    if not tasks or not shares or batch_size < 1:
        raise UsageError(
            f"{len(tasks)} tasks, {len(shares)} shares, batch_size={batch_size}: give at least one of each."
        )
    from tqdm.auto import tqdm

    made = [(name, share, make(share)) for name, make in selectors.items() for share in shares]
    points: list[KeyPoint] = []
    bar = tqdm(total=sum(len(task.contexts) for task in tasks), desc="key selectors", disable=not progress, delay=2)
    with bar:
        for task in tasks:
            check_context(model, task.whole)
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
    model: nn.Module, task: KVTask, part: slice, made: list[tuple[str, float, KeySelector]]
) -> dict[tuple[str, float], list[tuple[float, float, float]]]:
    """(kept, loss, right) of each prompt, for the model as it is and every selector at its share."""
    network: Any = unwrap(model)
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
    found = {(WHOLE, 1.0): [(1.0, *row) for row in _answered(network, first, mask, contexts, rest, answers)]}
    lengths = torch.tensor(contexts.lengths)
    for number, (name, share, selector) in enumerate(made):
        if selector.is_noop:
            found[name, share] = found[WHOLE, 1.0]
            continue
        notes = {(0, layer): noted for (which, layer), noted in read.memory.items() if which == number}
        if not notes:
            raise UsageError(WINDOWS)
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
    # before the first answer begins no logits are needed
    first = min(len(ids) - count for ids, count in zip(rest, answers, strict=True)) - 1
    logits = network(
        input_ids=tokens, attention_mask=torch.cat([mask, live], 1), position_ids=position,
        past_key_values=_copied(cache), use_cache=True, logits_to_keep=width - first,
    ).logits.float()  # fmt: skip
    found = []
    for row, (ids, count) in enumerate(zip(rest, answers, strict=True)):
        before: Float[Tensor, "a v"] = logits[row, len(ids) - count - 1 - first : len(ids) - 1 - first]
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
