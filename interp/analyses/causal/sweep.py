"""Which heads matter for a behaviour: every head changed alone, or many head sets, and what a metric says of each."""

import inspect
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.batched_interventions import BatchedInterventions
from interp.analyses.results.files import Parts
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import Intervention, InterventionKind, ReferenceOutputs
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

SETS = 32
"""head sets of one cell"""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a metric sees beside the logits: one entry a row."""

    prompts: Prompts
    base: Tensor
    """float32 [r v] logits of the same prompts as loaded"""
    hidden: Tensor
    """[r m] what enters the output embeddings, after the final norm"""
    base_hidden: Tensor
    """[r m] the same as loaded"""


Metric = Callable[[Tensor, Batch], Tensor]
"""float32 logits [r v] at the last token of each row's prompt, and the batch, to [r] or [r x]"""


def kl(logits: Tensor, batch: Batch) -> Tensor:
    """KL(P as loaded || P changed) = sum over v of P log(P / P'), nats, [r]; in float64."""
    before, after = batch.base.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).clamp(min=0).float()


def last_hidden(logits: Tensor, batch: Batch) -> Tensor:
    """What enters the output embeddings, float32 [r m]."""
    return batch.hidden.float()


@dataclass(frozen=True)
class Cell:
    """A piece of a sweep as plain data: some prompts, some head sets, and what is done to them."""

    prompts: Prompts
    sets: tuple[HeadSet, ...]
    intervention: Intervention
    metric: Metric = kl
    rows: int | None = None
    source: tuple[int, ...] | None = None
    """reference prompt of each prompt, of interventions that have one"""

    def reader(self, model: Any, bank: ReferenceOutputs | None = None) -> BatchedInterventions:
        """The forward as loaded, which cells of the same prompts can share."""
        if bank is None and self.intervention.reference is not None:
            bank = ReferenceOutputs.of(model, _union(self.sets), self.intervention)
        source = self.intervention.source(self.prompts) if self.source is None else torch.tensor(self.source)
        return BatchedInterventions(model, self.prompts, self.intervention, bank, source)

    def run(self, model: Any, reader: BatchedInterventions | None = None) -> Tensor:
        """[p i] or [p i x] values of the metric. Raises UsageError for a metric of the wrong shape, or NaN."""
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
            raise UsageError("no head set was given: name at least one, which may be empty.")
        return found


def checked(values: Any, prompts: Prompts, metric: Any) -> Tensor:
    """A metric's values as float32 on the cpu. Raises UsageError, naming a prompt, where they are none."""
    name, r = getattr(metric, "__name__", repr(metric)), len(prompts)
    if not isinstance(values, Tensor) or not values.ndim or values.shape[0] != r:
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(f"metric {name} gave {given} for {r} rows of logits: return a tensor with one entry a row.")
    values = values.detach().float().cpu()
    wrong = ~values.flatten(1).isfinite().all(1) if values.ndim > 1 else ~values.isfinite()
    if bool(wrong.any()):
        which = prompts[int(wrong.nonzero()[0])].meta.get("id", "without an id")
        raise UsageError(f"metric {name} gave NaN or infinity, first for prompt {which}: return finite numbers.")
    return values


