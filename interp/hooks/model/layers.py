"""The modules of a model that hooks attach to: self-attention by layer, and its output projection."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from interp.errors import ModelError
from interp.hooks.model.repeats import marking_repeats
from interp.hooks.model.scope import ModuleHook, Scope, module_hooks
from interp.hooks.model.torch_state import own_state

PROJECTION_NAMES = ("o_proj", "c_proj", "dense", "out_proj", "wo")
"""Names of the output projection in the model families of transformers."""
DELEGATING_FORWARDS = ("DelegatingAttention.forward", "AttentionBridge.forward")
"""Attention components of a TransformerLens bridge that run the module of the model: interp's, and TransformerLens'
simplest one."""


def unwrap(model: Any) -> Any:
    """Return the transformers model itself, given the model, a compiled one, a model of peft, or a bridge over it."""
    while isinstance(model, nn.Module) and isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    inner = getattr(model, "original_model", None)
    model = inner if isinstance(inner, nn.Module) else model
    # adapters of peft are inside of the base model; virtual tokens are outside, and need the model of peft
    base = None if hasattr(model, "prompt_encoder") else getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a component of a TransformerLens bridge; None for any other module."""
    return module._modules.get("_original_component")


def n_recomputed_layers(model: Any) -> int:
    """Count the attention layers that a TransformerLens bridge over the model computes in its own code."""
    layers = set(attention_layers(model).values())
    return sum(
        wrapped_module(module) in layers and type(module).forward.__qualname__ not in DELEGATING_FORWARDS
        for module in unwrap(model).modules()
    )


def uses_interface(model: Any, layers: Iterable[nn.Module]) -> bool:
    """Whether the model declares support for transformers' AttentionInterface, or the code of a layer uses it."""
    return getattr(unwrap(model), "_supports_attention_backend", False) or any(
        hasattr(sys.modules.get(type(layer).__module__), "ALL_ATTENTION_FUNCTIONS") for layer in layers
    )


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Find the self-attention modules of a causal language model.

    An attention module has a `layer_idx` and an output projection. Of a model with an encoder and a decoder, these are
    the modules of the decoder, whose token ids are then the text: give those as prompts.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.

    Returns:
        Layer index to module, in order of the layers.

    Raises:
        ModelError: If the model has no such module, has an encoder and does not name its decoder, or is split by tensor
            parallelism, so that each process has other heads.

    Examples:
        >>> from interp.hooks.model.layers import attention_layers
        >>> list(attention_layers(model))
        [0, 1]
    """
    found: dict[int, nn.Module] = {}
    for module in text_model(model).modules():
        if wrapped_module(module) is not None:
            # a component of TransformerLens has the attributes of the module inside it, which comes later
            continue
        index = getattr(module, "layer_idx", None)
        # hybrid models number their convolutions as well, and some of these have an output projection
        attends = "attention" in type(module).__name__.lower() or hasattr(module, "q_proj")
        crosses = getattr(module, "is_cross_attention", False)
        if isinstance(index, int) and attends and not crosses and projection_name(module):
            found.setdefault(index, module)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no attention module with a layer_idx and an output projection "
            f"({', '.join(PROJECTION_NAMES)}); give a decoder model of transformers."
        )
    _check_whole(unwrap(model), found)
    return dict(sorted(found.items()))


def _check_whole(model: nn.Module, layers: dict[int, nn.Module]) -> None:
    """Raise ModelError where this process computes a part of the heads of each layer."""
    parts = getattr(model, "_tp_size", None) or 1
    for layer in layers.values() if parts == 1 else ():
        weight = getattr(getattr(layer, projection_name(layer) or "", None), "weight", None)
        # a weight that is split along its inputs takes the heads of one process; FSDP splits along outputs
        if isinstance(weight, Tensor) and hasattr(weight, "placements"):
            split: Any = weight
            sizes = zip(split.placements, split.device_mesh.shape, strict=True)
            parts = max(parts, *(size if place.is_shard(1) else 1 for place, size in sizes))
    if parts > 1:
        raise ModelError(
            f"{type(model).__name__} is split over {parts} processes by tensor parallelism, where each computes other "
            "heads of a layer under the same numbers; load it without tp_plan, whole or over several GPUs with "
            "device_map."
        )


def has_encoder(model: Any) -> bool:
    """Whether a model has an encoder, so that the text which its decoder attends to is not that of its `input_ids`."""
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


def text_model(model: Any) -> nn.Module:
    """The part of a model that attends to its own text: the decoder where there is an encoder, or else the model.

    Raises:
        ModelError: If the model has an encoder and does not name its decoder.
    """
    whole = unwrap(model)
    if not has_encoder(whole):
        return whole
    find = getattr(whole, "get_decoder", None)
    decoder = find() if callable(find) else None
    if not isinstance(decoder, nn.Module) or decoder is whole:
        raise ModelError(
            f"{type(whole).__name__} has an encoder, and its get_decoder() does not return the decoder, so "
            "self-attention of the two cannot be distinguished; pass a decoder-only model of transformers."
        )
    return decoder


def embeddings(model: Any) -> list[nn.Module]:
    """The module that embeds the ids of the text, in a list; an empty list where a model does not name it."""
    try:
        found: Any = text_model(model)
        found = found.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return [found] if isinstance(found, nn.Module) else []


def check_eval(model: Any) -> None:
    """Raise ModelError for a model in training mode, because dropout makes its results random."""
    if any(module.training for module in unwrap(model).modules()):
        raise ModelError("the model is in training mode, where dropout makes two runs differ; call model.eval() first.")


def projection_name(module: nn.Module) -> str | None:
    """Return the name of the output projection of an attention module; None where it has none."""
    return next((name for name in PROJECTION_NAMES if isinstance(getattr(module, name, None), nn.Module)), None)


@contextlib.contextmanager
def projection_inputs(
    model: nn.Module, layers: Iterable[int], see: Callable[[int, Tensor], Tensor | None], *, inside: bool = False
) -> Iterator[Scope]:
    """Observe or replace the input of each output projection while the context is open.

    The input x `[b q h*d]` is a single tensor for Linear and Conv1D alike. The hooks are removed when the context
    closes.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        layers: The layers to hook.
        see: Called as `see(layer, x)`. A tensor that it returns replaces x; None leaves x unchanged.
        inside: Under a TransformerLens bridge, call `see` after hook_z. By default it is called before hook_z, which
            then receives the replaced x.

    Yields:
        Scope: The scope of the context, with the layers that it has reached.
    """
    modules = attention_layers(model)
    hooks = []
    for layer in layers:
        name = projection_name(modules[layer])
        if name is not None:
            projection = getattr(modules[layer], name)
            while inside and (inner := wrapped_module(projection)) is not None:
                projection = inner
            # hooks that change x run before hooks that read it, in whatever order the contexts were opened
            hooks.append(ModuleHook(projection, _hook(layer, see), prepend=not inside, layer=layer))
    scope = Scope()
    with marking_repeats(unwrap(model), scope), module_hooks(hooks, scope):
        yield scope


def _hook(layer: int, see: Callable[[int, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        with own_state():
            x = see(layer, args[0])
        return None if x is None else (x, *args[1:])

    return hook
