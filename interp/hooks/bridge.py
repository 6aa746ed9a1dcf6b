"""TransformerLens on the user's model, its attention through our seam; the only file that touches private parts of it.

TransformerLens wraps the modules of a model in place and computes attention itself, n x n. Here its attention component
runs the model's own module instead, which calls the seam; its hook points inside of attention are called from there.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.modules import attention_layers, plain, projection_name, wrapped
from interp.hooks.seam import Site, Want, tapping
from interp.hooks.tree import Tree
from interp.kernels import naive
from interp.kernels.contract import Call, TopKeys
from interp.kernels.errors import ModelError, UsageError


@contextlib.contextmanager
def bridge(model: nn.Module, tokenizer: Any = None) -> Iterator[Any]:
    """A TransformerLens TransformerBridge over `model` whose attention runs through our seam.

        with interp.bridge(model, tokenizer) as tl:
            logits, cache = tl.run_with_cache(tokens)
            with interp.capture(tl, entropy()) as cap: ...

    TransformerLens' tools work on it as on its own bridge (patching, attribution, detect_head, logit lens), and `tl` is
    accepted everywhere a model is. An n x n pattern is made only in layers where somebody listens to hook_pattern,
    hook_attn_scores, hook_rot_q or hook_rot_k: at length, cache with names_filter=. Edits there act and gradients flow;
    hook_attn_scores has -inf where a query may not look, and a `capture` reads the pattern after the hooks.
    Fused projections (GPT-2, NeoX, Phi-3) run as q, k and v apart, as in TransformerLens: equal up to rounding.

    On leaving, the module tree, parameters (folded weights too), buffers, attributes and the attention implementation
    of the model are as before; `tl` then refuses to run. Weights that were changed in place, by an optimizer, stay so.
    In a notebook, open it over cells with `contextlib.ExitStack().enter_context(interp.bridge(model))`.

    Not here: set_use_split_qkv_input and set_use_attn_in raise when the model runs, and so does a change at hook_rot_k,
    since the cache has the key already.
    Raises ModelError where transformer-lens is missing or has no adapter for the model, or a bridge is open already.
    """
    model = plain(model)
    layers = attention_layers(model)
    if any(wrapped(module) is not None for module in model.modules()):
        raise ModelError("the modules of this model are in a TransformerBridge already: use that bridge, or load anew.")
    tree = Tree(model)
    with contextlib.ExitStack() as stack:
        stack.callback(tree.restore)
        built = _build(model, tokenizer)
        tree.restore_configs()
        points = {_inner(attn): Points(attn) for attn in _attention(built, layers)}
        for point in points.values():
            _rewire(point.attn)
        seam = stack.enter_context(tapping(model, Nothing()))
        seam.points.update(points)
        stack.callback(seam.points.clear)
        stack.callback(object.__setattr__, built, "forward", _closed)
        yield built


def _build(model: nn.Module, tokenizer: Any) -> Any:
    if importlib.util.find_spec("transformer_lens") is None:
        raise ModelError("transformer-lens is not installed: pip install 'transformer-lens>=4.3,<5'.")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    name = type(model).__name__
    try:
        return build_bridge_from_module(
            model, name, hf_config=model.config, tokenizer=tokenizer, post_adapter_hook=_delegate
        )
    except ValueError as error:
        raise ModelError(f"transformer-lens cannot bridge {name}: {error}") from error


def _delegate(adapter: Any) -> None:
    """Let the transformers module compute attention, before TransformerLens copies its components for each block."""
    blocks = adapter.component_mapping.get("blocks")
    attn = None if blocks is None else blocks.submodules.get("attn")
    if attn is None:
        raise ModelError("transformer-lens knows no attention in the blocks of this model: use the model without it.")
    attn.__class__ = type(type(attn).__name__, (Delegating, type(attn)), {})


def _closed(*_: Any, **__: Any) -> None:
    raise UsageError("this TransformerBridge was closed when its context ended: run inside of interp.bridge(model).")


def _inner(attn: Any) -> nn.Module:
    return attn.original_component


def _attention(built: Any, layers: dict[int, nn.Module]) -> list[Any]:
    """The attention components of a bridge, one for each layer."""
    found = [m for m in built.original_model.modules() if isinstance(m, Delegating)]
    missing = set(layers.values()) - {_inner(attn) for attn in found}
    if missing:
        raise ModelError(
            f"transformer-lens leaves {len(missing)} of {len(layers)} attention layers outside of its bridge: use the "
            "model without it."
        )
    return found


class Delegating:
    """An attention component whose forward is that of the module it wraps."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for flag in ("use_split_qkv_input", "use_attn_in"):
            if getattr(self.config, flag, False):
                raise ModelError(f"set_{flag} has no meaning on interp's bridge: patch hook_q, hook_k and hook_v.")
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = self.hook_in(kwargs["hidden_states"])
        else:
            args = (self.hook_in(args[0]), *args[1:])
        if kwargs.get("position_embeddings") is not None and hasattr(self, "hook_cos"):
            kwargs["position_embeddings"] = self._apply_position_embedding_hooks(kwargs["position_embeddings"])
        # noted by the block for a fork of q, k and v that we do not have
        self._captured_pre_ln_residual = None
        output = self.original_component(*args, **kwargs)
        out, *rest = output if isinstance(output, tuple) else (output,)
        if "qkv" in self.submodules:
            out = self.hook_hidden_states(out)
        out = self.hook_out(out)
        return (out, *rest) if isinstance(output, tuple) else out


