"""Forwards of one batch that begin at a layer: what lies below an intervention is computed once."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from interp.errors import ModelError
from interp.hooks.model.layers import attention_layers, unwrap


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers by number: of each attention module, the ancestor that stands in a list of modules.

    Raises ModelError where a model does not keep its layers in a list.
    """
    model = unwrap(model)
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for layer, attention in attention_layers(model).items():
        path = paths[attention].split(".")
        inside = [i for i in range(1, len(path)) if isinstance(model.get_submodule(".".join(path[:i])), nn.ModuleList)]
        if not inside:
            raise ModelError(f"{type(model).__name__} keeps its layers in no list, so no forward can begin at one.")
        found[layer] = model.get_submodule(".".join(path[: inside[0] + 1]))
    return found


@contextlib.contextmanager
def record_hidden_states(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Keep the residual stream at the input of each decoder layer, [b q d], of the last forward in the context."""
    held: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            held[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    handles = [
        block.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, block in decoder_layers(model).items()
    ]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def resume_from_layer(model: nn.Module, layer: int, hidden: Tensor) -> Iterator[None]:
    """Let forwards in the context begin at a layer with `hidden` [b q d]; the layers below pass on what they are given.

    Exact where nothing below the layer is changed. Layers below leave a cache as it is: fill it from elsewhere.
    """
    known = decoder_layers(model)

    def passing(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    skipped = [block for number, block in known.items() if number < layer]
    # a wrapper of someone else's, as for weights on several devices
    own = [block.__dict__.get("forward") for block in skipped]
    handle = known[layer].register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for block in skipped:
            block.__dict__["forward"] = passing
        yield
    finally:
        handle.remove()
        for block, before in zip(skipped, own, strict=True):
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = before


def fill_cache(cache: Any, source: Any, layers: range, columns: slice, repeat: int) -> Any:
    """Add some columns of some layers of the cache `source` to `cache`, each row of the batch `repeat` times."""
    for number in layers:
        held = source.layers[number]
        keys, values = (x[:, :, columns].repeat_interleave(repeat, 0) for x in (held.keys, held.values))
        cache.update(keys, values, number)
    return cache


def holds_all_keys(cache: Any) -> bool:
    """Whether each layer of a cache holds all of its keys, so that it can be filled from another."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
