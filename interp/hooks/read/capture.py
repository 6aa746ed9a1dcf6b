"""Reading attention while the model runs: a context around forward() or generate()."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from interp.errors import CostError, HeadError, ModelError, PromptError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import context_length, projection_inputs, unwrap
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.assemble import Chunks, Rows
from interp.hooks.read.reductions import K, Keep, Q, RankedKeys, TokenSpan, V, Z
from interp.hooks.seam import ReadRequest, Site, tapping
from interp.kernels.contract import Call

Queries = None | str | int | slice | range | Sequence[int]
MAX_MEMORY_SHARE = 0.8
"""part of the free memory that a capture may take"""


@dataclass(frozen=True)
class CaptureCost:
    """What a capture will hold on the host, in bytes, by keep."""

    parts: tuple[tuple[str, int], ...]
    free: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        return self.total <= MAX_MEMORY_SHARE * self.free

    def __str__(self) -> str:
        lines = [f"{name:32s} {_bytes(size):>10s}" for name, size in self.parts]
        return "\n".join([*lines, f"{'in all':32s} {_bytes(self.total):>10s} of {_bytes(self.free)} free"])


def capture(
    model: nn.Module,
    keep: Keep | Sequence[Keep],
    prompts: Prompts | None = None,
    *,
    layers: Sequence[int] | slice | range | None = None,
    heads: Any = None,
    queries: Queries = None,
    engine: str | None = None,
) -> "Capture":
    """Read reductions of the attention of `model` during one forward() or one generate().

        with interp.capture(model, [mass("needle"), entropy()], prompts) as cap:
            model.generate(**prompts.tensors())
        cap[entropy()]     # Float [b l h q], on the CPU

    Results stand at positions of the unpadded prompt, whatever the padding: index q is position q, and what a shorter
    prompt of the batch does not have is NaN (-1 for keys).

    keep: what to read, one or several of interp.keep.
    prompts: the batch that will run; needed for spans by name.
    layers: which layers, all by default; results have them along `l` in ascending order.
    heads: which heads (anything HeadSet.parse takes); the axes `l h` of results become one, in the order of HeadSet.
    queries: which query positions: a span's name, positions, a slice or range; "generated" for what comes after the
      prompt. Results then list just these, each prompt's own, in order; `cap.queries` has their positions.
    engine: "naive", "chunked" or "triton" to force one; by default the kernels where there is a GPU.
    Raises CostError before anything is computed where results cannot fit, HeadError, SpanError, and ModelError where
    a layer's attention was not reached. Beam search reorders the batch between steps: results follow rows as computed.
    """
    return Capture(model, (keep,) if isinstance(keep, Keep) else tuple(keep), prompts, layers, heads, queries, engine)


@dataclass(eq=False)
class Capture:
    """A reading context and, afterwards, its results: see `capture`."""

    model: nn.Module
    keep: tuple[Keep, ...]
    prompts: Prompts | None = None
    layer_choice: Any = None
    head_choice: Any = None
    query_choice: Queries = None
    engine: str | None = None
    layers: tuple[int, ...] = field(init=False)
    heads: HeadSet | None = field(init=False)
    _bound: BatchSpans = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _chunks: dict[tuple[int, Keep], Chunks] = field(default_factory=dict, init=False)
    _rows: Rows = field(default_factory=Rows, init=False)
    _rows_of_z: dict[int, Tensor | None] = field(default_factory=dict, init=False)
    _held: int = field(default=0, init=False)
    _checked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for item in self.keep:
            if not isinstance(item, Keep):
                raise UsageError(f"{item!r} is not something to keep: take one of interp.keep, as in entropy().")
        self._bound = BatchSpans(self.prompts)
        self.model = unwrap(self.model)
        self.layout = HeadLayout.of(self.model)
        self.heads = None if self.head_choice is None else HeadSet.parse(self.head_choice, self.layout)
        every = range(self.layout.layers)
        choice = self.layer_choice
        if choice is None:
            self.layers = tuple(every) if self.heads is None else tuple(sorted(self.heads.by_layer()))
        else:
            picked = every[choice] if isinstance(choice, slice) else choice
            self.layers = tuple(sorted({int(layer) for layer in picked}))
        for layer in self.layers:
            if layer not in every:
                raise HeadError(
                    f"layer {layer} of a {self.layout.layers}-layer model "
                    f"(layers run from 0 to {self.layout.layers - 1})."
                )
        if self.heads is not None:
            self.layout.check(self.heads)
            if choice is not None and set(self.heads.by_layer()) - set(self.layers):
                raise HeadError(f"{self.heads} has heads outside of layers {list(self.layers)}: give layers or heads.")
            self.layers = tuple(sorted(self.heads.by_layer()))

    def cost(self, batch: int, length: int, queries: int | None = None) -> CaptureCost:
        """Host memory for a batch of prompts of `length` tokens: results twice, since joining them copies them.

        Print it before a run; `queries` is how many query positions are read, all by default.
        """
        n = length if queries is None else queries
        per_layer = self.layout.heads * len(self.layers) if self.heads is None else len(self.heads)
        parts = []
        for item in self.keep:
            numbers = item.width(n, length) * (self.layout.head_dim if item.kind == "stream" else 1)
            parts.append((repr(item), 2 * 4 * batch * per_layer * numbers))
        return CaptureCost(tuple(parts), psutil.virtual_memory().available)

    def __enter__(self) -> "Capture":
        with contextlib.ExitStack() as stack:
            seam = stack.enter_context(tapping(self.model, self))
            if self.engine is not None:
                stack.callback(setattr, seam, "force", seam.force)
                seam.force = self.engine
            if self._keeps_z:
                stack.enter_context(projection_inputs(self.model, self.layers, self._take_z, inside=True))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows_of_z.clear()
        self._stack.close()

    @property
    def _keeps_z(self) -> bool:
        return any(type(item) is Z for item in self.keep)

    def at(self, layer: int) -> bool:
        return bool(self.keep) and layer in self.layers

    def edit(self, site: Site) -> Call:
        return site.call

    def want(self, site: Site) -> ReadRequest | None:
        index = self._select(site)
        if self._keeps_z:
            self._rows_of_z[site.layer] = index
        if index is not None and not len(index):
            return None
        self._check(site, index)
        if site.layer == self.layers[0]:
            self._bound.match(site)
            self._rows.add(site, index)
        self._take_streams(site, index)
        requests = tuple(item.request(site, index, self._span) for item in self.keep if item.kind != "stream")
        return ReadRequest(requests, index, self._head_index(site.layer, site.call.q.device)) if requests else None

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        for item, value in zip((item for item in self.keep if item.kind != "stream"), values, strict=True):
            self._store(site.layer, item).add(site.call.k_start, value)

    def _store(self, layer: int, item: Keep) -> Chunks:
        return self._chunks.setdefault((layer, item), Chunks(item))

    def _head_index(self, layer: int, device: torch.device) -> Tensor | None:
        if self.heads is None:
            return None
        return torch.tensor(self.heads.by_layer()[layer], device=device)

    def _take_streams(self, site: Site, index: Tensor | None) -> None:
        n = site.call.q.shape[2]
        for item in self.keep:
            for kind, x in ((Q, site.call.q), (K, site.call.k), (V, site.call.v)):
                if type(item) is kind:
                    self._take_stream(site.layer, item, x[:, :, -n:], index)

    def _take_z(self, layer: int, projected: Tensor) -> None:
        index = self._rows_of_z.pop(layer)
        for item in self.keep:
            if type(item) is Z and (index is None or len(index)):
                split = projected.unflatten(-1, (self.layout.heads, -1)).transpose(1, 2)
                self._take_stream(layer, item, split, index)

    def _take_stream(self, layer: int, item: Keep, x: Tensor, index: Tensor | None) -> None:
        x = x.detach() if index is None else x.detach().index_select(2, index)
        heads = self._head_index(layer, x.device)
        if heads is not None and x.shape[1] == self.layout.kv_heads != self.layout.heads:
            heads = torch.div(heads, self.layout.heads // self.layout.kv_heads, rounding_mode="floor")
        self._store(layer, item).add(0, x if heads is None else x.index_select(1, heads))

    def _check(self, site: Site, index: Tensor | None) -> None:
        if site.layer != self.layers[0] or site.call.q_start < self._checked:
            return
        self._checked = site.call.q_start + site.call.q.shape[2]
        n = site.call.q.shape[2] if index is None else len(index)
        cost = self.cost(site.call.q.shape[0], site.call.k.shape[2], n)
        # earlier steps are held already, and are there once more while results are put together
        needed = cost.total + self._held
        self._held += cost.total // 2
        if needed > MAX_MEMORY_SHARE * cost.free:
            raise CostError(
                f"this capture needs {_bytes(needed)} for {site.call.k.shape[2]:,} tokens and {_bytes(cost.free)} "
                f"is free: read fewer layers, heads or queries, or a reduction instead of rows."
            )

    def _span(self, where: TokenSpan, width: int) -> Tensor:
        return self._bound.mask(where, self._rows.batch, width)

    def _chosen(self, position: Tensor) -> Tensor:
        """Bool, like `position` [b r]: which of them the query choice names."""
        choice = self.query_choice
        inside = position >= 0
        if choice is None:
            return inside
        if choice == "generated":
            lengths = torch.tensor(self._bound.lengths(position.shape[0]), device=position.device)
            # the row that makes the first new token is the last of the prompt
            return position >= lengths[:, None] - 1
        if isinstance(choice, str):
            width = int(position.max()) + 1 if position.numel() else 0
            mask = self._span(choice, max(width, 1)).to(position.device)
            return mask.gather(1, position.clamp(min=0)) & inside
        if isinstance(choice, slice):
            stop = torch.iinfo(torch.int64).max if choice.stop is None else choice.stop
            if (choice.start or 0) < 0 or (choice.stop or 0) < 0 or choice.step not in (None, 1):
                raise UsageError(
                    f"queries={choice} counts from the end or in steps: name positions from 0 in steps of 1."
                )
            return inside & (position >= (choice.start or 0)) & (position < stop)
        wanted = torch.tensor([choice] if isinstance(choice, int) else list(choice), device=position.device)
        if (wanted < 0).any():
            raise UsageError(f"queries={choice!r} holds a negative position: positions count from 0.")
        return inside & torch.isin(position, wanted)

    def _select(self, site: Site) -> Tensor | None:
        self._rows.batch = site.call.q.shape[0]
        if self.query_choice is None:
            return None
        position = site.call.rows[None] - site.first[:, None]
        return self._chosen(position).any(0).nonzero()[:, 0]

    @property
    def queries(self) -> Tensor:
        """Int [b q]: the position of each query of the results, -1 where a prompt has fewer."""
        return self._rows.order(self._chosen)[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row so far, padding not counted."""
        return self._rows.lengths

    def __getitem__(self, item: Keep) -> Any:
        """The result of one keep: see the keep's own docstring for shape and unit.

        Raises UsageError for what was not asked for, ModelError where a layer gave nothing.
        """
        if item not in self.keep:
            raise UsageError(
                f"{item!r} was not captured: this capture holds {', '.join(map(repr, self.keep)) or 'nothing'}."
            )
        missing = [layer for layer in self.layers if (layer, item) not in self._chunks]
        if missing:
            raise ModelError(
                f"{item!r} has nothing for layers {missing}: run the model inside of the context; if it did run, "
                "interp doctor says which layers the seam reaches."
            )
        order = self._rows.order(self._chosen)
        parts = [self._chunks[layer, item].assemble(self._rows, order) for layer in self.layers]
        join = (lambda x: torch.stack(x, 1)) if self.heads is None else (lambda x: torch.cat(x, 1))
        if isinstance(parts[0], tuple):
            return RankedKeys(*(join(list(part)) for part in zip(*parts, strict=True)))
        return join(parts)

    def __repr__(self) -> str:
        kept = ", ".join(map(repr, self.keep))
        return f"Capture({kept}; {len(self.layers)} layers, {'all' if self.heads is None else len(self.heads)} heads)"


