"""The seam: one model's attention and mask functions, routed through us for as long as something reads or edits.

transformers calls a registered pair of functions with q and k after norm, RoPE and cache. Ours passes every layer that
nobody taps to the function the model used before, with the mask that it would have made: idle is equal to the bit.
"""

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interp.hooks.modules import attention_layers, plain, recomputed, uses_interface
from interp.kernels.contract import Call, Request
from interp.kernels.errors import ModelError, UsageError
from interp.kernels.select import select


@dataclass(frozen=True, eq=False)
class Want:
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


class Points(Protocol):
    """Hook points inside of one attention call, which see the whole pattern: those of a TransformerLens bridge."""

    @property
    def live(self) -> bool:
        """Whether anybody listens."""
        ...

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out [b h q d], pattern [b h q k]) after the hooks."""
        ...

    def values(self, call: Call, pattern: Tensor, want: Want) -> tuple[Any, ...]:
        """What a tap asked for, from the pattern after the hooks."""
        ...


class Tap(Protocol):
    """Something that reads or edits attention. A tap that wants nothing of a call costs nothing."""

    def at(self, layer: int) -> bool:
        """Whether the layer concerns it at all."""
        ...

    def edit(self, site: Site) -> Call:
        """The call with its biases, or the call as it is."""
        ...

    def want(self, site: Site) -> Want | None: ...

    def take(self, site: Site, want: Want, values: tuple[Any, ...]) -> None: ...


@dataclass(eq=False)
class Facts:
    """What a model said about its mask, and the mask it would have had, made when somebody needs it."""

    own: str | None
    said: dict[str, Any]

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask of the model's own attention function."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as makers

        return makers[self.own](**self.said) if self.own in makers else None

    @cached_property
    def start(self) -> tuple[int, int, int]:
        """Column of the first query, column of the first key, and how many keys are live."""
        q_start, k_start = int(self.said.get("q_offset", 0)), int(self.said.get("kv_offset", 0))
        return q_start, k_start, min(q_start + self.said["q_length"] - k_start, self.said["kv_length"])

    @cached_property
    def padding(self) -> Tensor | None:
        """Bool [b n] over all columns so far, None where nothing is padded."""
        mask = self.said.get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    @cached_property
    def first(self) -> Tensor:
        """Int [b] column of the first real token."""
        if self.padding is None:
            return torch.zeros(self.said["batch_size"], dtype=torch.int64, device=self.said.get("device"))
        return self.padding.to(torch.int8).argmax(1)

    @cached_property
    def shape(self) -> tuple[int | None, bool]:
        """The window, and whether causal + window + padding say all there is to the mask."""
        from transformers import masking_utils as masks

        parts = [self.said.get("mask_function", masks.causal_mask_function)]
        if parts[0].__code__ is masks.and_masks(masks.causal_mask_function).__code__:
            parts = list(parts[0].__closure__[0].cell_contents)
        window, causal = None, False
        overlay = masks.sliding_window_overlay(1)
        for part in parts:
            if part is masks.causal_mask_function:
                causal = True
            elif part.__code__ is overlay.__code__ and window is None:
                window = int(part.__closure__[0].cell_contents)
            else:
                return None, False
        return window, causal

    @cached_property
    def dense(self) -> Tensor | None:
        """Bool [b 1 q k]: the whole mask, for packed sequences, chunked attention and other masks of a model's own."""
        from transformers.masking_utils import sdpa_mask

        said = dict(self.said, allow_is_causal_skip=False)
        return None if self.shape[1] else sdpa_mask(**said)


class Mask(Tensor):
    """Stands for a mask on its way from the model to its layers: has its shape, no memory, and the facts."""

    facts: Facts

    @classmethod
    def of(cls, facts: Facts) -> "Mask":
        said = facts.said
        shape = (said["batch_size"], 1, said["q_length"], said["kv_length"])
        made = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=said.get("device")).expand(shape).as_subclass(cls)
        made.facts = facts
        return made

    def known(self, module: nn.Module) -> Facts:
        """The facts, or ModelError where something was computed from the mask on its way to `module`."""
        if not hasattr(self, "facts"):
            raise ModelError(
                f"{type(module).__name__} reshapes its attention mask, so that interp cannot tell padding from text: "
                "use a model that passes its mask on as it was made."
            )
        return self.facts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = args[0] if args else None
        if func is Tensor.contiguous and isinstance(source, Mask):
            # generate() asks this of the masks of a static cache; it would fill q x k
            return source
        result = super().__torch_function__(func, types, args, kwargs or {})
        # a move to another device keeps what the mask stands for; a slice or a sum does not
        if func is Tensor.to and isinstance(source, Mask) and isinstance(result, Mask) and hasattr(source, "facts"):
            result.facts = source.facts
        return result


