"""What dropping keys cost, in words and as a table: selectors beside random keys."""

from typing import Any

from interp.analyses.kv.curve import CONTROL, WHOLE, KeyCurve
from interp.analyses.kv.from_scores import OF_SCORES
from interp.menu import MENU, needles
from interp.plots import title_of
from interp.report.words import FEW


def said(curve: KeyCurve) -> list[str]:
    """What the curve says over all tasks, each number taken from it."""
    whole = curve.at(WHOLE, 1.0)[0]
    each = ", ".join(f"{task} {curve.at(WHOLE, 1.0, task)[0]:.0%}" for task in curve.tasks)
    told = [f"With every key the model gets {whole:.0%} of the answers' tokens right ({each})."]
    if whole == 0:
        return [*told, "Nothing could be lost, so this says nothing of the selectors."]
    rows = [row for row in curve.rows() if "gain" in row]
    best = "; ".join(f"at {share:.0%} {_best(rows, share)}" for share in curve.shares)
    told.append(f"Most above random keys of the same share, over all tasks: {best}.")
    below = {name: [row["share"] for row in rows if row["selector"] == name and row["gain_high"] < 0]
             for name in curve.selectors}  # fmt: skip
    worse = [f"{name} at {_listed([f'{share:.0%}' for share in found])}" for name, found in below.items() if found]
    if worse:
        told.append(f"Below random keys: {'; '.join(worse)}.")
    chance = round(0.05 * len(rows)) or 1
    told.append(
        f"Of {len(rows)} such 95% intervals about {chance} {'leaves' if chance == 1 else 'leave'} 0 out by chance."
    )
    prompts = min(len(point.right) for point in curve.points)
    if prompts < FEW:
        told.append(f"The prompts are few: {prompts} a task at least.")
    return told


def favoured(curve: KeyCurve) -> str:
    """Which selectors rest on scores that were found on needles, as one of the tasks asks; "" for none."""
    rest = [name for name in curve.selectors if any(MENU[scores].make is needles for scores in _scores(name))]
    if not rest or "needle" not in curve.tasks:
        return ""
    verb = "rests" if len(rest) == 1 else "rest"
    return f"{_listed(rest)} {verb} on scores found on needles of another seed, which favours them on the needle."


def table(curve: KeyCurve) -> list[dict[str, Any]]:
    """A row for each selector: its scores, and at each share the mean over tasks and the gain over random keys."""
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in curve.selectors}
    for row in curve.rows():
        if row["selector"] != WHOLE:
            gain = " ".join(_points(row)) if "gain" in row else ""
            apart = "gain" in row and (row["gain_low"] > 0 or row["gain_high"] < 0)
            cells[row["selector"]].append({"mean": row["mean"], "gain": gain, "apart": apart})
    return [
        {
            "selector": "random keys" if name == CONTROL else name,
            "scores": ", ".join(map(title_of, _scores(name))),
            "cells": found,
        }
        for name, found in cells.items()
    ]


def _scores(name: str) -> tuple[str, ...]:
    """The scores that a selector takes."""
    return OF_SCORES[name][1] if name in OF_SCORES else ()


def _best(rows: list[dict[str, Any]], share: float) -> str:
    """The selector that gains most at a share, where it is told apart from random keys."""
    apart = [row for row in rows if row["share"] == share and row["gain_low"] > 0]
    if not apart:
        return "none is told apart"
    first = max(apart, key=lambda row: row["gain"])
    gain, interval = _points(first)
    return f"{first['selector']}, {gain} points {interval}"


def _points(row: dict[str, Any]) -> tuple[str, str]:
    """The gain and its interval, in points."""
    whole = (round(100 * row[key]) for key in ("gain", "gain_low", "gain_high"))
    gain, low, high = (f"{points:+d}" if points else "0" for points in whole)
    return gain, f"[{low}, {high}]"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
