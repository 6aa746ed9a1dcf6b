"""Fingerprints of the parts of a model: its config, its weights as they act now, its tokenizer and chat template."""

import hashlib
import json
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNKNOWN", "config_hash", "innermost", "template_hash", "tokenizer_hash", "weights_hash"]

UNKNOWN = "unknown"
"""fingerprint of weights whose values cannot be read; it equals no other fingerprint, and not even itself"""
_SAMPLE_SIZE = 4096
# entries of a config about storage and run settings, which do not change the computation of the model
_RUN_SETTINGS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "_attn_implementation", "attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset",
}  # fmt: skip
# types of RoPE that compute their frequencies anew for each length
_CHANGING_ROPE = ("dynamic", "longrope")
_offloaded: "weakref.WeakKeyDictionary[nn.Module, dict[str, bytes]]" = weakref.WeakKeyDictionary()
"""samples of weights that accelerate keeps outside of a module, which are read from disk only once"""


class _HiddenError(Exception):
    """A weight whose values cannot be read."""


def innermost(model: Any) -> Any:
    """The transformers model inside a bridge, a compiled wrapper or a model of peft.

    Args:
        model: A model.
    """
    for wrapper in ("original_model", "_orig_mod"):
        model = getattr(model, wrapper, model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def weights_hash(model: nn.Module) -> str:
    """Hash the name, shape, dtype and a strided sample of the values of every weight and buffer that acts.

    The hash is the same in every process, on every device, and for weights that accelerate keeps on a CPU or a disk.
    Of an adapter of peft, the weights count while it is active; a disabled adapter leaves the hash of the base model,
    and a merged one counts through the weights that it was merged into. Buffers that are no weights count as well, but
    for caches and the frequencies of a RoPE that changes with the length.

    Args:
        model: A transformers model, or any module.

    Returns:
        str: 16 hexadecimal digits, or "unknown" where a weight has no values or a form that cannot be read.

    Limits:
        An edit of values outside of the sample of a weight (every k-th value, at most 4,096) changes nothing.
        bitsandbytes rounds its block scales to bfloat16 when it repacks 4-bit weights on a CPU, so they enter rounded;
        scales that are quantised themselves change the hash at the first forward pass.
    """
    digest = hashlib.sha256()
    try:
        for name, value in sorted(_acting(model).items()):
            for part in _samples(model, name, value):
                digest.update(part)
    except _HiddenError:
        return UNKNOWN
    return digest.hexdigest()[:16]


def config_hash(config: Any) -> str:
    """Hash the entries of a config that determine the computation; names, versions and run settings are left out."""
    return _digest(json.dumps(_without_run_settings(config.to_dict()), sort_keys=True, default=str).encode())


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash the vocabulary, merges and processing; padding and truncation, which calls change, are left out."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    stored = backend.to_str()
    # the serialised form begins with padding and truncation, followed by the added tokens
    return _digest(stored[max(stored.find('"added_tokens"'), 0) :].encode())


def template_hash(tokenizer: Any) -> str:
    """Hash the chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return _digest(json.dumps(template, sort_keys=True).encode()) if template else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _without_run_settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_run_settings(item) for key, item in value.items() if key not in _RUN_SETTINGS}
    return [_without_run_settings(item) for item in value] if isinstance(value, list | tuple) else value


def _acting(model: Any) -> dict[str, tuple[str, Any]]:
    """Name without wrappers -> name in the model and value, of the weights and buffers that act."""
    outside = _outside(model)
    model = innermost(model)
    left_out, renamed, more = _adapters(model)
    found: dict[str, tuple[str, Any]] = {}
    params: set[int] = set()

    def add(name: str, value: Any) -> None:
        if not any(name == part or name.startswith(f"{part}.") for part in left_out):
            short = name
            for part, shorter in renamed.items():
                short = short.replace(f"{part}.", f"{shorter}." if shorter else "", 1) if part in short else short
            # a bridge inserts its own modules, which change the names of the parameters but not the parameters
            found[short.replace("_original_component.", "")] = name, value

    for name, value in model.named_parameters():
        params.add(id(value))
        add(name, value)
    # quantised modules keep their weights in forms of their own, which they unpack for a state dict
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in params and not _is_zero_bias(name, value):
            add(name, value)
    for name, value in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        changes = leaf == "inv_freq" and getattr(model.get_submodule(owner), "rope_type", "") in _CHANGING_ROPE
        if not changes and not leaf.endswith("_cached") and not _is_zero_bias(name, value):
            add(name, value)
    return found | {name: (name, value) for name, value in (more | outside).items()}


def _is_zero_bias(name: str, value: Any) -> bool:
    """Whether this is a bias of zeros, as a bridge adds one to the output embeddings."""
    return name.endswith(".bias") and isinstance(value, Tensor) and value.device.type != "meta" and not value.any()


def _outside(model: Any) -> dict[str, Any]:
    """Weights of a model of peft that are outside of its base model: virtual tokens."""
    prompts = getattr(model, "prompt_encoder", None)
    if prompts is None or not hasattr(model, "get_base_model"):
        return {}
    # peft replaces forward() on the object while the adapter is disabled
    active = "forward" not in vars(model)
    return {f"virtual tokens.{name}": value for name, value in prompts.named_parameters() if active}


def _adapters(model: nn.Module) -> tuple[set[str], dict[str, str], dict[str, Any]]:
    """The adapters of peft inside a model: names of parts that do not act, renamed parts, and further numbers."""
    left_out, renamed, more = set[str](), dict[str, str](), dict[str, Any]()
    for name, module in model.named_modules():
        layers: Any = module
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            acting = [] if layers.disable_adapters else set(layers.active_adapters) - set(layers.merged_adapters)
            renamed[f"{name}.base_layer"] = name
            for kind in layers.adapter_layer_names:
                for adapter in getattr(module, kind, ()):
                    if adapter not in acting:
                        left_out.add(f"{name}.{kind}.{adapter}")
            for adapter in sorted(acting):
                more[f"{name}.scaling.{adapter}"] = str(dict(getattr(module, "scaling", {})).get(adapter))
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            acting = [] if layers.disable_adapters else list(layers.active_adapters)
            inside = [adapter for adapter in acting if adapter in layers.modules_to_save]
            chosen = f"{name}.modules_to_save.{inside[0]}" if inside else f"{name}.original_module"
            renamed[chosen] = name
            others = [f"{name}.modules_to_save.{adapter}" for adapter in layers.modules_to_save]
            left_out |= {part for part in [*others, f"{name}.original_module"] if part != chosen}
    return left_out, renamed, more


def _samples(model: nn.Module, short: str, named: tuple[str, Any]) -> Iterator[bytes]:
    """The name, shape, dtype and sampled values of one weight."""
    name, value = named
    if isinstance(value, Tensor) and value.device.type == "meta":
        yield from _offloaded_samples(innermost(model), short, name)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{short} {value.qscheme()}".encode()
        yield from _samples(model, f"{short}.int", (name, value.int_repr()))
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{value.q_scale()} {value.q_zero_point()}".encode()
        else:
            yield from _samples(model, f"{short}.scale", (name, value.q_per_channel_scales()))
            yield from _samples(model, f"{short}.zero", (name, value.q_per_channel_zero_points()))
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        wrapped: Any = value
        for part in wrapped.__tensor_flatten__()[0]:
            yield from _samples(model, f"{short}.{part}", (name, getattr(value, part)))
    elif isinstance(value, Tensor):
        value = value.detach()
        if short.endswith(".absmax") and value.is_floating_point():
            value = value.flatten().to(torch.bfloat16)
        yield f"{short} {tuple(value.shape)} {value.dtype}".encode()
        yield _sampled_bytes(value)
    elif isinstance(value, tuple | list):
        for place, part in enumerate(value):
            yield from _samples(model, f"{short}.{place}", (name, part))
    elif value is None or isinstance(value, str | int | float | bool | torch.dtype):
        yield f"{short} {value!r}".encode()
    else:
        raise _HiddenError


def _offloaded_samples(model: nn.Module, short: str, name: str) -> Iterator[bytes]:
    """Samples of a weight that accelerate keeps outside of its module."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    hook: Any = getattr(module, "_hf_hook", None)
    hooks: list[Any] = [*(getattr(hook, "hooks", None) or [hook])]
    kept = next((each.weights_map for each in hooks if getattr(each, "weights_map", None) is not None), None)
    known = _offloaded.setdefault(module, {})
    if name not in known:
        try:
            value = None if kept is None else kept[leaf]
        except KeyError:
            value = None
        if not isinstance(value, Tensor) or value.device.type == "meta":
            raise _HiddenError
        known[name] = b"".join(_samples(model, short, (name, value)))
    yield known[name]


def _sampled_bytes(weight: Tensor) -> bytes:
    flat = weight.reshape(-1)
    # an odd stride samples all columns of a matrix whose width is a power of two
    stride = -(-flat.numel() // _SAMPLE_SIZE) | 1
    return flat[::stride].contiguous().view(torch.uint8).cpu().numpy().tobytes()
