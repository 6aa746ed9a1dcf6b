"""The seam: one model's attention and mask functions, routed through us for as long as something reads or edits.

transformers calls a registered pair of functions with q and k after norm, RoPE and cache. Ours passes every layer that
nobody taps to the function the model used before, with the mask that it would have made: idle is equal to the bit.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.layers import attention_layers, n_recomputed_layers, unwrap, uses_interface
from interp.hooks.model.mask import DeferredMask, MaskFacts
from interp.kernels.contract import Call, Request
from interp.kernels.select import select


@dataclass(frozen=True, eq=False)
class ReadRequest:
    """What a tap asks of one attention call."""

    requests: tuple[Request, ...]
    queries: Tensor | None = None
    """Int [r] indices among the queries; None for all"""
    heads: Tensor | None = None
    """Int [n] query heads; None for all"""

    @property
    def partial(self) -> bool:
        return self.queries is not None or self.heads is not None


@dataclass(frozen=True, eq=False)
class Site:
    """Where an attention call happens."""

    layer: int
    module: nn.Module
    first: Tensor
    """Int [b] column of the first real token of each row of the batch"""
    call: Call


class HookPoints(Protocol):
    """Hook points inside of one attention call, which see the whole pattern: those of a TransformerLens bridge."""

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        ...

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out [b h q d], pattern [b h q k]) after the hooks."""
        ...

    def values(self, call: Call, pattern: Tensor, want: ReadRequest) -> tuple[Any, ...]:
        """What a tap asked for, from the pattern after the hooks."""
        ...


class AttentionTap(Protocol):
    """Something that reads or edits attention. A tap that wants nothing of a call costs nothing.

    A class that derives from it says only what it does: by itself it reads nothing and leaves attention as it is.
    """

    def at(self, layer: int) -> bool:
        """Whether the layer concerns it at all."""
        return True

    def edit(self, site: Site) -> Call:
        """The call with its biases, or the call as it is."""
        return site.call

    def want(self, site: Site) -> ReadRequest | None:
        """What it asks for of the call, or nothing."""
        return None

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        """What it asked for."""


@dataclass(eq=False)
class PatchedConfig:
    """A config whose attention implementation is ours for now; models may share one."""

    config: Any
    original: str | None
    users: int = 0


# a name with "flash" or "/" in it would be taken for a kernel to fetch
IMPLEMENTATION_NAME = "interp"
_seams: dict[nn.Module, "Seam"] = {}
_owners: dict[nn.Module, "Seam"] = {}
_patched: dict[int, PatchedConfig] = {}


