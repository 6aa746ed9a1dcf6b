"""Captures: contexts around forward() or generate() that read attention while the model runs."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from interp.errors import ModelError, PromptError, UsageError
from interp.hooks.model.context import context_length
from interp.hooks.model.finite import check_output
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import projection_inputs, unwrap
from interp.hooks.model.torch_state import own_state
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.assemble import Chunks, ReadRows
from interp.hooks.read.capture_cost import CaptureCost, StoredResults
from interp.hooks.read.choice import Queries, choose_layers, choose_queries, queries_to_read
from interp.hooks.read.reductions import K, Keep, Q, RankedKeys, TokenSpan, V, Z
from interp.hooks.seam import ReadRequest, Site, tapping
from interp.kernels.contract import Call


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
    """Read reductions of the attention of a model during one forward() or one generate().

    Results are on the CPU and indexed by positions of the unpadded prompt, whatever the padding: index q is position q.
    Entries that a shorter prompt of the batch does not have are NaN, and -1 for keys. A row of generate() ends with the
    token before its end token, as if it had run alone: what transformers feeds until the other rows end is not read.
    With a cache that held tokens before the context was opened, results by query begin at the first query that runs
    (`cap.queries`), and keys count from the first token in the cache. Beam search reorders rows; results do not.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        keep: One or several reductions of `interp.keep`.
        prompts: The batch that will run; needed for spans given by name.
        layers: Layers to read, all by default. Results have them along `l` in ascending order.
        heads: Heads to read: anything that `HeadSet.parse` takes. The axes `l h` of the results become one, in the
            order of the HeadSet.
        queries: Query positions to read: the name of a span, positions, a slice or a range, or "generated" for those
            after the prompt. Results then list only these, in each prompt's order; `cap.queries` has their positions.
        engine: "naive", "chunked" or "triton" to force one. By default the kernels are used where there is a GPU.

    Returns:
        Capture: A context manager that holds the results after the run.

    Raises:
        CostError: If the results cannot fit in memory; raised before anything is computed.
        HeadError: If the model does not have a layer or head.
        SpanError: If no prompt has a span, or the batch is not the one given as prompts.
        ModelError: If the attention of a layer was not reached.

    Examples:
        >>> share, entropy = interp.keep.mass("second"), interp.keep.entropy()
        >>> with interp.capture(model, [share, entropy], prompts) as cap:
        ...     out = model.generate(**prompts.tensors(), max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
        >>> cap[entropy].shape  # [b l h q]
        torch.Size([2, 2, 4, 18])
    """
    return Capture(model, (keep,) if isinstance(keep, Keep) else tuple(keep), prompts, layers, heads, queries, engine)


@dataclass(eq=False)
class Capture:
    """A context that reads attention and holds the results afterwards; made by `capture`.

    Attributes:
        keep: The reductions that are read.
        layers: The layers that are read, in ascending order.
        heads: The heads that are read; None for all.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.entropy(), layers=[1]) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap
        Capture(entropy(); 1 layers, all heads)
        >>> cap[interp.keep.entropy()].shape
        torch.Size([2, 1, 4, 17])
    """

    model: nn.Module
    keep: tuple[Keep, ...]
    prompts: Prompts | None = None
    layer_choice: Any = None
    head_choice: Any = None
    query_choice: Queries = None
    engine: str | None = None
    layers: tuple[int, ...] = field(init=False)
    heads: HeadSet | None = field(init=False)
    _spans: BatchSpans = field(init=False)
    _stack: contextlib.ExitStack | None = field(default=None, init=False)
    _chunks: dict[tuple[int, Keep], Chunks] = field(default_factory=dict, init=False)
    _rows: ReadRows = field(default_factory=ReadRows, init=False)
    _rows_of_z: dict[int, Tensor | None] = field(default_factory=dict, init=False)
    _stored: StoredResults = field(default_factory=StoredResults, init=False)
    _checked_end: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for item in self.keep:
            if not isinstance(item, Keep):
                raise UsageError(f"{item!r} is not something to keep: give a reduction such as keep.entropy().")
        self._spans = BatchSpans(self.prompts)
        self.model = unwrap(self.model)
        self.layout = HeadLayout.of(self.model)
        self.heads = None if self.head_choice is None else HeadSet.parse(self.head_choice, self.layout)
        self.layers = choose_layers(self.layout, self.layer_choice, self.heads)

    def cost(self, batch: int, length: int, queries: int | None = None) -> CaptureCost:
        """Estimate the host memory of the results before a run, twice their size, since joining chunks copies them.

        Args:
            batch: Number of prompts in the batch.
            length: Number of tokens per prompt.
            queries: Number of query positions that are read; all by default.

        Returns:
            CaptureCost: Bytes per reduction, and the free memory.

        Examples:
            >>> cost = interp.capture(model, interp.keep.entropy()).cost(batch=1, length=1000)
            >>> cost.total  # 2 x 4 bytes x 8 heads x 1000 queries
            64000
        """
        n = length if queries is None else queries
        per_layer = self.layout.heads * len(self.layers) if self.heads is None else len(self.heads)
        each, size = {"stream": self.layout.head_dim}, 2 * 4 * batch * per_layer
        parts = [(repr(item), size * item.width(n, length) * each.get(item.kind, 1)) for item in self.keep]
        return CaptureCost(tuple(parts), psutil.virtual_memory().available)

    def __enter__(self) -> "Capture":
        if self._stack is not None:
            raise UsageError("this capture is open already, and would read everything twice; make a second capture.")
        tap: Any = weakref.proxy(self)  # a capture that is dropped closes itself
        with contextlib.ExitStack() as stack:
            stack.enter_context(tapping(self.model, tap))
            if self._keeps_z:
                take = partial(Capture._take_z, tap)
                stack.enter_context(projection_inputs(self.model, self.layers, take, inside=True))
            self._stack = stack.pop_all()
        return self

    def __del__(self) -> None:
        if (stack := self.__dict__.get("_stack")) is not None:
            stack.close()

    def __exit__(self, *error: Any) -> None:
        self._rows_of_z.clear()
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(*error)

    @property
    def _keeps_z(self) -> bool:
        return any(type(item) is Z for item in self.keep)

    def at(self, layer: int) -> bool:
        return bool(self.keep) and layer in self.layers

    def edit(self, site: Site) -> Call:
        return site.call

    def want(self, site: Site) -> ReadRequest | None:
        index, counted = self._select(site)
        if self._keeps_z:
            self._rows_of_z[site.layer] = index
        if index is not None and not len(index):
            return None
        self._check(site, index)
        if site.layer == self.layers[0]:
            self._spans.match(site)
            self._rows.add(site, index)
        self._take_streams(site, index)
        requests = tuple(item.request(site, index, self._span) for item in self.keep if item.kind != "stream")
        heads = self._head_index(site.layer, site.call.q.device)
        return ReadRequest(requests, index, heads, counted) if requests else None

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        for item, value in zip((item for item in self.keep if item.kind != "stream"), values, strict=True):
            self._store(site.layer, item).add(site.call.k_start, value)

    def _store(self, layer: int, item: Keep) -> Chunks:
        return self._chunks.setdefault((layer, item), Chunks(item))

    def _head_index(self, layer: int, device: torch.device) -> Tensor | None:
        return None if self.heads is None else torch.tensor(self.heads.by_layer()[layer], device=device)

    def _take_streams(self, site: Site, index: Tensor | None) -> None:
        n = site.call.q.shape[2]
        for item in self.keep:
            x = {Q: site.call.q, K: site.call.k, V: site.call.v}.get(type(item))
            if x is not None:
                self._take_stream(site.layer, item, x[:, :, -n:], index)

    def _take_z(self, layer: int, projected: Tensor) -> None:
        index = self._rows_of_z.pop(layer, torch.empty(0))  # a layer that is computed again has no rows to read
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
        if site.layer != self.layers[0] or site.call.q_start < self._checked_end:
            return
        self._checked_end = site.call.q_start + site.call.q.shape[2]
        n = site.call.q.shape[2] if index is None else len(index)
        n_keys = site.call.k.shape[2]
        self._stored.add(self.cost(site.call.q.shape[0], n_keys, n), n_keys)

    def _span(self, where: TokenSpan, width: int) -> Tensor:
        return self._spans.mask(where, self._rows.batch, width)

    def _chosen(self, position: Tensor) -> Tensor:
        """Bool [b r], which of the positions [b r] belong to the choice of queries."""
        lengths = self._spans.lengths(position.shape[0]) if self.query_choice == "generated" else []
        return choose_queries(self.query_choice, position, self._span, lengths)

    def _select(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        self._rows.batch = site.call.q.shape[0]
        if self.query_choice is None:
            return None, None
        return queries_to_read(self._chosen(site.row_position))

    @property
    @own_state()
    def queries(self) -> Tensor:
        """Int `[b q]`, the position of each query of the results, -1 where a prompt has fewer."""
        return self._rows.order(self._chosen)[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens that each row has so far, without padding."""
        return self._rows.lengths

    @own_state()
    def __getitem__(self, item: Keep) -> Any:
        """Return the result of one reduction, in the shape that its function in `interp.keep` documents.

        Args:
            item: A reduction that equals one of those captured.

        Returns:
            Tensor or RankedKeys: The result, on the CPU.

        Raises:
            UsageError: If the reduction was not captured.
            ModelError: If a layer gave nothing.
        """
        if item not in self.keep:
            raise UsageError(
                f"{item!r} was not captured: this capture holds {', '.join(map(repr, self.keep)) or 'nothing'}."
            )
        missing = [layer for layer in self.layers if (layer, item) not in self._chunks]
        if missing:
            raise ModelError(
                f"{item!r} has nothing for layers {missing}: run the model inside the context; if it did run, "
                "interp doctor shows which layers interp can reach."
            )
        rows, order = self._rows, self._rows.order(self._chosen)
        parts = [self._chunks[layer, item].assemble(rows, order) for layer in self.layers]
        join = (lambda x: torch.stack(x, 1)) if self.heads is None else (lambda x: torch.cat(x, 1))
        if isinstance(parts[0], tuple):
            return RankedKeys(*(join(list(part)) for part in zip(*parts, strict=True)))
        return join(parts)

    def __repr__(self) -> str:
        heads = "all" if self.heads is None else len(self.heads)
        return f"Capture({', '.join(map(repr, self.keep))}; {len(self.layers)} layers, {heads} heads)"


