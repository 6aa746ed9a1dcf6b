"""The modules of a model that the seam and the hooks need: self-attention by layer, and its output projection."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import ModelError

PROJECTION_NAMES = ("o_proj", "c_proj", "dense", "out_proj", "wo")
"""names of the output projection in the families of transformers"""
DELEGATING_FORWARDS = ("DelegatingAttention.forward", "AttentionBridge.forward")
"""attention of a TransformerLens bridge that calls the model's own module: ours, and its simplest one"""


def unwrap(model: Any) -> Any:
    """The transformers model itself, also where a TransformerLens bridge over it was given."""
    inner = getattr(model, "original_model", None)
    return inner if isinstance(inner, nn.Module) else model


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module inside of a component of a TransformerLens bridge, None for any other module."""
    return module._modules.get("_original_component")


def n_recomputed_layers(model: Any) -> int:
    """How many attention layers a TransformerLens bridge over the model computes by its own code."""
    layers = set(attention_layers(model).values())
    return sum(
        wrapped_module(module) in layers and type(module).forward.__qualname__ not in DELEGATING_FORWARDS
        for module in unwrap(model).modules()
    )


def uses_interface(model: Any, layers: Iterable[nn.Module]) -> bool:
    """Whether attention goes through transformers' AttentionInterface, by the model's word or its code."""
    return getattr(unwrap(model), "_supports_attention_backend", False) or any(
        hasattr(sys.modules.get(type(layer).__module__), "ALL_ATTENTION_FUNCTIONS") for layer in layers
    )


def context_length(model: Any) -> int | None:
    """Tokens that fit into the model's context; None where its config does not say."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules of a causal LM by layer: those that have a layer_idx and an output projection.

    Raises ModelError where there is none.
    """
    found: dict[int, nn.Module] = {}
    for module in unwrap(model).modules():
        if wrapped_module(module) is not None:
            # a component of TransformerLens answers for the module inside of it, which comes next
            continue
        index = getattr(module, "layer_idx", None)
        # hybrid models number their convolutions too, some of which have an output projection
        attends = "attention" in type(module).__name__.lower() or hasattr(module, "q_proj")
        crosses = getattr(module, "is_cross_attention", False)
        if isinstance(index, int) and attends and not crosses and projection_name(module):
            found.setdefault(index, module)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no attention module with a layer_idx and an output projection "
            f"({', '.join(PROJECTION_NAMES)}): interp reads decoder models of transformers."
        )
    return dict(sorted(found.items()))


def check_eval(model: Any) -> None:
    """Raise ModelError for a model in training mode, whose dropout makes numbers random."""
    if any(module.training for module in unwrap(model).modules()):
        raise ModelError("the model is in training mode, where dropout makes two runs differ: call model.eval() first.")


def projection_name(module: nn.Module) -> str | None:
    """The name of the output projection of an attention module."""
    return next((name for name in PROJECTION_NAMES if isinstance(getattr(module, name, None), nn.Module)), None)


@contextlib.contextmanager
def projection_inputs(
    model: nn.Module, layers: Iterable[int], see: Callable[[int, Tensor], Tensor | None], *, inside: bool = False
) -> Iterator[None]:
    """Call see(layer, x) with the input of each output projection, x [b q h*d]; what it returns takes x's place.

    Linear and Conv1D alike: the input is one tensor either way. The hooks go when the context closes. Under a
    TransformerLens bridge the call comes before hook_z, which sees the change; inside=True: after it.
    """
    modules = attention_layers(model)
    handles = []
    try:
        for layer in layers:
            name = projection_name(modules[layer])
            if name is not None:
                projection = getattr(modules[layer], name)
                while inside and (inner := wrapped_module(projection)) is not None:
                    projection = inner
                # what changes x comes before what reads it, in whatever order the contexts were opened
                handles.append(projection.register_forward_pre_hook(_hook(layer, see), prepend=not inside))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layer: int, see: Callable[[int, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = see(layer, args[0])
        return None if x is None else (x, *args[1:])

    return torch.compiler.disable(hook)
