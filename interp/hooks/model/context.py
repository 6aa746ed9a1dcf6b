"""The context of a model: how many tokens it reads, as transformers reads it and not only as one entry states it."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from interp.errors import UsageError
from interp.hooks.model.layers import unwrap

_ATTRIBUTE = "_interp_max_length"
STRETCHED = ("yarn", "linear")
"""kinds of RoPE that read `factor` times the original context"""


def context_length(model: Any) -> int | None:
    """The number of tokens that a model reads at most; None where nothing limits it.

    A length that `set_context_length` set counts first. RoPE stretched by YaRN or linearly reads `factor` times its
    original context, whatever `max_position_embeddings` states. Dynamic NTK changes its base with the length, so that
    nothing limits it.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.

    Examples:
        >>> from interp.hooks.model.context import context_length
        >>> context_length(model)
        2048
    """
    given = getattr(unwrap(model), _ATTRIBUTE, None)
    if given is not None:
        return given
    if any(kind == "dynamic" for kind, _, _ in _ropes(model)):
        return None
    return usual_context(model)


def usual_context(model: Any) -> int | None:
    """The context that a model was made for, also where it can read more; None where its config does not state it.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
    """
    given = getattr(unwrap(model), _ATTRIBUTE, None)
    if given is not None:
        return given
    stated = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    known = [stated]
    for kind, factor, original in _ropes(model):
        if kind in (*STRETCHED, "dynamic"):
            known.append(int(factor * (original or stated)))
    return max(known)


def set_context_length(model: Any, tokens: int) -> None:
    """Set the number of tokens that prompts and replies may have, in place of the context that the config states.

    Args:
        model: A transformers causal language model.
        tokens: The number.

    Raises:
        UsageError: If the number is below 1, or the model has a table of positions that ends before it.

    Examples:
        >>> from interp.hooks.model.context import context_length, set_context_length
        >>> set_context_length(model, 2048)
        >>> context_length(model)
        2048
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise UsageError(f"max_length={tokens!r} is not valid; give a number of tokens of at least 1.")
    table = _position_table(model)
    if table is not None and tokens > table:
        raise UsageError(
            f"max_length={tokens:,} is more than the {table:,} positions that this model has learned; give at most "
            "that number."
        )
    setattr(unwrap(model), _ATTRIBUTE, tokens)


def _position_table(model: Any) -> int | None:
    """The number of learned positions; None for a model that computes positions."""
    for name, module in unwrap(model).named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last in ("wpe", "embed_positions") or "position_embed" in last):
            # OPT begins at position 2
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


def _text_config(model: Any) -> Any:
    return unwrap(model).config.get_text_config()


def _ropes(model: Any) -> Iterator[tuple[str, float, int | None]]:
    """Kind, factor and original context of each RoPE of a model; some models have one for each kind of layer."""
    config = _text_config(model)
    stored = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(stored, Mapping):
        return
    inner = [part for part in stored.values() if isinstance(part, Mapping)]
    for part in inner or [stored]:
        kind, factor = part.get("rope_type", part.get("type")), part.get("factor")
        original = part.get("original_max_position_embeddings")
        if isinstance(kind, str):
            times = float(factor) if isinstance(factor, int | float) and factor >= 1 else 1.0
            yield kind, times, original if isinstance(original, int) else None