def run(model: nn.Module, prompts: Prompts, **kw: Any) -> Any:
    """Run one forward pass over a batch of prompts, without gradients and without a cache.

    The batch is padded on the left, and positions count from each prompt's first token.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The batch.
        **kw: Further arguments of the model, such as `logits_to_keep=1`.

    Returns:
        ModelOutput: The output of the model.

    Raises:
        PromptError: If a prompt is longer than the model's context.
        ModelError: If a logit is NaN or infinite.

    Examples:
        >>> from interp.hooks.read.capture import run
        >>> run(model, prompts, logits_to_keep=1).logits.shape[:2]
        torch.Size([2, 1])
    """
    model = unwrap(model)
    inputs = model_inputs(model, prompts)
    with torch.no_grad():
        return check_output(model, model(**inputs, use_cache=False, **kw), inputs)


def check_context(model: nn.Module, prompts: Prompts, more: int = 0) -> None:
    """Refuse prompts that do not fit into the model's context.

    Args:
        model: The model.
        prompts: The prompts.
        more: Number of tokens that must still fit after each prompt.

    Raises:
        PromptError: If a prompt and its reply are longer than the context.
    """
    limit = context_length(model)
    if limit is None:
        return
    prompts.check_length(limit)
    for number, length in enumerate(prompts.lengths):
        if length + more > limit:
            raise PromptError(
                f"prompt {number} has {length:,} tokens and its reply may take {more}, but the context of this model "
                f"is {limit:,}: shorten the prompt."
            )


