"""The cost of dropping keys: loss and accuracy of known answers by the share of keys, compared with random keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses.kv._shares import NO_GLOBAL_LAYERS
from interp.analyses.kv.kv_tasks import KVTask
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selector import KeySelector
from interp.analyses.kv.selectors_of import Make
from interp.analyses.results.trial import BASELINE, RANDOM, Trial
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.model.finite import check_output
from interp.hooks.model.layers import unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

KEEP_RATIOS = (0.1, 0.2, 0.4, 0.7)
Row = tuple[float, float, float]
"""share of keys that was kept, loss, share of right tokens"""
Run = tuple[str, str, float]
"""condition, the condition that random keys are matched to, and the share of keys"""


def kv_curve(
    model: nn.Module,
    tasks: Sequence[KVTask],
    selectors: Mapping[str, Make],
    *,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Trials:
    """Loss and accuracy of known answers with a share of the context's keys, for each selector.

    A context is read once, with all keys, and every selector chooses from this reading. Then the question and its right
    answer are read with the kept keys.

    - `loss` is the mean over the answer's tokens of `-log p`, in nats.
    - `right` is the share of the answer's tokens that are the most likely ones; 1 means that greedy decoding writes the
      answer.

    Layers with a sliding window keep their keys and are not counted. Random keys keep the first and last keys that the
    selector keeps in any case, so that they differ in the ranked keys alone. Where selectors differ in these, each has
    a run of random keys, whose `matched` is its name.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        tasks: Contexts, questions and answers, such as `kv_tasks`.
        selectors: Name -> function of keep_ratio, such as `selectors_of`; "random" is the control and must be there.
        keep_ratios: Shares of the keys that are kept.
        batch_size: Number of contexts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        Trials: one condition for each selector, and "baseline" with all keys; the size is the keep_ratio, the fact
        "kept" the share that was kept.

    Raises:
        UsageError: Without a control, tasks or ratios, or where every layer has a sliding window.
        PromptError: If a prompt does not fit into the context of the model.

    Examples:
        >>> from interp.analyses.kv import KVTask, RandomKeys, SnapKV, kv_curve
        >>> task = KVTask.cut("copy", prompts, ends=[12, 12], answers=[[5], [6]])
        >>> curve = kv_curve(model, [task], {"random": RandomKeys, "snapkv": SnapKV}, keep_ratios=(0.5,))
        >>> curve.conditions
        ('baseline', 'random', 'snapkv')

    Source:
        The protocol of kvpress, which compresses a context before the question is known, and the retrieval tests of the
        papers.

    Limits:
        Does not show the quality of long replies, nor speed.
    """
    if RANDOM not in selectors or BASELINE in selectors:
        raise UsageError(
            f"the selectors are {', '.join(selectors) or 'none'}; add 'random', which is the control, and use "
            "another name than 'baseline'."
        )
    if not tasks or not keep_ratios or batch_size < 1:
        raise UsageError(
            f"{len(tasks)} tasks, {len(keep_ratios)} keep_ratios, batch_size={batch_size}; give at least one of each."
        )
    from tqdm.auto import tqdm

    made = _runs(selectors, keep_ratios)
    trials: list[Trial] = []
    bar = tqdm(total=sum(len(task.contexts) for task in tasks), desc="key selectors", disable=not progress, delay=2)
    with bar:
        for task in tasks:
            check_context(model, task.whole)
            found: dict[Run, list[Row]] = {}
            for start in range(0, len(task.contexts), batch_size):
                part = slice(start, start + batch_size)
                for key, rows in _batch(model, task, part, made).items():
                    found.setdefault(key, []).extend(rows)
                bar.update(len(task.contexts[part]))
            for (name, matched, ratio), rows in found.items():
                kept, loss, right = zip(*rows, strict=True)
                values, facts = {"right": right, "loss": loss}, {"kept": sum(kept) / len(kept)}
                trials.append(Trial(name, values, size=ratio, matched=matched, task=task.name, facts=facts))
    return Trials(
        name="kv",
        trials=tuple(trials),
        intervention="key selection",
        title="KV selection",
        size_name="share of keys",
        shares=("right",),
        units={"loss": "nats per token"},
        seed=seed,
        provenance=Provenance.of(model, tasks[0].contexts.tokenizer, seed=seed),
    )


@torch.no_grad()
def _batch(model: nn.Module, task: KVTask, part: slice, made: Mapping[Run, KeySelector]) -> dict[Run, list[Row]]:
    """The row of each prompt, with all keys and for every selector at its ratio."""
    network: Any = unwrap(model)
    contexts = task.contexts[part]
    inputs = contexts.tensors(device=input_device(network))
    mask = inputs["attention_mask"]
    # controls of several selectors may be the same
    distinct = tuple(dict.fromkeys(made.values()))
    edits = Edits(distinct)
    with steering(network, edits, contexts) as read:
        output = network(
            input_ids=inputs["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
    first = check_output(network, output, inputs).past_key_values
    rest, answers = task.rest[part], task.answers[part]
    whole = [(1.0, *row) for row in _answered(network, first, mask, contexts, rest, answers)]
    lengths = torch.tensor(contexts.lengths)
    found: dict[KeySelector, list[Row]] = {}
    for number, selector in enumerate(distinct):
        if selector.is_noop:
            found[selector] = whole
            continue
        notes = {(0, layer): noted for (which, layer), noted in read.memory.items() if which == number}
        if not notes:
            raise UsageError(NO_GLOBAL_LAYERS)
        with selecting(network, selector, contexts, noted=notes):
            rows = _answered(network, first, mask, contexts, rest, answers)
        shares = torch.stack([noted.kept.float().sum(-1).mean(1).cpu() for noted in notes.values()]).mean(0) / lengths
        found[selector] = [(float(kept), *row) for kept, row in zip(shares, rows, strict=True)]
    return {(BASELINE, "", 1.0): whole} | {run: found[selector] for run, selector in made.items()}


def _runs(selectors: Mapping[str, Make], keep_ratios: Sequence[float]) -> dict[Run, KeySelector]:
    """The selector of each run; random keys are drawn for each selector, with the keys that it keeps in any case.

    One draw serves all selectors where they keep the same first and last keys.
    """
    made = {(name, "", ratio): make(ratio) for name, make in selectors.items() for ratio in keep_ratios}
    tested = {run: each for run, each in made.items() if run[0] != RANDOM}
    forced = {each.forced for each in tested.values()}
    found: dict[Run, KeySelector] = {}
    for run, each in made.items():
        control = getattr(each, "control_of", None)
        if run[0] != RANDOM or control is None or not forced:
            found[run] = each
        elif len(forced) == 1:
            found[run] = control(next(other for (_, _, ratio), other in tested.items() if ratio == run[2]))
        else:
            found |= {(RANDOM, name, ratio): control(o) for (name, _, ratio), o in tested.items() if ratio == run[2]}
    return found


def _answered(
    network: Any, cache: Any, mask: Tensor, contexts: Prompts, rest: Sequence[Sequence[int]], answers: Sequence[int]
) -> list[tuple[float, float]]:
    """Loss and share of right tokens of each row's answer, read after a cache, which is not changed."""
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
    # update() makes new tensors, so that both copies may share the old ones
    made.layers = [copy(layer) for layer in cache.layers]
    return made
