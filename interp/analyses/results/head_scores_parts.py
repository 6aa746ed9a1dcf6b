"""The fields of a score table, checked, and tables joined along their prompts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.analyses.results import files as storage
from interp.errors import HeadError, ScoreError
from interp.hooks.model.heads import HeadLayout

if TYPE_CHECKING:
    from interp.analyses.results.head_scores import HeadScores


def checked(
    name: str,
    per_prompt: Any,
    kv_heads: int | None,
    settings: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    labels: Sequence[Any],
) -> dict[str, Any]:
    """The fields of a table as it holds them.

    Args:
        name: Name of the analysis.
        per_prompt: Scores `[n l h]`.
        kv_heads: Key-value heads of a layer; None for as many as query heads.
        settings: Settings of the analysis.
        extras: Further results `[n l h ...]`.
        labels: One text for each prompt, or none.

    Returns:
        The fields by name.

    Raises:
        ScoreError: If the table is not `[n l h]`, holds an infinite value, or a field does not fit it.
    """
    try:
        given = torch.as_tensor(per_prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScoreError(f"scores '{name}' are not numbers ({error}); give [prompts, layers, heads].") from None
    if given.ndim != 3 or not given.numel():
        raise ScoreError(f"scores '{name}' have shape {list(given.shape)}; give [prompts, layers, heads].")
    if given.isinf().any():
        raise ScoreError(f"scores '{name}' hold an infinite value; give numbers, or NaN where a prompt does not count.")
    texts = tuple(map(str, labels))
    if texts and len(texts) != len(given):
        raise ScoreError(
            f"scores '{name}' have {len(texts)} labels for {len(given)} prompts; give one for each, or none."
        )
    for key, extra in extras.items():
        if extra.shape[:3] != given.shape:
            raise ScoreError(
                f"extra '{key}' of scores '{name}' has shape {list(extra.shape)}; "
                f"give a tensor whose shape begins with {list(given.shape)}."
            )
    try:
        HeadLayout(given.shape[1], given.shape[2], kv_heads or given.shape[2])
    except HeadError as error:
        raise ScoreError(f"scores '{name}': {error}") from error
    return {
        "per_prompt": given.detach().to("cpu", torch.float32, copy=True).contiguous(),
        "kv_heads": kv_heads or given.shape[2],
        "settings": storage.plain(settings, f"settings of '{name}'"),
        "extras": {key: extra.detach().cpu().contiguous() for key, extra in extras.items()},
        "labels": texts,
    }


def joined(parts: Sequence["HeadScores"]) -> dict[str, Any]:
    """The fields of the table that holds the prompts of all parts, see `HeadScores.concat`.

    Args:
        parts: Tables of one analysis and model.

    Returns:
        The fields by name.

    Raises:
        ScoreError: If there are no parts, or they differ in name, shape, settings or model.
    """
    if not parts:
        raise ScoreError("no scores to join; give at least one table.")
    first = parts[0]
    for part in parts[1:]:
        for key in ("name", "unit", "layers", "n_heads", "kv_heads", "threshold", "settings"):
            if getattr(part, key) != getattr(first, key):
                raise ScoreError(
                    f"scores differ in {key} ({getattr(first, key)!r} and {getattr(part, key)!r}); "
                    "join parts of one analysis of one model."
                )
        if part.extras.keys() != first.extras.keys():
            raise ScoreError(
                f"scores differ in extras ({sorted(first.extras)} and {sorted(part.extras)}); join equal parts."
            )
        if first.provenance is not None and part.provenance is not None:
            first.provenance.check_model(part.provenance)
    labelled = all(part.labels for part in parts)
    return {
        "per_prompt": torch.cat([part.per_prompt for part in parts]),
        "extras": {key: storage.joined([part.extras[key] for part in parts], key) for key in first.extras},
        "labels": tuple(label for part in parts for label in part.labels) if labelled else (),
        "provenance": next((part.provenance for part in parts if part.provenance is not None), None),
        **{key: getattr(first, key) for key in ("name", "unit", "kv_heads", "threshold", "settings", "seed")},
    }
