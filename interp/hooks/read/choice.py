"""The layers and query positions that a capture reads, from the ways in which a user may name them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import HeadError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.read.reductions import SpanMask

Layers = None | slice | range | Sequence[int]
"""A choice of layers; None for all, or for those of the chosen heads."""
Queries = None | str | int | slice | range | Sequence[int]
"""A choice of query positions: a span's name, "generated", one position or several; None for all."""


def choose_layers(layout: HeadLayout, choice: Layers, heads: HeadSet | None) -> tuple[int, ...]:
    """List the layers that a capture reads, in ascending order.

    Args:
        layout: The heads of the model.
        choice: The chosen layers.
        heads: The chosen heads; None for all.

    Returns:
        tuple[int, ...]: The layers; with heads, only those that have some of them.

    Raises:
        HeadError: If the model does not have a layer or head, or a head is outside the chosen layers.
    """
    every = range(layout.layers)
    if choice is None:
        layers = tuple(every) if heads is None else tuple(sorted(heads.by_layer()))
    else:
        picked = every[choice] if isinstance(choice, slice) else choice
        layers = tuple(sorted({int(layer) for layer in picked}))
    for layer in layers:
        if layer not in every:
            raise HeadError(
                f"layer {layer} of a {layout.layers}-layer model (layers run from 0 to {layout.layers - 1})."
            )
    if heads is None:
        return layers
    layout.check(heads)
    if choice is not None and set(heads.by_layer()) - set(layers):
        raise HeadError(f"{heads} has heads outside layers {list(layers)}: give layers or heads, and not both.")
    return tuple(sorted(heads.by_layer()))


def choose_queries(choice: Queries, position: Tensor, span: SpanMask, lengths: Sequence[int]) -> Tensor:
    """Bool [b r], which of the positions [b r] belong to a choice of queries.

    Args:
        choice: The chosen query positions.
        position: Int `[b r]`, negative on padding.
        span: Function that gives the positions of a span in each row of the batch.
        lengths: Number of tokens of each row's prompt, needed for "generated".

    Returns:
        Tensor: Bool `[b r]`.

    Raises:
        UsageError: If the choice has negative positions, or counts in steps.
    """
    inside = position >= 0
    if choice is None:
        return inside
    if choice == "generated":
        # the last row of the prompt makes the first new token
        return position >= torch.tensor(lengths, device=position.device)[:, None] - 1
    if isinstance(choice, str):
        width = int(position.max()) + 1 if position.numel() else 0
        mask = span(choice, max(width, 1)).to(position.device)
        return mask.gather(1, position.clamp(min=0)) & inside
    if isinstance(choice, slice):
        stop = torch.iinfo(torch.int64).max if choice.stop is None else choice.stop
        if (choice.start or 0) < 0 or (choice.stop or 0) < 0 or choice.step not in (None, 1):
            raise UsageError(f"queries={choice} counts from the end or in steps: give positions from 0 in steps of 1.")
        return inside & (position >= (choice.start or 0)) & (position < stop)
    wanted = torch.tensor([choice] if isinstance(choice, int) else list(choice), device=position.device)
    if (wanted < 0).any():
        raise UsageError(f"queries={choice!r} has a negative position: positions count from 0.")
    return inside & torch.isin(position, wanted)


def queries_to_read(chosen: Bool[Tensor, "b q"]) -> tuple[Int[Tensor, "r"], Bool[Tensor, "b q"] | None]:
    """List the queries of a call that are read.

    Args:
        chosen: The queries that each row of the batch reads.

    Returns:
        tuple: The queries that any row reads, by index, and `chosen` where rows differ in them; None where all rows
            read the same.
    """
    index = chosen.any(0).nonzero()[:, 0]
    return index, None if bool(chosen[:, index].all()) else chosen