_numbers = itertools.count()
_seams: "weakref.WeakKeyDictionary[nn.Module, Seam]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def tapping(model: nn.Module, tap: Tap) -> Iterator["Seam"]:
    """Let `tap` see the attention calls of `model` while the context is open.

    The first tap registers our pair of functions, the last one to leave takes it away and restores what was there.
    Contexts nest, and models do not see each other's. Raises ModelError where no attention layer is found.
    """
    model = plain(model)
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
    taps: list[Tap] = field(default_factory=list)
    force: str | None = None
    """engine that serves every call; None to choose"""
    points: dict[nn.Module, Points] = field(default_factory=dict)
    """by attention module, where a bridge is open"""
    _before: list[tuple[Any, str | None]] = field(default_factory=list)
    _name: str = ""

    def open(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        layers = attention_layers(self.model)
        if foreign := recomputed(self.model):
            raise ModelError(
                f"this TransformerBridge computes the attention of {foreign} of {len(layers)} layers by itself, where "
                "interp sees nothing: give the transformers model, or a bridge made by interp.bridge(model)."
            )
        if not uses_interface(self.model, layers.values()):
            raise ModelError(
                f"{type(self.model).__name__} computes attention in code of its own instead of transformers' "
                "AttentionInterface, so interp cannot read or edit it: only ablate(kind='zero') works here."
            )
        # a name with "flash" or "/" in it would be taken for a kernel to fetch
        self._name = f"interp-{next(_numbers)}"
        configs = {id(config): config for m in layers.values() if (config := getattr(m, "config", None)) is not None}
        if not configs:
            raise ModelError(
                f"the attention modules of {type(self.model).__name__} carry no config, so their attention function "
                "cannot be chosen: use a model of transformers 5 that supports AttentionInterface."
            )
        AttentionInterface.register(self._name, torch.compiler.disable(self.attend))
        AttentionMaskInterface.register(self._name, self.mask)
        for config in configs.values():
            self._before.append((config, config._attn_implementation))
            config._attn_implementation = self._name

    def close(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        for config, name in self._before:
            config._attn_implementation = name
        self._before.clear()
        for interface in (AttentionInterface, AttentionMaskInterface):
            # there is no public way back from register
            interface._global_mapping.pop(self._name, None)

    @property
    def own(self) -> str | None:
        """The attention implementation that the model came with."""
        return self._before[0][1] if self._before else None

    def mask(self, **said: Any) -> Mask:
        """Registered as the mask function: notes what it is told, makes nothing."""
        said.setdefault("attention_mask", None)
        for name in ("q_offset", "kv_offset"):
            # a static cache hands its own counter, which moves on before the layers ask
            if isinstance(said.get(name), Tensor):
                said[name] = said[name].clone()
        return Mask.of(Facts(self.own, said))

    def _own_function(self, module: nn.Module) -> Callable[..., Any]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.own is not None and self.own in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[self.own]
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise ModelError(
                f"{type(module).__name__} has no eager attention function to fall back to: "
                "load the model with attn_implementation='sdpa'."
            )
        return eager

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Registered as the attention function: [b h q d], [b g k d] -> ([b q h d], weights of the model's own)."""
        taps = [tap for tap in self.taps if tap.at(getattr(module, "layer_idx", -1))]

        def own() -> tuple[Tensor, Tensor | None]:
            whole = mask.known(module).mask if isinstance(mask, Mask) else mask
            return self._own_function(module)(module, query, key, value, whole, **kw)

        points = self.points.get(module)
        hooked = points if points is not None and points.live else None
        if not taps and hooked is None:
            return own()
        site = self.site(module, query, key, value, mask, kw)
        for tap in taps:
            site = replace(site, call=tap.edit(site))
        wants = [(tap, want) for tap in taps if (want := tap.want(site)) is not None]
        if not wants and not site.call.edited and hooked is None:
            return own()
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
            or (torch.is_grad_enabled() and query.requires_grad)
            or all(want.partial for _, want in wants)
        )
        out, weights = (None, None) if ours else own()
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
            "softcap": kw.get("softcap"),
            "sinks": kw.get("s_aux"),
            "causal": causal,
            "q_start": key.shape[2] - n,
        }
        first = torch.zeros(b, dtype=torch.int64, device=query.device)
        if isinstance(mask, Mask):
            facts = mask.known(module)
            q_start, k_start, live = facts.start
            key, value = key[:, :, :live], value[:, :, :live]
            first = facts.first.to(query.device)
            call |= {"q_start": q_start, "k_start": k_start, "window": facts.shape[0]}
            if facts.dense is not None:
                call |= {"causal": False, "mask": facts.dense[..., :live].to(query.device)}
            if facts.padding is not None:
                padding = facts.padding.to(query.device)
                call |= {
                    "live": padding[:, k_start : k_start + live],
                    "row_live": padding[:, q_start : q_start + n],
                }
        elif mask is not None:
            # a mask of four axes that the user made: it says all there is
            call |= {"causal": False, "mask": mask[..., : key.shape[2]]}
        return Site(int(layer), module, first, Call(query, key, value, **call))
