"""Sweeps: a metric of the logits with each head, or each of many head sets, changed alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses import memory
from interp.analyses.causal.batched_interventions import BatchedInterventions
from interp.analyses.causal.function_identity import function_identity
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import Intervention, InterventionKind, ReferenceOutputs
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

SETS_PER_CELL = 32


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of a metric in addition to the logits, one entry for each row."""

    prompts: Prompts
    base: Tensor
    """float32 `[r v]`, logits of the unmodified model on the same prompts"""
    hidden: Tensor
    """`[r m]`, the input of the unembedding, after the final norm"""
    base_hidden: Tensor
    """`[r m]`, the same of the unmodified model"""


Metric = Callable[[Tensor, Batch], Tensor]
"""a function of float32 logits `[r v]` at the last token of each row's prompt, and of the batch, that returns `[r]` or
`[r x]`"""


def kl(logits: Tensor, batch: Batch) -> Tensor:
    """`KL(P || P') = sum over v of P log(P / P')` in nats, of the unmodified model P and the changed one P'.

    It is computed in float64.

    Args:
        logits: float32 `[r v]` of the changed model.
        batch: The prompts, and the logits of the unmodified model.
    """
    before, after = batch.base.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).clamp(min=0).float()


def last_hidden(logits: Tensor, batch: Batch) -> Tensor:
    """The input of the unembedding, float32 `[r m]`.

    Args:
        logits: Not used.
        batch: The prompts, and the hidden states.
    """
    return batch.hidden.float()


@dataclass(frozen=True)
class Cell:
    """A piece of a sweep as plain data: some prompts, some head sets, and the intervention."""

    prompts: Prompts
    sets: tuple[HeadSet, ...]
    intervention: Intervention
    metric: Metric = kl
    rows: int | None = None
    source: tuple[int, ...] | None = None
    """number of the reference prompt of each prompt, for interventions that take one"""

    def reader(self, model: Any, bank: ReferenceOutputs | None = None) -> BatchedInterventions:
        """The forward pass of the unmodified model, which cells of the same prompts can share."""
        if bank is None and self.intervention.reference is not None:
            bank = ReferenceOutputs.of(model, _union(self.sets), self.intervention)
        source = self.intervention.source(self.prompts) if self.source is None else torch.tensor(self.source)
        return BatchedInterventions(model, self.prompts, self.intervention, bank, source)

    def run(self, model: Any, reader: BatchedInterventions | None = None) -> Tensor:
        """Values of the metric, `[p i]` or `[p i x]`.

        Args:
            model: The model.
            reader: The result of `reader`, where it is shared.

        Raises:
            UsageError: If there is no head set, or the metric returns a wrong shape or NaN.
        """
        reader = self.reader(model) if reader is None else reader
        found: Tensor | None = None
        for seen in reader.under(self.sets, self.rows):
            p, i = seen.logits.shape[:2]
            rows = tuple(prompt for prompt in self.prompts for _ in range(i))
            batch = Batch(
                replace(self.prompts, items=rows),
                reader.logits.repeat_interleave(i, 0),
                seen.hidden.flatten(0, 1),
                reader.hidden.repeat_interleave(i, 0),
            )
            values = checked(self.metric(seen.logits.flatten(0, 1), batch), batch.prompts, self.metric)
            values = values.unflatten(0, (p, i))
            if found is None:
                found = values.new_empty(p, len(self.sets), *values.shape[2:])
            found[:, seen.sets] = values
        if found is None:
            raise UsageError("no head set is given; name at least one, which may be empty.")
        return found


def checked(values: Any, prompts: Prompts, metric: Any) -> Tensor:
    """The values of a metric as float32 on the CPU. Raises UsageError, naming a prompt, where they are unusable."""
    name, r = getattr(metric, "__name__", repr(metric)), len(prompts)
    if not isinstance(values, Tensor) or not values.ndim or values.shape[0] != r:
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(f"metric {name} gave {given} for {r} rows of logits; return a tensor with one entry for each.")
    values = values.detach().float().cpu()
    wrong = ~values.flatten(1).isfinite().all(1) if values.ndim > 1 else ~values.isfinite()
    if bool(wrong.any()):
        which = prompts[int(wrong.nonzero()[0])].meta.get("id", "without an id")
        raise UsageError(f"metric {name} gave NaN or infinity, first for prompt {which}; return finite numbers.")
    return values


