"""The seam between a model and interp: a registered pair of attention and mask functions.

transformers calls a registered attention function with queries and keys after the norm, RoPE and the cache. While a tap
is open, the model uses interp's pair of functions. A layer that no tap reads or edits runs the attention function that
the model had before, with the mask that function would have received, so its output is identical to the bit.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.finite import finite_values
from interp.hooks.model.layers import attention_layers, n_recomputed_layers, unwrap, uses_interface
from interp.hooks.model.mask import DeferredMask, MaskFacts
from interp.hooks.model.repeats import is_repeating
from interp.kernels.contract import Call, Request
from interp.kernels.select import select


@dataclass(frozen=True, eq=False)
class ReadRequest:
    """The reductions that a tap requests from one attention call."""

    requests: tuple[Request, ...]
    """The reductions, as `interp.kernels.contract` defines them."""
    queries: Tensor | None = None
    """Int `[r]` indices of the queries to read, counted within the call; None reads all."""
    heads: Tensor | None = None
    """Int `[n]` query heads to read; None reads all."""

    @property
    def partial(self) -> bool:
        """Whether only some of the queries or heads are read."""
        return self.queries is not None or self.heads is not None


@dataclass(frozen=True, eq=False)
class Site:
    """One attention call and its place in the model."""

    layer: int
    """Layer index, counted from 0."""
    module: nn.Module
    """The self-attention module."""
    first: Tensor
    """Int `[b]` column of the first real token in each row of the batch."""
    call: Call
    """The operands of the call."""


class HookPoints(Protocol):
    """Hook points of a TransformerLens bridge inside one attention call; they see the whole pattern."""

    @property
    def active(self) -> bool:
        """Whether any hook is attached."""
        ...

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """Compute the output `[b h q d]` and the pattern `[b h q k]`, both after the hooks."""
        ...

    def values(self, call: Call, pattern: Tensor, want: ReadRequest) -> tuple[Any, ...]:
        """Compute the requested reductions, in order, from the pattern `[b h q k]` after the hooks."""
        ...


class AttentionTap(Protocol):
    """Base class of everything that reads or edits attention.

    The default methods read nothing and leave attention unchanged; a subclass overrides the ones it needs. A tap that
    requests nothing from a call adds no computation to it.
    """

    def at(self, layer: int) -> bool:
        """Whether the tap reads or edits this layer, counted from 0."""
        return True

    def edit(self, site: Site) -> Call:
        """Edit an attention call before it runs: return the call with biases, or unchanged."""
        return site.call

    def want(self, site: Site) -> ReadRequest | None:
        """Request reductions from a call that all taps have edited; None reads nothing."""
        return None

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        """Receive one value for each reduction of the request, in order."""


@dataclass(eq=False)
class PatchedConfig:
    """A config that currently names interp's attention functions; several models may share one config."""

    config: Any
    original: str | None
    """The attention implementation to restore."""
    users: int = 0
    """Number of open seams that use the config."""


IMPLEMENTATION_NAME = "interp"
"""Name under which the functions are registered; transformers would treat a name with "flash" or "/" as a kernel."""
_seams: dict[nn.Module, "Seam"] = {}
_owners: dict[nn.Module, "Seam"] = {}
_patched: dict[int, PatchedConfig] = {}


def _patch(config: Any) -> None:
    """Make a config name interp's functions, and register these on first use."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _patched:
        AttentionInterface.register(IMPLEMENTATION_NAME, torch.compiler.disable(_attend))
        AttentionMaskInterface.register(IMPLEMENTATION_NAME, _mask)
    patched = _patched.setdefault(id(config), PatchedConfig(config, config._attn_implementation))
    patched.users += 1
    config._attn_implementation = IMPLEMENTATION_NAME


def _restore(config: Any) -> None:
    """Undo `_patch` once the last user of the config is gone, and unregister the functions after the last config."""
    from transformers import AttentionInterface, AttentionMaskInterface

    patched = _patched[id(config)]
    patched.users -= 1
    if not patched.users:
        config._attn_implementation = patched.original
        del _patched[id(config)]
    if not _patched:
        for interface in (AttentionInterface, AttentionMaskInterface):
            # transformers has no public way to undo register()
            interface._global_mapping.pop(IMPLEMENTATION_NAME, None)


def _original_implementation(config: Any) -> str | None:
    """The attention implementation that a patched config named before; None for a config that is not patched."""
    patched = _patched.get(id(config))
    return None if patched is None else patched.original


def _mask(**arguments: Any) -> DeferredMask:
    """The registered mask function: stores its arguments and builds no mask."""
    arguments.setdefault("attention_mask", None)
    for name in ("q_offset", "kv_offset"):
        # a static cache passes its own counter, which has advanced by the time the layers read it
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = arguments[name].clone()
    return DeferredMask.of(MaskFacts(_original_implementation(arguments.get("config")), arguments))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query `[b h q d]`, key and value `[b g k d]` -> output `[b q h d]`, weights.

    The weights are those that the original attention function returns, None where it returns none.
    """
    seam = _owners.get(module)
    if seam is None:
        # this model is not tapped; it shares its config with one that is
        return _original_attention(module, query, key, value, mask, kw)
    return seam.attend(module, query, key, value, mask, kw)


