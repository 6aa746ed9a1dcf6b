"""Forward passes of a measure that are recorded once and then begin at the first layer that an ablation changes."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError
from interp.hooks.edit.partial_forward import decoder_layers, holds_all_keys, resume_from_layer
from interp.hooks.model.heads import HeadSet
from interp.hooks.model.layers import unwrap
from interp.hooks.model.scope import ModuleHook, module_hooks

MAX_RECORDED_BYTES = 1 << 30
"""memory for recorded hidden states, keys and values; later forward passes are not recorded"""
Inputs = tuple[tuple[str, tuple[int, ...], bytes], ...]


@dataclass(eq=False)
class _Pass:
    """A forward pass of the unmodified model that began without a cache."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    cache: Any = None


class SharedForwards:
    """Forward passes of the unmodified model, from which those under ablations begin.

    Passes are found by their inputs. A pass that was not recorded, such as a step of decoding, runs whole.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        first_layers: Layers at which passes may begin.
    """

    def __init__(self, model: nn.Module, first_layers: Collection[int]) -> None:
        self.network: Any = unwrap(model)
        # a loss may call the whole model again on a finished body, which is no pass through its layers
        self.body: nn.Module = self.network.base_model
        self.first_layers = sorted({layer for layer in first_layers if layer > 0})
        self._passes: dict[Inputs, _Pass] = {}
        self._bytes = 0
        try:
            self._layers = decoder_layers(model)
        except ModelError:
            self._layers, self.first_layers = {}, []

    @classmethod
    def of(cls, model: nn.Module, sets: Collection[HeadSet]) -> "SharedForwards":
        """For the first layers of the sets; sets matched by layer to one of them mostly share its first layer.

        Args:
            model: A transformers causal language model, or a TransformerBridge over one.
            sets: The tested head sets.
        """
        return cls(model, {min(head.layer for head in heads) for heads in sets if len(heads)})

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the passes in the context, on the unmodified model."""
        open_pass: list[tuple[Inputs, _Pass]] = []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            open_pass.clear()
            if (key := _key(args, kwargs)) is not None and self._bytes < MAX_RECORDED_BYTES:
                open_pass.append((key, _Pass()))

        def layer_input(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if open_pass:
                    open_pass[0][1].hidden[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

            return hook

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not open_pass:
                return
            key, made = open_pass.pop()
            if made.hidden.keys() != set(self.first_layers):
                return
            cache = kwargs.get("past_key_values")
            cache = getattr(output, "past_key_values", None) if cache is None else cache
            if cache is not None:
                if not holds_all_keys(cache):
                    return
                made.cache = [(layer.keys, layer.values) for layer in cache.layers[: self.first_layers[-1]]]
            held = [*made.hidden.values(), *(x for pair in made.cache or () for x in pair)]
            self._bytes += sum(tensor.nbytes for tensor in held)
            self._passes[key] = made

        if not self.first_layers:
            yield
            return
        hooks = [
            ModuleHook(self.body, begin, with_kwargs=True),
            ModuleHook(self.body, end, after=True, with_kwargs=True),
            *(ModuleHook(self._layers[layer], layer_input(layer), with_kwargs=True) for layer in self.first_layers),
        ]
        with module_hooks(hooks):
            yield

    @contextlib.contextmanager
    def resume(self, heads: HeadSet) -> Iterator[None]:
        """Begin recorded passes at the first layer of a head set, for interventions on these heads.

        Args:
            heads: The heads; passes run whole where their first layer is none of `first_layers`.
        """
        first = min((head.layer for head in heads), default=0)
        if first not in self.first_layers:
            yield
            return
        inside = contextlib.ExitStack()
        found: list[_Pass] = []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            key = _key(args, kwargs)
            made = None if key is None else self._passes.get(key)
            if made is not None and first in made.hidden:
                found.append(made)
                inside.enter_context(resume_from_layer(self.network, first, made.hidden[first]))

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found:
                return
            made = found.pop()
            inside.close()
            cache = kwargs.get("past_key_values")
            cache = getattr(output, "past_key_values", None) if cache is None else cache
            if cache is not None and made.cache is not None:
                for layer, (keys, values) in enumerate(made.cache[:first]):
                    cache.update(keys, values, layer)

        hooks = [
            ModuleHook(self.body, begin, with_kwargs=True),
            ModuleHook(self.body, end, after=True, with_kwargs=True, always_call=True),
        ]
        with inside, module_hooks(hooks):
            yield


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
    """The inputs of a forward pass as a key; None where it reads a cache, or something else than tensors of numbers."""
    cache = kwargs.get("past_key_values")
    if args or (cache is not None and cache.get_seq_length()) or kwargs.get("inputs_embeds") is not None:
        return None
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    cached = ("cached", (int(cache is not None or bool(kwargs.get("use_cache"))),), b"")
    given = [
        (name, tuple(value.shape), value.detach().to("cpu", torch.float64).numpy().tobytes())
        for name, value in sorted(tensors.items())
    ]
    return (cached, *given)