def sweep(
    model: nn.Module,
    prompts: Prompts,
    intervention: InterventionKind | Intervention,
    metric: Metric = kl,
    *,
    heads: Any = None,
    name: str | None = None,
    unit: str = "",
    batch_size: int = 8,
    rows: int | None = None,
    seed: int = 0,
    folder: Any = None,
    progress: bool = False,
) -> HeadScores:
    """Change each head alone and take a metric of the logits after each prompt.

    `score[n l h] = metric of prompt n with head h of layer l under the intervention`. A forward pass begins at the
    changed layer, and a beginning that all prompts share is read once for each head.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts whose next token is measured.
        intervention: An ablation of `ablate`, or an `Intervention` ("scale" by a factor, "patch" from another prompt).
        metric: `kl` from the unmodified model, or a function `metric(logits [r v], batch)` of the float32 logits at the
            last token.
        heads: Anything that `HeadSet.parse` takes, by default all heads; others are NaN.
        name: Name of the scores, by default made of the metric and the intervention.
        unit: Unit of the scores.
        batch_size: Number of prompts in a batch. Every forward pass holds all prompts of a batch, for one or more
            heads.
        rows: Largest number of sequences per forward pass, where each sequence is one prompt with one head changed,
            but never fewer than the prompts of a batch; by default as many as fit into free memory, halved where that
            runs out.
        seed: Seed of "resample" and of the confidence intervals over prompts.
        folder: Where finished pieces are kept, so that an interrupted sweep continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in the unit of the metric.

    Raises:
        UsageError: If the metric does not return one finite number for each row, or there are no heads.
        PromptError: If a prompt is longer than the context.
        HeadError: If the model does not have a head.
        CostError: If the hidden states of a batch do not fit into the free memory.

    Examples:
        >>> interp.sweep(model, prompts, "zero", heads="L0H1, L1H2").name
        'kl:zero'

    Source:
        This project; Ships (Zhou et al., ICLR 2025) is the metric `kl` under "uniform" or "zero".

    Limits:
        Does not show what heads do together, nor that a head acts through the last token: all positions are changed.
    """
    if not isinstance(intervention, Intervention):
        intervention = Intervention(intervention, seed=seed)
    layout = HeadLayout.of(model)
    chosen = layout.all() if heads is None else HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        raise UsageError("heads is an empty set; name at least one head, or None for all.")
    sets = [HeadSet((head,)) for head in chosen]
    swept = sweep_sets(
        model, prompts, sets, intervention, metric, batch_size=batch_size, rows=rows, folder=folder, progress=progress
    )
    if swept.values.ndim > 2:
        raise UsageError(f"metric {metric} gave several numbers for each row; use sweep_sets for such a metric.")
    table = torch.full((len(prompts), layout.layers, layout.heads), torch.nan)
    for i, head in enumerate(chosen):
        table[:, head.layer, head.head] = swept.values[:, i]
    return HeadScores(
        name=name or f"{getattr(metric, '__name__', 'metric')}:{intervention.kind}",
        per_prompt=table,
        unit=unit or ("nats" if metric is kl else ""),
        kv_heads=layout.kv_heads,
        settings={"intervention": as_json(intervention), "forwards": swept.forwards, "prompts": prompts.fingerprint()},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(prompts)),
    )


@dataclass(frozen=True, eq=False)
class HeadSweep:
    """Values of a metric for each prompt and head set."""

    values: Tensor
    """[p i] or [p i x]"""
    forwards: float
    """cost in whole forward passes of a prompt"""


def sweep_sets(
    model: nn.Module,
    prompts: Prompts,
    sets: Sequence[Any],
    intervention: InterventionKind | Intervention,
    metric: Metric = kl,
    *,
    batch_size: int = 8,
    rows: int | None = None,
    folder: Any = None,
    progress: bool = False,
) -> HeadSweep:
    """Change the heads of each of many sets together and take a metric of the logits after each prompt.

    `values[p i] = metric of prompt p with all heads of set i under the intervention`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts whose next token is measured.
        sets: Head sets, each anything that `HeadSet.parse` takes; an empty set leaves the model unmodified.
        intervention: An ablation of `ablate`, or an `Intervention`.
        metric: As in `sweep`; it may return several numbers for each row.
        batch_size: Number of prompts in a batch. Every forward pass holds all prompts of a batch, for one or more head
            sets.
        rows: Largest number of sequences per forward pass, where each sequence is one prompt under one head set,
            but never fewer than the prompts of a batch; by default as many as fit into free memory, halved where that
            runs out.
        folder: Where finished pieces are kept, so that an interrupted sweep continues with the same numbers.
        progress: Show a progress bar.

    Returns:
        HeadSweep: Values `[p i]` or `[p i x]`, and the cost.

    Raises:
        UsageError: If the metric returns a wrong shape or NaN, or there is no head set.
        PromptError: If there are no prompts, or a prompt is longer than the context.
        HeadError: If the model does not have a head.
        CostError: If the hidden states of a batch do not fit into the free memory.

    Examples:
        >>> from interp.analyses.causal.sweep import sweep_sets
        >>> sweep_sets(model, prompts, ["L0H1", "L0H1, L1H2"], "zero").values.shape
        torch.Size([2, 2])

    Source:
        This project.

    Limits:
        Does not show which head of a set has an effect.
    """
    if not isinstance(intervention, Intervention):
        intervention = Intervention(intervention)
    if not len(prompts):
        raise PromptError("the selection of prompts is empty; give at least one prompt.")
    if batch_size < 1 or (rows is not None and rows < 1):
        raise UsageError(f"batch_size={batch_size} and rows={rows} hold no prompt; give at least 1.")
    layout = HeadLayout.of(model)
    if not len(sets):
        raise UsageError("no head set is given; name at least one, which may be empty.")
    sets = [HeadSet.parse(heads, layout) for heads in sets]
    for heads in sets:
        layout.check(heads)
    about = Provenance.of(model, prompts.tokenizer)
    made = about.config_hash, about.weights_hash, about.dtype, about.versions
    parts = Parts.of(
        folder, "sweep", [made, as_json(intervention), None if folder is None else function_identity(metric)]
    )
    found: list[Tensor | None] = [None] * len(prompts)
    forwards = 0.0

    @cache
    def check_memory() -> None:
        # the longest prompts come last
        memory.check("a sweep", memory.reading, model, memory.sorted_batches(prompts, batch_size), {})

    def work(chunk: Chunk, cell: Cell) -> dict[str, Tensor]:
        check_memory()
        return chunk.work(cell)

    with _bar(len(prompts), sets, layout.layers, progress) as bar:
        for chunk in chunks(model, prompts, sets, intervention, metric, batch_size, rows, progress):
            values = []
            for cell in chunk.cells:
                part = parts.get(chunk.about(cell), partial(work, chunk, cell))
                values.append(part["values"])
                forwards += float(part["forwards"])
                bar.update(len(cell.prompts) * sum(_share(heads, layout.layers) for heads in cell.sets))
            order = torch.tensor(chunk.order).argsort()
            for number, row in zip(chunk.numbers, torch.cat(values, 1)[:, order], strict=True):
                found[number] = row
    return HeadSweep(torch.stack([row for row in found if row is not None]), forwards)


