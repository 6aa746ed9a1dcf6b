"""Selectors from the registry, made by the scores that a run has."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from interp.analyses import registry
from interp.analyses.kv._shares import global_layers
from interp.analyses.kv.selector import KeySelector
from interp.analyses.registry import SelectorEntry
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import BY_DEPTH, RANDOM
from interp.errors import UsageError
from interp.hooks.model.layers import unwrap

Make = Callable[[float], KeySelector]
"""keep_ratio -> selector"""


def selectors_of(
    scores: Mapping[str, HeadScores],
    seed: int = 0,
    model: nn.Module | None = None,
    *,
    names: tuple[str, ...] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    depth: bool = False,
) -> dict[str, Make]:
    """Every declared selector that these scores can make, as a function of the share of keys.

    Selectors without needs are always made. The control is among them, under the name "random". Tables of which no
    prompt counts are skipped.

    Args:
        scores: Analysis -> scores.
        seed: Seed of random keys.
        model: Where given, scores of its layers with a sliding window are left out: heads chosen there would use up
            a budget that belongs to the other layers.
        names: Selectors to make; empty for all that can be made.
        settings: Selector -> settings, such as {"snapkv": {"window": 32}}.
        depth: Add a baseline of each selector that chooses heads, such as "duo_attention by depth": it takes the depth
            profile of its scores, in which every head scores the mean of its layer.

    Returns:
        Name -> function of keep_ratio that makes the selector, in the order of a report.

    Raises:
        UsageError: For an unknown name or setting, a named selector whose scores are missing, or settings of a selector
            that is not made.

    Examples:
        >>> from interp.analyses.kv import selectors_of
        >>> list(selectors_of({"duo_gates": scores}))
        ['random', 'streaming', 'snapkv', 'task_kv', 'duo_attention']
        >>> selectors_of({}, names=("snapkv",), settings={"snapkv": {"window": 32}})["snapkv"](0.5).window
        32

    Source:
        This package.

    Limits:
        Does not show other scores or settings under which a selector would perform better.
    """
    tables = scores if model is None else {name: _in_global_layers(table, model) for name, table in scores.items()}
    counted = {name: table for name, table in tables.items() if table.counted}
    chosen = _chosen(names, counted)
    given = {registry.get(name, "selector").name: dict(values) for name, values in (settings or {}).items()}
    if other := [name for name in given if name not in {entry.name for entry in chosen}]:
        known = ", ".join(entry.name for entry in chosen)
        raise UsageError(f"there are settings of {other[0]!r}, which is not evaluated; give settings of {known}.")
    made: dict[str, Make] = {}
    for entry in chosen:
        own = given.get(entry.name, {})
        entry.check_settings(own)
        if "seed" in entry.settings:
            own = {"seed": seed, **own}
        needed = entry.needed(counted) or ()
        # JSON has lists where a field holds tuples
        own = {key: _tuples(value) for key, value in own.items()}
        made[condition_of(entry)] = partial(entry.maker, *(counted[name] for name in needed), **own)
        if depth and needed:
            profiles = [_depth_profile(counted[name]) for name in needed]
            made[depth_of(entry)] = partial(entry.maker, *profiles, **own)
    return made


def condition_of(entry: SelectorEntry) -> str:
    """The name of a selector among the conditions of `kv_curve`: its own, or "random" for the control."""
    return RANDOM if entry.baseline else entry.name


def depth_of(entry: SelectorEntry) -> str:
    """The name of the baseline of a selector that chooses heads by depth alone."""
    return f"{condition_of(entry)} {BY_DEPTH}"


def _depth_profile(scores: HeadScores) -> HeadScores:
    """The depth profile under the name and with the threshold of its table, which makers may read."""
    return replace(scores.depth_profile(), name=scores.name, threshold=scores.threshold)


def _chosen(names: tuple[str, ...], counted: Mapping[str, HeadScores]) -> list[SelectorEntry]:
    """The named selectors and the control, in order; all that can be made without names."""
    every: tuple[SelectorEntry, ...] = registry.entries("selector")
    if not names:
        return [entry for entry in every if entry.baseline or entry.needed(counted) is not None]
    named: dict[str, SelectorEntry] = {}
    for name in names:
        entry: SelectorEntry = registry.get(name, "selector")
        if entry.needed(counted) is None:
            wanted = " or ".join(" and ".join(each) for each in entry.alternatives)
            raise UsageError(f"selector {entry.name!r} needs the scores of {wanted}; add them to the analyses.")
        named[entry.name] = entry
    control = {entry.name: entry for entry in every if entry.baseline}
    return sorted({**control, **named}.values(), key=lambda entry: (entry.order, entry.name))


def has_global_layers(model: nn.Module) -> bool:
    """Whether a model has a layer without a sliding window, so that a selector has keys to choose from.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.

    Returns:
        Whether there is such a layer.
    """
    network: Any = unwrap(model)
    return bool(global_layers(network, 1).any())


def _in_global_layers(scores: HeadScores, model: nn.Module) -> HeadScores:
    """The scores of layers without a sliding window; the others become NaN."""
    network: Any = unwrap(model)
    kept = global_layers(network, scores.layers)
    return replace(scores, per_prompt=scores.per_prompt.masked_fill(~kept[None, :, None], float("nan")))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
