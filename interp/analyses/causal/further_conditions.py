"""Conditions that accompany a tested head set: other ablations, the heads kept alone, and a ranking by depth."""

from collections.abc import Iterator, Sequence
from typing import Any

from interp.analyses.causal.random_sets import Condition, role_of
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadSet


def further_conditions(
    name: str, ranking: Any, heads: HeadSet, kinds: Sequence[AblationKind], sufficiency: bool
) -> Iterator[tuple[Condition, AblationKind]]:
    """Other ablations of tested heads, and the ablation of all other heads of their role.

    Args:
        name: Name of the tested condition.
        ranking: Head scores, or heads in order, which have no role.
        heads: The tested heads.
        kinds: The ablation of the tested condition, then others.
        sufficiency: Add the ablations of the other heads of the role.
    """
    others: list[AblationKind] = [kind for kind in dict.fromkeys(kinds[1:]) if kind != kinds[0]]
    for kind in others:
        yield Condition(f"{name}, {kind}", heads), kind
    rest = role_of(ranking, heads) - heads if sufficiency and isinstance(ranking, HeadScores) else HeadSet(())
    every: list[AblationKind] = [kinds[0], *others] if len(rest) else []
    for kind in every:
        suffix = "" if kind == kinds[0] else f", {kind}"
        yield Condition(f"{kept(name)}{suffix}", rest, n_tested=len(heads)), kind


def depth_conditions(name: str, ranking: Any, heads: HeadSet, wanted: bool = True) -> list[Condition]:
    """The first heads of the depth profile of a table, as many as are tested; nothing for heads without scores.

    Args:
        name: Name of the tested condition.
        ranking: Head scores, or heads in order.
        heads: The tested heads.
        wanted: Whether the condition is wanted.
    """
    if not wanted or not isinstance(ranking, HeadScores):
        return []
    first = HeadSet(tuple(ranking.depth_profile().top(len(heads), unranked=True)))
    return [Condition(f"{name}, depth", first)] if len(first) else []


def kept(name: str) -> str:
    """The condition in which the tested heads are kept and all other heads of their role are ablated.

    Args:
        name: Name of the tested condition.
    """
    return f"{name} kept"