def _original_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Call the model's original attention function with the mask it would have received."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get(_original_implementation(config))
    if function is None:
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(
            f"{type(module).__name__} has no eager attention function to fall back on; "
            "load the model with attn_implementation='sdpa'."
        )
    whole = mask.facts_for(module).mask if isinstance(mask, DeferredMask) else mask
    return function(module, query, key, value, whole, **kw)


@contextlib.contextmanager
def tapping(model: nn.Module, tap: AttentionTap) -> Iterator["Seam"]:
    """Connect a tap to the attention calls of a model while the context is open.

    The first tap registers interp's pair of functions. When the last tap leaves, the original state is restored.
    Contexts nest, and the taps of one model never see the calls of another.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        tap: The tap to connect.

    Yields:
        The seam of the model.

    Raises:
        ModelError: If the model has no attention layers, or its attention cannot be routed through interp.
    """
    model = unwrap(model)
    seam = _seams.get(model)
    if seam is None:
        seam = _seams[model] = Seam(model)
        try:
            seam.open()
        except BaseException:
            del _seams[model]
            seam.close()
            raise
    seam.taps.append(tap)
    try:
        yield seam
    finally:
        seam.taps.remove(tap)
        if not seam.taps:
            del _seams[model]
            seam.close()


@dataclass(eq=False)
class Seam:
    """The open taps of one model, and the routing of its attention calls to them."""

    model: nn.Module
    taps: list[AttentionTap] = field(default_factory=list)
    force: str | None = None
    """Name of the engine that runs every call; None selects one for each call."""
    points: dict[nn.Module, HookPoints] = field(default_factory=dict)
    """The hook points of each attention module, while a bridge is open."""
    _layers: tuple[nn.Module, ...] = ()
    _configs: tuple[Any, ...] = ()

    def open(self) -> None:
        """Route the attention calls of the model through the seam.

        Raises:
            ModelError: If the model has no attention layers, or its attention cannot be routed through interp.
        """
        layers = attention_layers(self.model)
        if foreign := n_recomputed_layers(self.model):
            raise ModelError(
                f"this TransformerBridge computes the attention of {foreign} of {len(layers)} layers itself, where "
                "interp cannot observe it; pass the transformers model, or a bridge made by interp.bridge(model)."
            )
        if not uses_interface(self.model, layers.values()):
            raise ModelError(
                f"{type(self.model).__name__} does not compute attention through transformers' AttentionInterface, so "
                "interp cannot read or edit it; only ablate(kind='zero') works on this model."
            )
        configs = {id(config): config for m in layers.values() if (config := getattr(m, "config", None)) is not None}
        if not configs:
            raise ModelError(
                f"the attention modules of {type(self.model).__name__} have no config, so their attention function "
                "cannot be replaced; use a model of transformers 5 that supports AttentionInterface."
            )
        self._layers, self._configs = tuple(layers.values()), tuple(configs.values())
        _owners.update(dict.fromkeys(self._layers, self))
        for config in self._configs:
            _patch(config)

    def close(self) -> None:
        """Restore the original routing."""
        for module in self._layers:
            _owners.pop(module, None)
        for config in self._configs:
            _restore(config)
        self._layers = self._configs = ()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Run one attention call of the model, with the edits and reads of the taps.

        The arguments are those of transformers' attention function, and `kw` its keyword arguments.

        Returns:
            The output `[b q h d]`, and the attention weights where the model's function returns them.

        Raises:
            UsageError: If the model uses attention dropout and a tap edits the call.
        """
        taps = [tap for tap in self.taps if tap.at(getattr(module, "layer_idx", -1))]

        def original() -> tuple[Tensor, Tensor | None]:
            return _original_attention(module, query, key, value, mask, kw)

        points = self.points.get(module)
        hooked = points if points is not None and points.active else None
        if not taps and hooked is None:
            return original()
        site = self.site(module, query, key, value, mask, kw)
        for tap in taps:
            site = replace(site, call=tap.edit(site))
        readers = () if is_repeating() else taps
        wants = [(tap, want) for tap in readers if (want := tap.want(site)) is not None]
        if not wants and not site.call.edited and hooked is None:
            return original()
        if kw.get("dropout") and (site.call.edited or hooked is not None):
            raise UsageError(
                "the model is in training mode with attention dropout, which edits do not support; call model.eval()."
            )

        if hooked is not None:
            out, pattern = hooked.attend(site.call)
            for tap, want in wants:
                tap.take(site, want, finite_values(site, hooked.values(site.call, pattern, want)))
            return out.transpose(1, 2), pattern if kw.get("output_attentions") else None

        # the original function computes the output where an engine would have to compute more than is read
        use_engine = site.call.edited or not (
            kw.get("dropout")
            or kw.get("output_attentions")
            or _ignores_softcap(module, kw)
            or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
            or all(want.partial for _, want in wants)
        )
        out, weights = (None, None) if use_engine else original()
        for tap, want in wants:
            fused = out is None and not want.partial
            call = site.call if want.heads is None else site.call.for_heads(want.heads)
            with torch.set_grad_enabled(torch.is_grad_enabled() and fused):
                engine = select(call, want.requests, self.force).engine
                result = engine(call, want.requests, want.queries, out=fused)
            if fused:
                out = result.written.transpose(1, 2)
            tap.take(site, want, finite_values(site, result.values))
        if out is None:
            out = select(site.call, (), self.force).engine(site.call).written.transpose(1, 2)
        return out, weights

    def site(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
    ) -> Site:
        """Translate the arguments of transformers' attention function into a call and its place in the model.

        Raises:
            ModelError: If the call has a position bias, a cache argument, or a mask that cannot be interpreted.
        """
        for name in ("position_bias", "cache"):
            if kw.get(name) is not None:
                raise ModelError(
                    f"{type(module).__name__} passes {name!r} to its attention function, which is not supported; "
                    "use a decoder with rotary or learned positions and an ordinary cache."
                )
        b, n, d = query.shape[0], query.shape[2], query.shape[3]
        layer: Any = module.layer_idx
        causal = kw.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scale = kw.get("scaling")
        call: dict[str, Any] = {
            "scale": d**-0.5 if scale is None else scale,
            "softcap": None if _ignores_softcap(module, kw) else kw.get("softcap"),
            "sinks": kw.get("s_aux"),
            "causal": causal,
            "q_start": key.shape[2] - n,
        }
        first = torch.zeros(b, dtype=torch.int64, device=query.device)
        if isinstance(mask, DeferredMask):
            facts = mask.facts_for(module)
            q_start, k_start, live = facts.start
            key, value = key[:, :, :live], value[:, :, :live]
            first = facts.first.to(query.device)
            call |= {"q_start": q_start, "k_start": k_start, "window": facts.structure[0]}
            if facts.dense is not None:
                call |= {"causal": False, "mask": facts.dense[..., :live].to(query.device)}
            if facts.padding is not None:
                padding = facts.padding.to(query.device)
                call |= {
                    "live": padding[:, k_start : k_start + live],
                    "row_live": padding[:, q_start : q_start + n],
                }
        elif mask is not None:
            # a four-dimensional mask from the user is complete, except that it does not show where a static cache ends
            if mask.shape[-1] < key.shape[2] or not _sees_last_key(mask, key.shape[2]):
                raise ModelError(
                    f"the four-dimensional attention mask {list(mask.shape)} hides the last of {key.shape[2]} keys "
                    "from every query, as happens with a static cache; pass a two-dimensional attention_mask, or use "
                    "a dynamic cache."
                )
            call |= {"causal": False, "mask": mask[..., : key.shape[2]]}
        return Site(int(layer), module, first, Call(query, key, value, **call))


def _ignores_softcap(module: nn.Module, kw: dict[str, Any]) -> bool:
    """Whether the original function lacks the soft-cap: older versions of sdpa ignore it, newer ones fail."""
    return kw.get("softcap") is not None and _original_implementation(module.config) == "sdpa"


def _sees_last_key(mask: Tensor, keys: int) -> bool:
    """Whether any query can attend to the last key."""
    last = mask[..., keys - 1]
    return bool((last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min).any())