def run(model: nn.Module, prompts: Prompts, **kw: Any) -> Any:
    """One forward over a batch of prompts, padded on the left, positions counted from each prompt's first token.

    kw goes to the model. Raises PromptError for a prompt longer than the model's context.
    """
    model = unwrap(model)
    inputs = model_inputs(model, prompts)
    with torch.no_grad():
        return model(**inputs, use_cache=False, **kw)


def check_context(model: nn.Module, prompts: Prompts, more: int = 0) -> None:
    """Raise PromptError where a prompt and `more` tokens of reply do not fit into the model's context."""
    limit = context_length(model)
    if limit is None:
        return
    prompts.check_length(limit)
    for number, length in enumerate(prompts.lengths):
        if length + more > limit:
            raise PromptError(
                f"prompt {number} has {length:,} tokens and its reply may take {more}; the context of this model is "
                f"{limit:,}: shorten the prompt."
            )


def model_inputs(model: nn.Module, prompts: Prompts, more: int = 0) -> dict[str, Tensor]:
    """The tensors of a batch on the model's device, position ids included; `more` tokens must still fit after them."""
    check_context(model, prompts, more)
    inputs = prompts.tensors(device=next(model.parameters()).device)
    # learned positions do not look at the mask: left padding would shift them
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def read(
    model: nn.Module, prompts: Prompts, keep: Any, *, batch_size: int = 1, progress: str | None = None, **choice: Any
) -> Iterator[tuple[Prompts, Capture]]:
    """Forward over prompts in batches; gives each batch with its finished capture.

    keep: as for `capture`, or a function of the batch that makes it; choice: layers, heads, queries.
    progress: title of a tqdm bar, for what takes longer than two seconds.
    """
    from tqdm.auto import tqdm

    if not isinstance(prompts, Prompts):
        raise PromptError(
            f"prompts are {type(prompts).__name__}: give interp.Prompts, made by Prompts.encode(tokenizer, texts)."
        )
    batches = list(prompts.batches(batch_size))
    for batch in tqdm(batches, desc=progress, disable=progress is None, delay=2, leave=False):
        wanted: Any = keep(batch) if callable(keep) else keep
        with capture(model, wanted, batch, **choice) as cap:
            run(model, batch, logits_to_keep=1)
        yield batch, cap


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