def sweep(
    model: nn.Module,
    prompts: Prompts,
    kind: InterventionKind | Intervention,
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
    """Each head changed alone, and what a metric says of each prompt then.

    score[p l h] = metric of prompt p with head h of layer l under the intervention.
    kind: an ablation of `interp.ablate`, or an Intervention ("scale" with a factor, "patch" from another prompt).
    metric: `kl` from the model as loaded, or your own `metric(logits [r v], batch)`; float32 logits at the last token.
    heads: anything HeadSet.parse takes, by default all; NaN elsewhere. batch_size: prompts read side by side; rows: of
    one forward, by default from the free memory, halved where it runs out. folder: finished cells are kept there, and a
    sweep that was cut goes on with the same numbers.
    A forward begins at the changed layer and a beginning that the prompts share is read once for each head.
    Raises UsageError for a metric that gives no finite number a row, PromptError for prompts longer than the context.
    Source: ours; Ships (Zhou et al., ICLR 2025) is the metric `kl` under "uniform" or "zero".
    Cannot show: what heads do together, or that a head works through the last token: all positions are changed.
    """
    intervention = kind if isinstance(kind, Intervention) else Intervention(kind, seed=seed)
    layout = HeadLayout.of(model)
    chosen = layout.all() if heads is None else HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        raise UsageError("heads is an empty set: name at least one head, or None for all.")
    sets = [HeadSet((head,)) for head in chosen]
    swept = sweep_sets(
        model, prompts, sets, intervention, metric, batch_size=batch_size, rows=rows, folder=folder, progress=progress
    )
    if swept.values.ndim > 2:
        raise UsageError(f"metric {metric} gave several numbers a row: use sweep_sets for those.")
    table = torch.full((len(prompts), layout.layers, layout.heads), torch.nan)
    for i, head in enumerate(chosen):
        table[:, head.layer, head.head] = swept.values[:, i]
    return HeadScores(
        name=name or f"{getattr(metric, '__name__', 'metric')}:{intervention.kind}",
        per_prompt=table,
        unit=unit or ("nats" if metric is kl else ""),
        kv_heads=layout.kv_heads,
        settings={"intervention": said(intervention), "forwards": swept.forwards, "prompts": prompts.fingerprint()},
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
    """what it took, in whole forwards of a prompt"""


def sweep_sets(
    model: nn.Module,
    prompts: Prompts,
    sets: Sequence[Any],
    kind: InterventionKind | Intervention,
    metric: Metric = kl,
    *,
    batch_size: int = 8,
    rows: int | None = None,
    folder: Any = None,
    progress: bool = False,
) -> HeadSweep:
    """Many head sets, each changed as one, and a metric of each prompt under each set.

    values[p i] = metric of prompt p with all heads of set i under the intervention. Arguments and errors as `sweep`.
    Source: ours. Cannot show: which head of a set an effect is of.
    """
    intervention = kind if isinstance(kind, Intervention) else Intervention(kind)
    if not len(prompts):
        raise PromptError("no prompts to sweep over; the selection is empty.")
    if batch_size < 1 or (rows is not None and rows < 1):
        raise UsageError(f"batch_size={batch_size}, rows={rows}: give at least 1.")
    layout = HeadLayout.of(model)
    if not len(sets):
        raise UsageError("no head set was given: name at least one, which may be empty.")
    sets = [HeadSet.parse(heads, layout) for heads in sets]
    for heads in sets:
        layout.check(heads)
    about = Provenance.of(model, prompts.tokenizer)
    made = about.config_hash, about.weights_hash, about.dtype, about.versions
    parts = Parts.of(folder, "sweep", [made, said(intervention), None if folder is None else identity(metric)])
    found: list[Tensor | None] = [None] * len(prompts)
    forwards = 0.0
    with _bar(len(prompts), sets, layout.layers, progress) as bar:
        for chunk in chunks(model, prompts, sets, intervention, metric, batch_size, rows, progress):
            values = []
            for cell in chunk.cells:
                part = parts.get(chunk.about(cell), partial(chunk.work, cell))
                values.append(part["values"])
                forwards += float(part["forwards"])
                bar.update(len(cell.prompts) * sum(_share(heads, layout.layers) for heads in cell.sets))
            order = torch.tensor(chunk.order).argsort()
            for number, row in zip(chunk.numbers, torch.cat(values, 1)[:, order], strict=True):
                found[number] = row
    return HeadSweep(torch.stack([row for row in found if row is not None]), forwards)


@dataclass(eq=False)
class Chunk:
    """The cells of some prompts, and their forward as loaded, made when the first of them has to be computed."""

    model: Any
    numbers: list[int]
    order: list[int]
    """of the sets, as the cells have them"""
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
    """Prompts of like lengths side by side, head sets in the order of their first layers."""
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
            Cell(batch, tuple(sets[i] for i in order[at : at + SETS]), intervention, metric, rows, own)
            for at in range(0, len(order), SETS)
        ]
        yield Chunk(unwrap(model), numbers, order, cells, bank)


def identity(metric: Any) -> list[Any]:
    """What a metric's numbers depend on, as far as it can be said: its code, and what it carries along.

    Raises UsageError for one that carries what cannot be written down, since stored cells could be of another.
    """
    try:
        if isinstance(metric, partial):
            return [identity(metric.func), pickle.dumps((metric.args, metric.keywords)).hex()]
        metric = inspect.unwrap(metric)
        code = getattr(metric, "__code__", None)
        if code is None:
            return [type(metric).__module__, type(metric).__qualname__, pickle.dumps(metric).hex()]
        carried = [cell.cell_contents for cell in metric.__closure__ or ()], metric.__defaults__, metric.__kwdefaults__
        return [metric.__module__, metric.__qualname__, _code(code), pickle.dumps(carried).hex()]
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"metric {metric!r} carries what cannot be written down ({error}), and stored cells could be of another: "
            "give a function of a module, or no folder."
        ) from None


def _code(code: Any) -> list[Any]:
    """Code without the places that it stands at."""
    consts = [_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), consts, list(code.co_names)]


def said(intervention: Intervention) -> dict[str, Any]:
    """An intervention as JSON can say it."""
    reference = None if intervention.reference is None else intervention.reference.fingerprint()
    return {"kind": intervention.kind, "factor": intervention.factor, "reference": reference, "seed": intervention.seed}


def _union(sets: Sequence[HeadSet]) -> HeadSet:
    return HeadSet(tuple(sorted({head for heads in sets for head in heads})))


def _share(heads: HeadSet, layers: int) -> float:
    """Of a whole forward that a set costs."""
    return 1 - min((head.layer for head in heads), default=layers) / layers


def _bar(prompts: int, sets: Sequence[HeadSet], layers: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    total = prompts * sum(_share(heads, layers) for heads in sets)
    return tqdm(total=math.ceil(total), desc="sweep", unit="forward", disable=not progress, delay=2, leave=False)
