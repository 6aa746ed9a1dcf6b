"""The seam between a model and interp: a registered pair of attention and mask functions.

transformers calls a registered attention function with queries and keys after the norm, RoPE and the cache. While a tap
is open, the model uses interp's pair of functions. A layer that no tap reads or edits runs the attention function that
the model had before, with the mask that function would have received, so its output is identical to the bit.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.custom_attention import check_same, is_custom
from interp.hooks.model import attention_names
from interp.hooks.model.finite import finite_values
from interp.hooks.model.layers import (
    attention_layers,
    embeddings,
    has_encoder,
    n_recomputed_layers,
    unwrap,
    uses_interface,
)
from interp.hooks.model.mask import DeferredMask, MaskFacts
from interp.hooks.model.repeats import is_repeating, marking_repeats
from interp.hooks.model.row_ends import Generation
from interp.hooks.model.scope import ModuleHook, Scope, held, module_hooks
from interp.hooks.model.torch_state import for_attention, own_state
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


_seams: dict[nn.Module, "Seam"] = {}
_owners: dict[nn.Module, "Seam"] = {}


def running_tokens(module: nn.Module) -> Tensor | None:
    """The token ids `[b q]` of the forward pass that runs an attention module; None where they are unknown."""
    seam = _owners.get(module)
    return None if seam is None else seam.tokens.get(threading.get_ident())


def attends_to_outputs(module: nn.Module) -> bool:
    """Whether an attention module is one of a decoder next to an encoder, whose text is not the `input_ids`."""
    seam = _owners.get(module)
    return seam is not None and has_encoder(seam.model)


def _generation_of(model: nn.Module) -> Generation | None:
    """The generation of a model that is tapped here, or is part of one; None for another model."""
    found = (seam for module in model.modules() if (seam := _owners.get(module)) is not None)
    return next((seam.generation for seam in found if seam.acts_here()), None)


def _mask(**arguments: Any) -> Tensor | None:
    """The registered mask function: stores its arguments and builds no mask."""
    arguments.setdefault("attention_mask", None)
    config = arguments.get("config")
    if not attention_names.is_used_here(config):
        # the contexts may close in their thread before this forward pass ends
        return MaskFacts(attention_names.original_implementation(config), arguments).mask
    for name in ("q_offset", "kv_offset"):
        # a static cache passes its own counter, which has advanced by the time the layers read it
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = arguments[name].clone()
    return DeferredMask.of(MaskFacts(attention_names.original_implementation(config), arguments))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query `[b h q d]`, key and value `[b g k d]` -> output `[b q h d]`, weights.

    The names are those of transformers, since some models pass the mask by its name.

    The weights are those that the original attention function returns, None where it returns none.
    """
    seam = _owners.get(module)
    if seam is None:
        # this model is not tapped; it shares its config with one that is
        return attention_names.original_attention(module, query, key, value, attention_mask, kw)
    try:
        return seam.attend(module, query, key, value, attention_mask, kw)
    except BaseException:
        for each in seam.connections:
            each.scope.failed |= each.scope.acts_here()
        raise
    finally:
        seam.end_of_layer(module)


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
    scope, connected = Scope(), list[Seam]()

    def enter() -> None:
        seam = _seams.get(model)
        connected.append(Seam(model) if seam is None else seam)
        if seam is None:
            _seams[model] = connected[0]
            connected[0].open()
        connected[0].connect(tap, scope)

    def leave() -> None:
        for seam in connected:
            seam.disconnect(scope)
            if not seam.connections:
                if _seams.get(model) is seam:
                    del _seams[model]
                seam.close()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            connected[0].tokens[threading.get_ident()] = args[0]

    hooks = [ModuleHook(module, see) for module in embeddings(model)]
    with marking_repeats(model, scope), module_hooks(hooks), held(enter, leave, scope):
        yield connected[0]
        connected[0].check_routing()


@dataclass(eq=False)
class Connection:
    """An open tap: its scope, and whether it is disconnected for the moment."""

    tap: AttentionTap
    scope: Scope
    paused: bool = False