@dataclass(eq=False)
class Chunk:
    """The cells of some prompts, and the unmodified forward pass, made for the first cell that needs it."""

    model: Any
    numbers: list[int]
    order: list[int]
    """numbers of the sets, in the order of the cells"""
    cells: list[Cell]
    bank: Callable[[], ReferenceOutputs | None]
    _reader: BatchedInterventions | None = field(default=None, init=False)

    def about(self, cell: Cell) -> list[Any]:
        return [cell.prompts.fingerprint(), cell.source, [str(heads) for heads in cell.sets]]

    def work(self, cell: Cell) -> dict[str, Tensor]:
        before = 0.0
        if self._reader is None:
            self._reader = cell.reader(self.model, self.bank())
        else:
            before = self._reader.forwards
        values = cell.run(self.model, self._reader)
        return {"values": values, "forwards": torch.tensor(self._reader.forwards - before, dtype=torch.float64)}


def chunks(
    model: Any,
    prompts: Prompts,
    sets: Sequence[HeadSet],
    intervention: Intervention,
    metric: Metric,
    batch_size: int,
    rows: int | None,
    progress: bool,
) -> Iterator[Chunk]:
    """Batches of prompts of similar lengths, with the head sets in the order of their first layers."""
    source = intervention.source(prompts)
    held: list[ReferenceOutputs | None] = []

    def bank() -> ReferenceOutputs | None:
        if not held:
            held.append(ReferenceOutputs.of(model, _union(sets), intervention, progress=progress))
        return held[0]

    order = sorted(range(len(sets)), key=lambda i: min((head.layer for head in sets[i]), default=-1))
    by_length = sorted(range(len(prompts)), key=lambda number: prompts.lengths[number])
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        batch = replace(prompts, items=tuple(prompts[number] for number in numbers))
        own = None if source is None else tuple(source[numbers].tolist())
        cells = [
            Cell(batch, tuple(sets[i] for i in order[at : at + SETS_PER_CELL]), intervention, metric, rows, own)
            for at in range(0, len(order), SETS_PER_CELL)
        ]
        yield Chunk(unwrap(model), numbers, order, cells, bank)


def as_json(intervention: Intervention) -> dict[str, Any]:
    """An intervention as JSON can hold it."""
    reference = None if intervention.reference is None else intervention.reference.fingerprint()
    return {"kind": intervention.kind, "factor": intervention.factor, "reference": reference, "seed": intervention.seed}


def _union(sets: Sequence[HeadSet]) -> HeadSet:
    return HeadSet(tuple(sorted({head for heads in sets for head in heads})))


def _share(heads: HeadSet, layers: int) -> float:
    """The share of a whole forward pass that a head set costs."""
    return 1 - min((head.layer for head in heads), default=layers) / layers


def _bar(prompts: int, sets: Sequence[HeadSet], layers: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    total = prompts * sum(_share(heads, layers) for heads in sets)
    return tqdm(total=math.ceil(total), desc="sweep", unit="forward", disable=not progress, delay=2, leave=False)