def model_inputs(model: nn.Module, prompts: Prompts, more: int = 0) -> dict[str, Tensor]:
    """Make the inputs of a forward pass over a batch, on the model's device, position ids included.

    Args:
        model: The model.
        prompts: The batch.
        more: Number of tokens that must still fit after each prompt.

    Returns:
        dict[str, Tensor]: `input_ids`, `attention_mask` and `position_ids`, `[b q]` each.

    Raises:
        PromptError: If a prompt and its reply are longer than the model's context.
    """
    check_context(model, prompts, more)
    inputs = prompts.tensors(device=input_device(model))
    # learned positions ignore the mask, so left padding would shift them
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def read(
    model: nn.Module, prompts: Prompts, keep: Any, *, batch_size: int = 1, progress: str | None = None, **choice: Any
) -> Iterator[tuple[Prompts, Capture]]:
    """Run forward passes over prompts in batches and yield each batch with its finished capture.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts.
        keep: One or several reductions, as for `capture`, or a function of the batch that makes them.
        batch_size: Number of prompts per forward pass.
        progress: Title of a progress bar, shown after two seconds; None for no bar.
        **choice: `layers`, `heads` or `queries`, as for `capture`.

    Yields:
        tuple[Prompts, Capture]: A batch and its results.

    Raises:
        PromptError: If prompts is not an interp.Prompts.

    Examples:
        >>> from interp.hooks.read.capture import read
        >>> [cap[interp.keep.lse()].shape for batch, cap in read(model, prompts, interp.keep.lse(), heads="L0H1")]
        [torch.Size([1, 1, 17]), torch.Size([1, 1, 17])]
    """
    from tqdm.auto import tqdm

    if not isinstance(prompts, Prompts):
        raise PromptError(
            f"prompts are {type(prompts).__name__}: give interp.Prompts, as made by Prompts.encode(tokenizer, texts)."
        )
    batches = list(prompts.batches(batch_size))
    for batch in tqdm(batches, desc=progress, disable=progress is None, delay=2, leave=False):
        wanted: Any = keep(batch) if callable(keep) else keep
        with capture(model, wanted, batch, **choice) as cap:
            run(model, batch, logits_to_keep=1)
        yield batch, cap
