"""The seam between a model and interp: a registered pair of attention and mask functions.

transformers calls a registered attention function with queries and keys after the norm, RoPE and the cache. While a tap
is open, the model uses interp's pair of functions. A layer that no tap reads or edits runs the attention function that
the model had before, with the mask that function would have received, so its output is identical to the bit.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.layers import attention_layers, n_recomputed_layers, unwrap, uses_interface
from interp.hooks.model.mask import DeferredMask, MaskFacts
from interp.hooks.model.repeats import is_repeating
from interp.hooks.model.row_ends import Generation
from interp.hooks.site import Site, make_site
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
    counted: Tensor | None = None
    """Bool `[b q]`, the queries of each row of the batch that count; None for all. Others are read as padding."""

    @property
    def partial(self) -> bool:
        """Whether only some of the queries or heads are read."""
        return self.queries is not None or self.heads is not None


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
_undo: list[Callable[[], None]] = []
"""Functions that undo what was changed in transformers while any seam is open."""


def _patch(config: Any) -> None:
    """Make a config name interp's functions, and register these on first use."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _patched:
        from interp.hooks.model.watched_criteria import watch_generation

        AttentionInterface.register(IMPLEMENTATION_NAME, torch.compiler.disable(_attend))
        AttentionMaskInterface.register(IMPLEMENTATION_NAME, _mask)
        _undo.extend((watch_generation(_generation_of), _watch_implementation()))
    patched = _patched.setdefault(id(config), PatchedConfig(config, config._attn_implementation))
    patched.users += 1
    config._attn_implementation = IMPLEMENTATION_NAME


def _watch_implementation() -> Callable[[], None]:
    """Let set_attn_implementation() change what a patched config falls back on; return a function that undoes it."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.set_attn_implementation

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        routed = [each for each in _patched.values() if each.config._attn_implementation == IMPLEMENTATION_NAME]
        for patched in routed:
            patched.config._attn_implementation = patched.original
        try:
            original(self, *args, **kwargs)
        finally:
            for patched in routed:
                patched.original = patched.config._attn_implementation
                patched.config._attn_implementation = IMPLEMENTATION_NAME

    def undo() -> None:
        PreTrainedModel.set_attn_implementation = original

    PreTrainedModel.set_attn_implementation = watched
    return undo


def _restore(config: Any) -> None:
    """Undo `_patch` once the last user of the config is gone, and unregister the functions after the last config.

    An implementation that the user wrote into the config since is left there.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    patched = _patched[id(config)]
    patched.users -= 1
    if not patched.users:
        if config._attn_implementation == IMPLEMENTATION_NAME:
            config._attn_implementation = patched.original
        del _patched[id(config)]
    if not _patched:
        for interface in (AttentionInterface, AttentionMaskInterface):
            # transformers has no public way to undo register()
            interface._global_mapping.pop(IMPLEMENTATION_NAME, None)
        while _undo:
            _undo.pop()()


def _generation_of(model: nn.Module) -> Generation | None:
    """The generation of a model that is tapped, or is part of one; None for another model."""
    return next((seam.generation for module in model.modules() if (seam := _owners.get(module)) is not None), None)


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
        UsageError: If the attention implementation was changed in the config while the context was open.
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
        seam.check_routing()
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
    generation: Generation = field(default_factory=Generation)
    """The generate() that runs, whose rows may end before others."""
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

    def check_routing(self) -> None:
        """Raise UsageError if attention was led past interp by a change of a config."""
        for config in self._configs:
            if (changed := config._attn_implementation) != IMPLEMENTATION_NAME:
                raise UsageError(
                    f"the attention implementation in the config was set to {changed!r} inside a context of interp, "
                    "which read and edited nothing from then on; call model.set_attn_implementation(), or set it "
                    "before the context."
                )

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
                tap.take(site, want, hooked.values(site.reading(site.call, want.counted), pattern, want))
            return out.transpose(1, 2), pattern if kw.get("output_attentions") else None

        # the original function computes the output where an engine would have to compute more than is read
        use_engine = site.call.edited or not (
            kw.get("dropout")
            or kw.get("output_attentions")
            or _ignores_softcap(module, kw)
            or site.outside is not None
            or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
            or all(want.partial for _, want in wants)
        )
        out, weights = (None, None) if use_engine else original()
        for tap, want in wants:
            # rows that have ended are computed as the model computes them, and are not read
            fused = out is None and not want.partial and site.outside is None
            call = site.call if want.heads is None else site.call.for_heads(want.heads)
            call = site.reading(call, want.counted)
            with torch.set_grad_enabled(torch.is_grad_enabled() and fused):
                engine = select(call, want.requests, self.force).engine
                result = engine(call, want.requests, want.queries, out=fused)
            if fused:
                out = result.written.transpose(1, 2)
            tap.take(site, want, result.values)
        if out is None:
            out = select(site.call, (), self.force).engine(site.call).written.transpose(1, 2)
        return out, weights

    def site(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
    ) -> Site:
        """Translate the arguments of transformers' attention function, see `make_site`."""
        softcap = None if _ignores_softcap(module, kw) else kw.get("softcap")
        return make_site(module, (query, key, value), mask, kw, softcap=softcap, generation=self.generation)


def _ignores_softcap(module: nn.Module, kw: dict[str, Any]) -> bool:
    """Whether the original function lacks the soft-cap: older versions of sdpa ignore it, newer ones fail."""
    return kw.get("softcap") is not None and _original_implementation(module.config) == "sdpa"
