"""Components of a TransformerLens bridge that run the modules of the model, and its attention through the seam.

Each class is mixed into a component that TransformerLens has built; `attention` is the attention component that it
belongs to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.layers import projection_name
from interp.hooks.model.weights import acting_weight, compute_dtype, input_device, is_plain
from interp.hooks.seam import ReadRequest
from interp.kernels import naive
from interp.kernels.contract import Call, Entropy, TopKeys

MergeFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class DelegatingAttention:
    """An attention component that runs the module it wraps."""

    @property
    def W_O(self: Any) -> Tensor:
        """`[h d m]`, the output projection as it acts, with adapters and from any stored form."""
        inner = self.original_component
        projection = getattr(inner, str(projection_name(inner)), None)
        projection = getattr(projection, "original_component", projection)
        if projection is None or is_plain(projection):
            return super().W_O  # pyright: ignore[reportAttributeAccessIssue]
        weight = acting_weight(projection, _like(inner))
        return weight.unflatten(0, (self.config.n_heads, -1))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            x = kwargs["hidden_states"] = self.hook_in(kwargs["hidden_states"])
        else:
            x = self.hook_in(args[0])
            args = (x, *args[1:])
        if kwargs.get("position_embeddings") is not None and hasattr(self, "hook_cos"):
            kwargs["position_embeddings"] = self._apply_position_embedding_hooks(kwargs["position_embeddings"])
        try:
            self.__dict__["forks"] = _fork_inputs(self, x)
            output = self.original_component(*args, **kwargs)
        finally:
            self.__dict__["forks"] = {}
            # the block stored it for the forked inputs
            self._captured_pre_ln_residual = None
        out, *rest = output if isinstance(output, tuple) else (output,)
        if "qkv" in self.submodules:
            out = self.hook_hidden_states(out)
        out = self.hook_out(out)
        return (out, *rest) if isinstance(output, tuple) else out


class Unembedding:
    """Output embeddings whose weight is read as it acts."""

    @property
    def W_U(self: Any) -> Tensor:
        """`[m v]`, with adapters and from any stored form."""
        if is_plain(self.original_component):
            return super().W_U  # pyright: ignore[reportAttributeAccessIssue]
        return acting_weight(self.original_component, _like(self.original_component))


def _like(module: nn.Module) -> Tensor:
    """A tensor with the dtype and device of the inputs of a module."""
    return torch.zeros((), dtype=compute_dtype(module), device=input_device(module))


def _fork_inputs(attn: Any, x: Tensor) -> dict[str, Tensor]:
    """The inputs of q, k and v with a copy for each head `[b q h m]`, after set_use_split_qkv_input or set_use_attn_in.

    Without these settings the result is empty.
    """
    config = attn.config
    split = getattr(config, "use_split_qkv_input", False)
    if not split and not getattr(config, "use_attn_in", False):
        return {}
    before = attn._captured_pre_ln_residual
    x = x if before is None else before
    heads, groups = config.n_heads, getattr(config, "n_key_value_heads", None) or config.n_heads
    if split:
        counts = (("q", heads), ("k", groups), ("v", groups))
        return {name: attn._fork_and_norm_per_head(x, getattr(attn, f"hook_{name}_input"), n) for name, n in counts}
    fork = attn._fork_and_norm_per_head(x, attn.hook_attn_in, heads)
    return {"q": fork, "k": fork[:, :, :groups], "v": fork[:, :, :groups]}


class HeadProjection:
    """A projection to q, k or v that takes a separate input for each head where the inputs are forked."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attn = self.__dict__["attention"]
        fork = attn.__dict__.get("forks", {}).get(self.__dict__["letter"])
        if fork is None:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return attn._project_per_head_qkv(self, fork, fork.shape[2], attn.config.d_head).flatten(-2)


