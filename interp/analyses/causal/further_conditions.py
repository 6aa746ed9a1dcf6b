"""Conditions that accompany a tested head set: other ablations, the heads kept alone, and a ranking by depth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from interp.analyses.causal.random_sets import Condition, role_of
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import BY_DEPTH, KEPT, TOP
from interp.analyses.results.trials import Trials
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
        yield Condition(under(name, kind), heads), kind
    rest = role_of(ranking, heads) - heads if sufficiency and isinstance(ranking, HeadScores) else HeadSet(())
    every: list[AblationKind] = [kinds[0], *others] if len(rest) else []
    for kind in every:
        own = kept(name) if kind == kinds[0] else under(kept(name), kind)
        yield Condition(own, rest, n_tested=len(heads)), kind


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
    return [Condition(by_depth(name), first)] if len(first) else []


def kept(name: str) -> str:
    """The condition in which the tested heads are kept and all other heads of their role are ablated.

    Args:
        name: Name of the tested condition.
    """
    return f"{name} {KEPT}"


def by_depth(name: str) -> str:
    """The condition of the first heads by the mean score of their layer.

    Args:
        name: Name of the tested condition.
    """
    return f"{name} {BY_DEPTH}"


def under(name: str, kind: str) -> str:
    """A condition under another ablation than that of the tested heads, or under one of several.

    Args:
        name: The condition.
        kind: The ablation.
    """
    return f"{name} ({kind})"


def of_top_heads(found: Trials) -> Trials:
    """Trials whose tested heads are named "top", in place of the name of their scores.

    Args:
        found: Trials of one head set or table, under its name.
    """

    def named(condition: str) -> str:
        own = condition == found.name or condition.startswith(f"{found.name} ")
        return TOP + condition.removeprefix(found.name) if own else condition

    return replace(
        found,
        trials=tuple(
            replace(each, condition=named(each.condition), matched=named(each.matched)) for each in found.trials
        ),
        claims={named(condition): claim for condition, claim in found.claims.items()},
    )