class PerHead:
    """An output projection that shows what each head writes, where set_use_attn_result asks for it."""

    def forward(self: Any, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attn = self.__dict__["attention"]
        z = self.hook_in(z)
        out = self.original_component(z, *args, **kwargs)
        if getattr(attn.config, "use_attn_result", False) and attn.hook_result.has_hooks():
            weight = attn.W_O
            result = torch.einsum("bqhd,hdm->bqhm", z.unflatten(-1, weight.shape[:2]), weight)
            out = out + (attn.hook_result(result) - result).sum(2)
        return self.hook_out(out)


class Normed:
    """A norm of q or k that shows [b h q d], as TransformerLens does, where the model norms [b q h d]."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads, shown = self.__dict__["heads"], self.__dict__["shown"]
        # a view of the projection has not been transposed yet: its positions are further apart than its heads
        early = x.dim() == 4 and x.shape[2] == heads and (x.shape[1] != heads or x.stride(1) > x.stride(2))
        out = super().forward(x.transpose(1, 2) if early else x, *args, **kwargs)  # pyright: ignore
        out = shown(out)
        return out.transpose(1, 2) if early else out


class Fused:
    """A projection of q, k and v in one, computed apart by the components that TransformerLens split it into."""

    def forward(self: Any, x: Tensor) -> Tensor:
        attn, merge = self.__dict__["attention"], self.__dict__["merge"]
        x = self.hook_in(x)
        return self.hook_out(merge(attn.q(x), attn.k(x), attn.v(x)))


def _rewire(attn: Any) -> None:
    """Put the components of one attention layer where the transformers module looks for them."""
    name = projection_name(_inner(attn))
    if name is not None:
        _become(attn.o, PerHead, attention=attn)
        # TransformerLens leaves it out where it computes the projection itself
        setattr(_inner(attn), name, attn.o)
    for norm, shown, heads in (
        ("q_norm", "hook_q_normed", "n_heads"),
        ("k_norm", "hook_k_normed", "n_key_value_heads"),
    ):
        if norm in attn._modules and hasattr(attn, shown):
            count = getattr(attn.config, heads, None) or attn.config.n_heads
            _become(attn._modules[norm], Normed, heads=count, shown=getattr(attn, shown))
    if "qkv" in attn.submodules:
        _become(attn.qkv, Fused, attention=attn, merge=_merge(attn))
        setattr(_inner(attn), attn.qkv.name, attn.qkv)


def _become(component: Any, mixin: type, **known: Any) -> None:
    component.__class__ = type(type(component).__name__, (mixin, type(component)), {})
    # past nn.Module, which would register the parent below its child
    component.__dict__.update(known)


def _merge(attn: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How q, k and v stand in a fused projection: found by comparing its weight with the three it was split into."""
    heads = attn.config.n_heads

    def in_turn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q, k, v], -1)

    def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        return torch.cat(parts, -1).flatten(-2)

    fused = attn.qkv.original_component.weight
    q, k, v = (part.original_component.weight.detach().T for part in (attn.q, attn.k, attn.v))
    # Linear stores [out, in], Conv1D [in, out]
    if any(torch.equal(in_turn(q, k, v), weight) for weight in (fused, fused.T)):
        return in_turn
    if q.shape == k.shape and any(torch.equal(by_head(q, k, v), weight) for weight in (fused, fused.T)):
        return by_head
    raise ModelError(
        f"{type(_inner(attn)).__name__} fuses q, k and v in an order that interp.bridge does not know: use the model "
        "without it."
    )


@dataclass(eq=False)
class Points:
    """The hook points inside of one attention call: hook_rot_q, hook_rot_k, hook_attn_scores and hook_pattern."""

    attn: Any
    _points: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        names = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")
        self._points = [getattr(self.attn, name, None) for name in names]

    @property
    def live(self) -> bool:
        return any(point is not None and point.has_hooks() for point in self._points)

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out [b h q d], pattern [b h q k]) with every hook called in its place."""
        call = self._rotated(call)
        scores = self._points[2](naive.logits(call))
        pattern = torch.exp(scores - naive.lse(call, scores)[..., None]).nan_to_num(0.0)
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
                raise UsageError("hook_rot_k was edited, but the key is in the cache by then: edit hook_k.")
            call = replace(call, k=torch.cat([old, hooked], 2))
        return call

    @torch.no_grad()
    def values(self, call: Call, pattern: Tensor, want: Want) -> tuple[Any, ...]:
        """Reductions of the pattern after the hooks; lse and logits are those before them."""
        pattern = pattern.detach().to(call.dtype)
        if want.heads is not None:
            call, pattern = call.for_heads(want.heads), pattern.index_select(1, want.heads)
        index = torch.arange(pattern.shape[2], device=pattern.device) if want.queries is None else want.queries
        return tuple(
            _top(request, call, pattern[:, :, index])
            if isinstance(request, TopKeys)
            else naive.reduce(request, call, pattern, index)
            for request in want.requests
        )


def _top(request: TopKeys, call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the pattern itself, which an edit may have taken away from the logits."""
    probs, order = rows.sort(dim=-1, descending=True, stable=True)
    probs, order = probs[..., : request.k], order[..., : request.k]
    keys = torch.where(probs > 0, order + call.k_start, -1)
    pad = (0, request.k - keys.shape[-1])
    return nn.functional.pad(keys, pad, value=-1), nn.functional.pad(probs, pad)


class Nothing:
    """A tap that keeps the seam open."""

    def at(self, layer: int) -> bool:
        return False

    def edit(self, site: Site) -> Call:
        return site.call

    def want(self, site: Site) -> Want | None:
        return None

    def take(self, site: Site, want: Want, values: tuple[Any, ...]) -> None:
        return None