@dataclass(eq=False)
class Seam:
    """The open taps of one model, and the routing of its attention calls to them."""

    model: nn.Module
    connections: tuple["Connection", ...] = ()
    """The open taps with their scopes, in the order in which they were opened; replaced as a whole by each change."""
    points: dict[nn.Module, HookPoints] = field(default_factory=dict)
    """The hook points of each attention module, while a bridge is open."""
    generations: dict[int, Generation] = field(default_factory=dict)
    """By thread, the generate() that runs, whose rows may end before others."""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """By thread, Int `[b q]`: the token ids of the forward pass that runs."""
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
            attention_names.patch(config, self, torch.compiler.disable(_attend), _mask, _generation_of)

    def check_routing(self) -> None:
        """Raise UsageError if attention was led past interp by a change of a config."""
        for config in self._configs:
            if (changed := config._attn_implementation) != attention_names.IMPLEMENTATION_NAME:
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
            attention_names.restore(config, self)
        self._layers = self._configs = ()

    def connect(self, tap: AttentionTap, scope: Scope) -> None:
        """Add a tap."""
        self.connections = (*self.connections, Connection(tap, scope))

    def disconnect(self, scope: Scope) -> None:
        """Remove the tap of a scope."""
        self.connections = tuple(each for each in self.connections if each.scope is not scope)

    def acts_here(self) -> bool:
        """Whether some tap acts on calls of the running thread and task."""
        return any(each.scope.acts_here() for each in self.connections)

    @property
    def generation(self) -> Generation:
        """The generate() of the running thread."""
        return self.generations.setdefault(threading.get_ident(), Generation())

    def end_of_layer(self, module: nn.Module) -> None:
        """Forget the tokens of a forward pass after its last layer."""
        if self._layers[-1:] == (module,):
            self.tokens.pop(threading.get_ident(), None)

    def scope_of(self, tap: AttentionTap) -> Scope:
        """The scope of an open tap."""
        return next(each.scope for each in self.connections if each.tap is tap)

    def acting_at(self, layer: int) -> "list[Connection]":
        """The connections that read or edit a layer in calls of the running thread and task."""
        acting = (each for each in self.connections if not each.paused and each.scope.acts_here())
        found = [each for each in acting if each.tap.at(layer)]
        for each in found:
            each.scope.reached.add(layer)
        return found

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
        acting = self.acting_at(getattr(module, "layer_idx", -1))
        taps = [each.tap for each in acting]

        # the innermost capture that names an engine decides for the call
        engine_name = next((name for tap in reversed(taps) if (name := getattr(tap, "engine", None))), None)

        def original() -> tuple[Tensor, Tensor | None]:
            return attention_names.original_attention(module, query, key, value, mask, kw)

        points = self.points.get(module) if self.acts_here() else None
        hooked = points if points is not None and points.active else None
        if not taps and hooked is None:
            return original()
        operands = for_attention(query, key, value)
        with own_state():
            site = given = self.site(module, *operands, mask, kw)
            for each in acting:
                before, site = site, replace(site, call=each.tap.edit(site))
                each.scope.edited |= site.call is not before.call
            readers = () if is_repeating() else taps
            wants = [(tap, want) for tap in readers if (want := tap.want(site)) is not None]
        if not wants and not site.call.edited and hooked is None:
            return original()
        if kw.get("dropout") and (site.call.edited or hooked is not None):
            raise UsageError(
                "the model is in training mode with attention dropout, which edits do not support; call model.eval()."
            )
        if is_custom(module.config):
            computed = original()[0]
            with own_state(), torch.no_grad():
                check_same(module, given, computed)

        if hooked is not None:
            out, pattern = hooked.attend(site.call)
            for tap, want in wants:
                values = hooked.values(site.reading(site.call, want.counted), pattern, want)
                tap.take(site, want, finite_values(site, values))
            # a bridge runs every layer like this one, so that weights are returned by all of them
            returned = attention_names.returns_weights(module, kw, if_unknown=True)
            return out.transpose(1, 2), pattern if returned else None

        # the original function computes the output where an engine would have to compute more than is read
        use_engine = site.call.edited or not (
            kw.get("dropout")
            or attention_names.returns_weights(module, kw, if_unknown=True)
            or attention_names.ignores_softcap(module, kw)
            or site.outside is not None
            or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
            or all(want.partial for _, want in wants)
        )
        out, weights = (None, None) if use_engine else original()
        if site.call.edited and attention_names.returns_weights(module, kw):
            weights = attention_names.weights_of(site.call, key.shape[2])
        with own_state():
            for tap, want in wants:
                # rows that have ended are computed as the model computes them, and are not read; a layer that is
                # computed again reads nothing, and has to store the same tensors for the backward pass
                fused = out is None and not want.partial and site.outside is None
                fused = fused and not attention_names.needs_gradient(site.call)
                call = site.call if want.heads is None else site.call.for_heads(want.heads)
                call = site.reading(call, want.counted)
                with torch.set_grad_enabled(torch.is_grad_enabled() and fused):
                    engine = select(call, want.requests, engine_name).engine
                    result = engine(call, want.requests, want.queries, out=fused)
                if fused:
                    out = result.written.transpose(1, 2)
                tap.take(site, want, finite_values(site, result.values))
            if out is None:
                out = select(site.call, (), engine_name).engine(site.call).written.transpose(1, 2)
        return out, weights

    def site(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
    ) -> Site:
        """Translate the arguments of transformers' attention function, see `make_site`."""
        softcap = None if attention_names.ignores_softcap(module, kw) else kw.get("softcap")
        return make_site(module, (query, key, value), mask, kw, softcap=softcap, generation=self.generation)