def _patch(config: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _patched:
        AttentionInterface.register(IMPLEMENTATION_NAME, torch.compiler.disable(_attend))
        AttentionMaskInterface.register(IMPLEMENTATION_NAME, _mask)
    patched = _patched.setdefault(id(config), PatchedConfig(config, config._attn_implementation))
    patched.users += 1
    config._attn_implementation = IMPLEMENTATION_NAME


def _restore(config: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    patched = _patched[id(config)]
    patched.users -= 1
    if not patched.users:
        config._attn_implementation = patched.original
        del _patched[id(config)]
    if not _patched:
        for interface in (AttentionInterface, AttentionMaskInterface):
            # there is no public way back from register
            interface._global_mapping.pop(IMPLEMENTATION_NAME, None)


def _original_implementation(config: Any) -> str | None:
    patched = _patched.get(id(config))
    return None if patched is None else patched.original


def _mask(**arguments: Any) -> DeferredMask:
    """Registered as the mask function: notes what it is told, makes nothing."""
    arguments.setdefault("attention_mask", None)
    for name in ("q_offset", "kv_offset"):
        # a static cache hands its own counter, which moves on before the layers ask
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = arguments[name].clone()
    return DeferredMask.of(MaskFacts(_original_implementation(arguments.get("config")), arguments))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    """Registered as the attention function: [b h q d], [b g k d] -> ([b q h d], weights of the model's own)."""
    seam = _owners.get(module)
    if seam is None:
        # a model that shares its config with one that is read
        return _original_attention(module, query, key, value, mask, kw)
    return seam.attend(module, query, key, value, mask, kw)


def _original_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The attention function that the model came with, on the mask that it would have had."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get(_original_implementation(config))
    if function is None:
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(
            f"{type(module).__name__} has no eager attention function to fall back to: "
            "load the model with attn_implementation='sdpa'."
        )
    whole = mask.facts_for(module).mask if isinstance(mask, DeferredMask) else mask
    return function(module, query, key, value, whole, **kw)


@contextlib.contextmanager
def tapping(model: nn.Module, tap: AttentionTap) -> Iterator["Seam"]:
    """Let `tap` see the attention calls of `model` while the context is open.

    The first tap registers our pair of functions, the last one to leave takes it away and restores what was there.
    Contexts nest, and models do not see each other's. Raises ModelError where no attention layer is found.
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
    """The pair of functions of one model, while it is registered."""

    model: nn.Module
    taps: list[AttentionTap] = field(default_factory=list)
    force: str | None = None
    """engine that serves every call; None to choose"""
    points: dict[nn.Module, HookPoints] = field(default_factory=dict)
    """by attention module, where a bridge is open"""
    _layers: tuple[nn.Module, ...] = ()
    _configs: tuple[Any, ...] = ()

    def open(self) -> None:
        layers = attention_layers(self.model)
        if foreign := n_recomputed_layers(self.model):
            raise ModelError(
                f"this TransformerBridge computes the attention of {foreign} of {len(layers)} layers by itself, where "
                "interp sees nothing: give the transformers model, or a bridge made by interp.bridge(model)."
            )
        if not uses_interface(self.model, layers.values()):
            raise ModelError(
                f"{type(self.model).__name__} computes attention in code of its own instead of transformers' "
                "AttentionInterface, so interp cannot read or edit it: only ablate(kind='zero') works here."
            )
        configs = {id(config): config for m in layers.values() if (config := getattr(m, "config", None)) is not None}
        if not configs:
            raise ModelError(
                f"the attention modules of {type(self.model).__name__} carry no config, so their attention function "
                "cannot be chosen: use a model of transformers 5 that supports AttentionInterface."
            )
        self._layers, self._configs = tuple(layers.values()), tuple(configs.values())
        _owners.update(dict.fromkeys(self._layers, self))
        for config in self._configs:
            _patch(config)

    def close(self) -> None:
        for module in self._layers:
            _owners.pop(module, None)
        for config in self._configs:
            _restore(config)
        self._layers = self._configs = ()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call of the model, read and edited by the taps: ([b q h d], weights)."""
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
        wants = [(tap, want) for tap in taps if (want := tap.want(site)) is not None]
        if not wants and not site.call.edited and hooked is None:
            return original()
        if kw.get("dropout") and (site.call.edited or hooked is not None):
            raise UsageError(
                "the model is in training mode with attention dropout, which an edit cannot keep: call model.eval()."
            )

        if hooked is not None:
            out, pattern = hooked.attend(site.call)
            for tap, want in wants:
                tap.take(site, want, hooked.values(site.call, pattern, want))
            return out.transpose(1, 2), pattern if kw.get("output_attentions") else None

        # the model's own function gives the output where ours would have to compute more than is read
        ours = site.call.edited or not (
            kw.get("dropout")
            or kw.get("output_attentions")
            or _ignores_softcap(module, kw)
            or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
            or all(want.partial for _, want in wants)
        )
        out, weights = (None, None) if ours else original()
        for tap, want in wants:
            fused = out is None and not want.partial
            call = site.call if want.heads is None else site.call.for_heads(want.heads)
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
        """The attention call in our own words."""
        for name in ("position_bias", "cache"):
            if kw.get(name) is not None:
                raise ModelError(
                    f"{type(module).__name__} passes {name!r} to its attention function, which interp cannot read: "
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
            # a mask of four axes that the user made: it says all there is, but not where a static cache ends
            if mask.shape[-1] < key.shape[2] or not _sees_last_key(mask, key.shape[2]):
                raise ModelError(
                    f"a mask of four axes, {list(mask.shape)}, leaves the last of {key.shape[2]} keys out for all "
                    "queries, as with a static cache: give attention_mask of two axes, or use a dynamic cache."
                )
            call |= {"causal": False, "mask": mask[..., : key.shape[2]]}
        return Site(int(layer), module, first, Call(query, key, value, **call))


def _ignores_softcap(module: nn.Module, kw: dict[str, Any]) -> bool:
    """Whether the model's own function knows no soft-cap: older versions of sdpa leave it out, newer ones refuse."""
    return kw.get("softcap") is not None and _original_implementation(module.config) == "sdpa"


def _sees_last_key(mask: Tensor, keys: int) -> bool:
    """Whether any query sees the last key."""
    last = mask[..., keys - 1]
    return bool((last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min).any())
