"""Mixtures of full and streaming attention in each layer, with one gate per kv head."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interp.errors import UsageError
from interp.hooks.edit.open_edits import opened_once
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import projection_inputs, unwrap
from interp.hooks.seam import AttentionTap, Site, tapping
from interp.kernels.contract import Call
from interp.kernels.streaming import query_runs, stream

MAX_LOGITS = 1 << 24
"""Number of logits of the streaming branch that exist at a time in a backward pass."""


@contextlib.contextmanager
def streaming_mix(
    model: nn.Module,
    gates: Float[Tensor, "l g"],
    *,
    sink: int,
    recent: int,
    full: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Mix the output of each head from full attention and from streaming attention to the first and last keys only.

    `z[b q h] = (1 - gates[l g]) stream[b q h] + gates[l g] full[b q h]`, where g is the kv head of h. Streaming
    attention sees the first `sink` keys of the prompt and the last `recent` keys before each query, as far as the
    layer's own mask allows: a native window limits both branches.

    Gradients flow to the gates, and to q, k and v of both branches. Layers whose gates are all 1 and need no gradient
    run the model's own attention alone, equal to the bit.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        gates: Float `[l g]`, the weight of full attention.
        sink: Number of first keys.
        recent: Number of last keys.
        full: By layer, `[b q h*d]`: outputs that replace the full branch, from another run of the same batch.

    Yields:
        None: The outputs are mixed until the context closes.

    Raises:
        UsageError: If gates has another shape, sink is negative, recent is less than 1, or the same mixture is open on
            this model already.
        ModelError: If the context ends and the model has not run in it.

    Examples:
        >>> from interp.hooks.edit.streaming_mix import streaming_mix
        >>> gates = torch.full((2, 2), 0.5, requires_grad=True)
        >>> with streaming_mix(model, gates, sink=2, recent=4):
        ...     model(**prompts.tensors()).logits.square().mean().backward()
        >>> gates.grad.shape
        torch.Size([2, 2])

    Limits:
        Does not show speed or memory: the full branch is computed whatever its gate.
    """
    model = unwrap(model)
    layout = HeadLayout.of(model)
    if gates.shape != (layout.layers, layout.kv_heads):
        raise UsageError(
            f"gates of shape {list(gates.shape)} for a model of {layout.layers} layers and {layout.kv_heads} kv heads: "
            "give one gate per layer and kv head, [l g]."
        )
    if sink < 0 or recent < 1:
        raise UsageError(f"sink={sink}, recent={recent}: give at least 0 first keys and at least 1 last key.")
    constant = full is None and not gates.requires_grad
    layers = [layer for layer, row in enumerate(gates) if not (constant and bool((row == 1).all()))]
    tap = StreamingMix(layout, gates, sink, recent, full, frozenset(layers))
    changing = [("streaming_mix", id(gates), sink, recent)] if layers else []
    with (
        opened_once(model, changing, "mix the gates to apply them twice"),
        tapping(model, tap),
        projection_inputs(model, layers, tap.mix) as scope,
    ):
        yield
    scope.check_reached(layers, "streaming_mix()")


@dataclass(eq=False)
class StreamingMix(AttentionTap):
    """The tap of `streaming_mix`: it computes the streaming branch of each attention call."""

    layout: HeadLayout
    gates: Tensor
    sink: int
    recent: int
    full: Mapping[int, Tensor] | None
    layers: frozenset[int]
    _streams: dict[int, Tensor] = field(default_factory=dict)
    """By layer, [b h q d]: the streaming branch, between attention and output projection."""

    def at(self, layer: int) -> bool:
        return layer in self.layers

    def edit(self, site: Site) -> Call:
        call, first = site.call, site.first

        def streaming(run: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return stream(replace(run, q=q, k=k, v=v), self.sink, self.recent, first)[0]

        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            # the backward pass computes the weights again, some queries at a time, so only q, k and v are stored, and
            # not even these where the whole layer is computed again: no other object may hold them
            q, k, v = (x.new_empty(0, x.shape[1], 0, x.shape[3]) for x in (call.q, call.k, call.v))
            settings: Any = {"use_reentrant": False, "preserve_rng_state": False}
            made = []
            for run in query_runs(call, self.sink, self.recent, MAX_LOGITS):
                bare = replace(run, q=q, k=k, v=v)
                made.append(checkpoint(streaming, bare, run.q, run.k, run.v, **settings))
            self._streams[site.layer] = torch.cat(made, 2)
        else:
            self._streams[site.layer] = streaming(call, call.q, call.k, call.v)
        return call

    def mix(self, layer: int, x: Tensor) -> Tensor:
        """Replace the outputs of heads in x [b q h*d] by the mixtures."""
        streamed = self._streams.pop(layer).transpose(1, 2)
        whole = (x if self.full is None else self.full[layer].to(x.device)).unflatten(-1, (self.layout.heads, -1))
        each = self.layout.heads // self.layout.kv_heads
        gate = self.gates[layer].to(x.device).repeat_interleave(each)[:, None]
        return ((1 - gate) * streamed + gate * whole).to(x.dtype).flatten(-2)
