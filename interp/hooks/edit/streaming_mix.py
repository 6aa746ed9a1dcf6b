"""Two branches of attention in each layer, full and streaming, mixed by a gate for each kv head."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import projection_inputs, unwrap
from interp.hooks.seam import AttentionTap, Site, tapping
from interp.kernels.contract import Call
from interp.kernels.streaming import stream


@contextlib.contextmanager
def streaming_mix(
    model: nn.Module,
    gates: Float[Tensor, "l g"],
    *,
    sink: int,
    recent: int,
    full: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Let each head write a mixture of what it would write and what it would write of the first and last keys alone.

        with streaming_mix(model, gates, sink=16, recent=64):
            hidden = model.base_model(**inputs).last_hidden_state

    z[b q h] = (1 - gates[l g]) stream[b q h] + gates[l g] full[b q h], g the kv head of h; stream sees the first `sink`
    keys of its prompt and the last `recent` before each query, as far as the layer's own mask lets it: a native window
    belongs to both. Gradients flow to the gates, and to q, k and v of both branches.
    full: by layer, [b q h*d] to take for the full branch instead, as another run of the same batch gave it.
    Layers whose gates are all 1 and learn nothing run the model's own attention alone, equal to the bit.
    Raises UsageError for gates of another shape, or sizes without meaning.
    Cannot show: speed or memory; the full branch is computed whatever its gate.
    """
    model = unwrap(model)
    layout = HeadLayout.of(model)
    if gates.shape != (layout.layers, layout.kv_heads):
        raise UsageError(
            f"gates of shape {list(gates.shape)} for a model of {layout.layers} layers and {layout.kv_heads} kv heads: "
            "give one gate for each, [l g]."
        )
    if sink < 0 or recent < 1:
        raise UsageError(f"sink={sink}, recent={recent}: give a number of first keys, 0 or more, and a last one.")
    idle = full is None and not gates.requires_grad
    layers = [layer for layer, row in enumerate(gates) if not (idle and bool((row == 1).all()))]
    branches = StreamingMix(layout, gates, sink, recent, full, frozenset(layers))
    with tapping(model, branches), projection_inputs(model, layers, branches.mix):
        yield


@dataclass(eq=False)
class StreamingMix(AttentionTap):
    """See `streaming_mix`."""

    layout: HeadLayout
    gates: Tensor
    sink: int
    recent: int
    full: Mapping[int, Tensor] | None
    layers: frozenset[int]
    _streams: dict[int, Tensor] = field(default_factory=dict)
    """[b h q d] of a layer, between its attention and its output projection"""

    def at(self, layer: int) -> bool:
        return layer in self.layers

    def edit(self, site: Site) -> Call:
        call, first = site.call, site.first

        def near(*qkv: Tensor) -> Tensor:
            q, k, v = qkv
            return stream(replace(call, q=q, k=k, v=v), self.sink, self.recent, first)[0]

        qkv = call.q, call.k, call.v
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in qkv)
        # a backward pass makes the weights again: what is held stays as large as q, k and v
        made = checkpoint(near, *qkv, use_reentrant=False, preserve_rng_state=False) if learns else near(*qkv)
        self._streams[site.layer] = made
        return call

    def mix(self, layer: int, x: Tensor) -> Tensor:
        """x [b q h*d] with each head's mixture in its place."""
        near = self._streams.pop(layer).transpose(1, 2)
        whole = (x if self.full is None else self.full[layer].to(x.device)).unflatten(-1, (self.layout.heads, -1))
        each = self.layout.heads // self.layout.kv_heads
        gate = self.gates[layer].to(x.device).repeat_interleave(each)[:, None]
        return ((1 - gate) * near + gate * whole).to(x.dtype).flatten(-2)