class OutputProjection:
    """An output projection that shows the output of each head at hook_result, after set_use_attn_result."""

    def forward(self: Any, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attn = self.__dict__["attention"]
        z = self.hook_in(z)
        out = self.original_component(z, *args, **kwargs)
        if getattr(attn.config, "use_attn_result", False) and attn.hook_result.has_hooks():
            weight = attn.W_O
            result = torch.einsum("bqhd,hdm->bqhm", z.unflatten(-1, weight.shape[:2]), weight)
            out = out + (attn.hook_result(result) - result).sum(2)
        return self.hook_out(out)


class HeadNorm:
    """A norm of q or k that shows `[b h q d]`, as TransformerLens does, where the model normalises `[b q h d]`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads, shown = self.__dict__["heads"], self.__dict__["shown"]
        # before the transposition, the positions of a view are further apart in memory than its heads
        early = x.dim() == 4 and x.shape[2] == heads and (x.shape[1] != heads or x.stride(1) > x.stride(2))
        out = super().forward(x.transpose(1, 2) if early else x, *args, **kwargs)  # pyright: ignore
        out = shown(out)
        return out.transpose(1, 2) if early else out


class FusedProjection:
    """A fused projection to q, k and v, computed by the three components that TransformerLens split it into."""

    def forward(self: Any, x: Tensor) -> Tensor:
        attn, merge = self.__dict__["attention"], self.__dict__["merge"]
        x = self.hook_in(x)
        return self.hook_out(merge(attn.q(x), attn.k(x), attn.v(x)))


def rewire(attn: Any) -> None:
    """Attach the components of one attention layer to the transformers module that it wraps.

    Args:
        attn: The attention component of the layer.

    Raises:
        ModelError: If q, k and v are fused in an unknown order.
    """
    inner, config = attn.original_component, attn.config
    parts = attn._modules
    for letter in ("q", "k", "v"):
        if letter in parts:
            mix_in(parts[letter], HeadProjection, attention=attn, letter=letter)
    for letter, count in (("q", config.n_heads), ("k", getattr(config, "n_key_value_heads", None) or config.n_heads)):
        if f"{letter}_norm" in parts and hasattr(attn, f"hook_{letter}_normed"):
            mix_in(parts[f"{letter}_norm"], HeadNorm, heads=count, shown=getattr(attn, f"hook_{letter}_normed"))
    name = projection_name(inner)
    if name is not None and "o" in parts:
        mix_in(attn.o, OutputProjection, attention=attn)
        # TransformerLens does not attach it where it computes the projection itself
        setattr(inner, name, attn.o)
    if "qkv" in attn.submodules:
        mix_in(attn.qkv, FusedProjection, attention=attn, merge=_find_merge(attn))
        setattr(inner, attn.qkv.name, attn.qkv)


def mix_in(component: Any, mixin: type, **known: Any) -> None:
    """Add a mixin to the class of one component, and give it attributes."""
    component.__class__ = type(type(component).__name__, (mixin, type(component)), {})
    # bypasses nn.Module, which would register the parent as a child of its own child
    component.__dict__.update(known)


def _find_merge(attn: Any) -> MergeFunction:
    """Find the order of q, k and v in a fused projection by comparing its weight with the three parts."""
    heads = attn.config.n_heads

    def in_turn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q, k, v], -1)

    def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([x.unflatten(-1, (heads, -1)) for x in (q, k, v)], -1).flatten(-2)

    fused = attn.qkv.original_component.weight
    q, k, v = (part.original_component.weight.detach().T for part in (attn.q, attn.k, attn.v))
    # Linear stores [out, in], Conv1D [in, out]
    if any(torch.equal(in_turn(q, k, v), weight) for weight in (fused, fused.T)):
        return in_turn
    if q.shape == k.shape and any(torch.equal(by_head(q, k, v), weight) for weight in (fused, fused.T)):
        return by_head
    raise ModelError(
        f"{type(attn.original_component).__name__} fuses q, k and v in an order that interp.bridge does not know; use "
        "the model without a bridge."
    )


@dataclass(eq=False)
class AttentionPoints:
    """The hook points inside one attention call: hook_rot_q, hook_rot_k, hook_attn_scores and hook_pattern."""

    attn: Any
    _points: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        names = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")
        self._points = [getattr(self.attn, name, None) for name in names]

    @property
    def active(self) -> bool:
        """Whether any of the points has a hook."""
        return any(point is not None and point.has_hooks() for point in self._points)

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Compute the output `[b h q d]` and the pattern `[b h q k]`, running each hook at its point."""
        call = self._rotated(call)
        scores = self._points[2](naive.logits(call))
        total = naive.lse(call, scores)[..., None]
        pattern = torch.exp(scores - total).masked_fill(total == -torch.inf, 0.0)
        pattern = self._points[3](pattern.to(call.v.dtype))
        return pattern @ call.v.repeat_interleave(call.sizes[1] // call.sizes[2], 1), pattern

    def _rotated(self, call: Call) -> Call:
        rot_q, rot_k = self._points[:2]
        if rot_q is not None and rot_q.has_hooks():
            call = replace(call, q=rot_q(call.q))
        if rot_k is not None and rot_k.has_hooks():
            old, new = call.k.split([call.k.shape[2] - call.q.shape[2], call.q.shape[2]], 2)
            hooked = rot_k(new)
            if not torch.equal(hooked, new):
                raise UsageError("hook_rot_k was edited after the key had entered the cache; edit hook_k instead.")
            call = replace(call, k=torch.cat([old, hooked], 2))
        return call

    @torch.no_grad()
    def values(self, call: Call, pattern: Tensor, want: ReadRequest) -> tuple[Any, ...]:
        """Compute reductions of the pattern after the hooks; lse and logits are those before the hooks."""
        pattern = pattern.detach().to(call.dtype)
        if want.heads is not None:
            call, pattern = call.for_heads(want.heads), pattern.index_select(1, want.heads)
        index = torch.arange(pattern.shape[2], device=pattern.device) if want.queries is None else want.queries
        own = {TopKeys: _top, Entropy: _entropy}
        return tuple(
            own[type(request)](request, call, pattern[:, :, index])
            if type(request) in own
            else naive.reduce(request, call, pattern, index)
            for request in want.requests
        )


def _entropy(request: Entropy, call: Call, rows: Tensor) -> Tensor:
    """The entropy over keys of the pattern itself, without the share of a learned sink."""
    over_keys = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return torch.special.entr(over_keys).sum(-1)


def _top(request: TopKeys, call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entries of the pattern itself; after an edit it need not follow from the logits."""
    probs, order = rows.sort(dim=-1, descending=True, stable=True)
    probs, order = probs[..., : request.k], order[..., : request.k]
    keys = torch.where(probs > 0, order + call.k_start, -1)
    pad = (0, request.k - keys.shape[-1])
    return nn.functional.pad(keys, pad, value=-1), nn.functional.pad(probs, pad)
