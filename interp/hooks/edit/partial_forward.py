"""Forward passes of one batch that begin at a layer, so that the layers below an intervention are computed once."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from interp.errors import ModelError
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.model.scope import ModuleHook, module_hooks, replaced_functions


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Find the decoder layers by number: for each attention module, its outermost ancestor in a list of modules.

    Raises:
        ModelError: If the model does not keep its layers in a list.
    """
    model = unwrap(model)
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for layer, attention in attention_layers(model).items():
        path = paths[attention].split(".")
        inside = [i for i in range(1, len(path)) if isinstance(model.get_submodule(".".join(path[:i])), nn.ModuleList)]
        if not inside:
            raise ModelError(
                f"{type(model).__name__} does not keep its layers in a ModuleList, so no forward pass can begin at one."
            )
        found[layer] = model.get_submodule(".".join(path[: inside[0] + 1]))
    return found


@contextlib.contextmanager
def record_hidden_states(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Record the residual stream at the input of each decoder layer.

    Args:
        model: The model.

    Yields:
        dict[int, Tensor]: By layer, `[b q m]` of the last forward pass in the context.
    """
    hidden: dict[int, Tensor] = {}

    def record(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    blocks = decoder_layers(model).items()
    with module_hooks([ModuleHook(block, record(layer), with_kwargs=True) for layer, block in blocks]):
        yield hidden


@contextlib.contextmanager
def resume_from_layer(model: nn.Module, layer: int, hidden: Tensor) -> Iterator[None]:
    """Begin forward passes in the context at a layer; the layers below return their input unchanged.

    The result is exact if nothing below the layer changes. The layers below do not write to a cache; `fill_cache`
    copies their keys from another.

    Args:
        model: The model.
        layer: Number of the layer.
        hidden: `[b q m]`, the residual stream at the input of the layer.

    Yields:
        None: Forward passes begin at the layer until the context closes.
    """
    layers = decoder_layers(model)

    def return_input(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    skipped = dict.fromkeys((block for number, block in layers.items() if number < layer), return_input)
    with module_hooks([ModuleHook(layers[layer], begin, with_kwargs=True)]), replaced_functions(skipped):
        yield


def fill_cache(cache: Any, source: Any, layers: range, columns: slice, repeat: int) -> Any:
    """Append columns of another cache to a cache.

    Args:
        cache: The cache to fill.
        source: The cache to copy from.
        layers: Numbers of the layers.
        columns: The columns to copy.
        repeat: Number of copies of each row of the batch, next to each other.

    Returns:
        Cache: The filled cache.
    """
    for number in layers:
        layer = source.layers[number]
        keys, values = (x[:, :, columns].repeat_interleave(repeat, 0) for x in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache


def holds_all_keys(cache: Any) -> bool:
    """Whether each layer of a cache stores all of its keys, so that it can be filled from another."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
