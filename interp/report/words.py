"""What the report says in words, each number taken from the results."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from interp.analyses.causal.ablation_test import CausalCheck, Outcome
from interp.analyses.causal.curve import Curve
from interp.analyses.results.head_scores import HeadScores
from interp.cards import card
from interp.findings import Findings, Steered
from interp.plots import number, title_of

TAKEN_OUT = {
    "zero": "zeroed",
    "mean": "set to their mean output",
    "resample": "given another prompt's output",
    "uniform": "made to attend evenly",
    "first": "made to attend to the first token only",
}
_LABELS, _REPLY, _ASKED = 6, 80, 4
FEW = 10
"""items of a steering check below which no verdict is given"""


@dataclass(frozen=True)
class Summary:
    """One analysis at a glance."""

    title: str
    best: str
    value: float
    low: float
    high: float
    scale: float
    """right end of the little bar: the highest end of an interval, or 1 where all scores are below"""
    above: int | None
    heads: int
    threshold: float | None
    counted: int
    prompts: int
    found: str
    sure: str


def summary(scores: HeadScores, cut: float | None) -> Summary:
    """The best head, how many are above the cut, and how far the prompts settle it."""
    heads, n = scores.top(2), len(scores.per_prompt)
    best = heads[0] if heads else None
    value, low, high = (float(t[best]) if best else math.nan for t in (scores.values, scores.low, scores.high))
    above = None if cut is None else len(scores.heads(above=cut))
    return Summary(
        title=title_of(scores.name),
        best=str(best or "–"),
        value=value,
        low=low,
        high=high,
        scale=max([1.0, *(end for end in (value, high) if end == end)]),
        above=above,
        heads=len(scores),
        threshold=cut,
        counted=scores.counted,
        prompts=n,
        found=_found(scores, above, cut),
        sure=_sure(scores),
    )


def _found(scores: HeadScores, above: int | None, cut: float | None) -> str:
    heads = scores.top(3)
    if not heads:
        return (
            "No prompt counted, so no head has a score. Needles, for one, count where the model answers them; without "
            "one there are no heads to take out, and no causal check."
        )
    unit = f" {scores.unit}" if scores.unit else ""
    text = f"{heads[0]} has the highest score, {number(scores[heads[0]])}{unit}"
    if heads[1:]:
        text += f", before {' and '.join(f'{head} ({number(scores[head])})' for head in heads[1:])}"
    if above is None:
        return f"{text}."
    share = f"{above} of {len(scores)} heads ({above / len(scores):.1%})"
    return f"{text}; {share} {'is' if above == 1 else 'are'} above {cut:g}."


def _sure(scores: HeadScores) -> str:
    heads, counted = scores.top(2), scores.counted
    if not heads:
        return f"0 of {len(scores.per_prompt)} prompts counted."
    best, prompts = heads[0], f"{counted} of {len(scores.per_prompt)} prompts counted"
    low, high = float(scores.low[best]), float(scores.high[best])
    if low != low:
        return f"{prompts}: too few for an interval."
    span = f"{number(low)} to {number(high)} ({number(high - low)} wide)"
    text = f"{prompts}; the 95% interval of {best} runs from {span}"
    if len(heads) < 2 or float(scores.high[heads[1]]) != float(scores.high[heads[1]]):
        return f"{text}."
    apart = low > float(scores.high[heads[1]])
    return f"{text} and {'lies above' if apart else 'overlaps'} that of the next head, {heads[1]}."


def causal_words(findings: Findings) -> list[str]:
    """The causal check in sentences; none without a check."""
    check = findings.causal
    if check is None:
        return []
    groups = {name: [row for row in check.outcomes if row.condition.group == name] for name in check.groups}
    said = []
    if "as loaded" in groups:
        said.append(f"As loaded, the model answered {_right(groups['as loaded'])} prompts.")
    if "top" in groups:
        size = len(groups["top"][0].condition.heads)
        done = TAKEN_OUT.get(check.kind, f"ablated ({check.kind})")
        which = " ".join(part for part in (f"top {size}", top_of(findings), "heads") if part)
        said.append(f"With the {which} {done} it answered {_right(groups['top'])}.")
    controls = []
    for name, told in (("random", "drawn freely"), ("random by layer", "matched by layer")):
        if name in groups:
            rows = groups[name]
            draws = f" on average over {len(rows)} draws" if len(rows) > 1 else ""
            controls.append(f"{told}, {_right(rows)}{draws}")
    if controls:
        rows = groups.get("random") or groups["random by layer"]
        said.append(f"With {len(rows[0].condition.heads)} random other heads instead: {'; '.join(controls)}.")
        said += _verdict(check)
    return said


def control_words(name: str, curve: Curve) -> str:
    """What a table's top heads do when they are out, beside random ones, in one sentence or two."""
    size, measure = max(curve.sizes(name)), curve.measures[0]
    heads = f"{size} {'head' if size == 1 else 'heads'}"
    base, out = (curve.at(which, n, measure)[0] for which, n in (("as loaded", 0), (name, size)))
    said = f"Control: {measure} is {base:.2f} as loaded and {out:.2f} with the top {heads} zeroed"
    beside = [which for which in ("random", "random by layer") if which in curve.rankings]
    told = {"random": "drawn freely", "random by layer": "matched by layer"}
    if not beside:
        return f"{said}."
    each = ", ".join(f"{curve.at(which, size, measure)[0]:.2f} {told[which]}" for which in beside)
    mean, low, high = curve.gain(name, size, measure, over=beside[-1])
    apart = "told apart" if low > 0 or high < 0 else "not told apart"
    n = len(curve.points[0].values[measure])
    return (
        f"{said}; with {size} random others {each}. Top less random {told[beside[-1]]}: {mean:+.2f} "
        f"[{low:+.2f}, {high:+.2f}], {apart} on {n} prompts.{' They are few.' if n < FEW else ''}"
    )


def steering_words(told: Steered) -> list[str]:
    """One steering check in sentences."""
    check = told.check
    groups = {name: [row for row in check.outcomes if row.condition.group == name] for name in check.groups}
    size = len(groups["steered"][0].condition.heads)
    said = [
        f"As loaded, the model was right on {_right(groups['as loaded'])} items of {told.task}; "
        f"under {check.kind} in {size} heads ({told.chosen}), on {_right(groups['steered'])}."
    ]
    controls = [
        f"{words}, {_right(groups[name])} on average over {len(groups[name])} draws"
        for name, words in (("random", "drawn freely"), ("random by layer", "matched by layer"))
        if name in groups
    ]
    if controls:
        said.append(f"The same edit in {size} random other heads: {'; '.join(controls)}.")
    else:
        said.append("There is no control: no random heads are left to steer instead.")
    tried = told.tried
    if tried and tried[0]["name"] == "as loaded":
        said.append("On the dev split no set of heads did better than the model as loaded.")
    if len(groups["steered"][0].verdicts) < FEW:
        return [*said, f"Fewer than {FEW} items tell nothing of the difference."]
    for name in (name for name in groups if name != "steered"):
        mean, low, high = check.gain("steered", name)
        what = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        where = name if name == "as loaded" else f"{name} heads" if name == "random" else "random heads by layer"
        said.append(f"Against {where}: {mean:+.0%} [{low:+.0%}, {high:+.0%}], {what}.")
    return said


def top_of(findings: Findings) -> str:
    """The analysis whose top heads the causal check took out, in words; "" where it is none of these."""
    outcomes = findings.causal.outcomes if findings.causal else ()
    tops = [row.condition.heads for row in outcomes if row.condition.group == "top"]
    for name, scores in findings.scores.items():
        if tops and set(scores.top(len(tops[0]))) == set(tops[0]):
            return name.replace("_", " ")
    return ""


def _right(rows: list[Outcome]) -> str:
    mean = sum(sum(row.verdicts) for row in rows) / len(rows)
    count = f"{mean:.0f}" if mean == int(mean) else f"{mean:.1f}"
    return f"{count} of {len(rows[0].verdicts)}"


def _verdict(check: CausalCheck) -> list[str]:
    if "top" not in check.groups:
        return []
    if "as loaded" in check.groups and check.group("as loaded")[0] == 0:
        return ["As loaded nothing was answered, so nothing could be lost: this check says nothing."]
    high = check.group("top")[2]
    told = {"random": "drawn freely", "random by layer": "matched by layer"}
    apart = [words for name, words in told.items() if name in check.groups and check.group(name)[1] > high]
    close = [words for name, words in told.items() if name in check.groups and check.group(name)[1] <= high]
    if not close:
        return ["The 95% interval with the top heads out lies below those with random heads out."]
    if not apart:
        return ["The 95% intervals of top and random heads overlap: this check does not tell them apart."]
    return [
        f"The 95% interval with the top heads out lies below that of random heads {apart[0]}, "
        f"but overlaps that of random heads {close[0]}."
    ]


def replies(check: CausalCheck) -> list[dict[str, Any]]:
    """A few prompts and what was written under each condition; first those that the heads lose or win."""
    first = check.outcomes[0]
    tops = [row for row in check.outcomes if row.condition.group in ("top", "steered")] or [first]
    order = sorted(range(len(first.verdicts)), key=lambda i: first.verdicts[i] == tops[0].verdicts[i])
    # questions beside the answers, where a check holds them
    asked = getattr(first, "questions", ())
    told = []
    for i in order[:_ASKED]:
        rows = [(row.condition.name, row.verdicts[i], cut(row.replies[i].strip())) for row in check.outcomes]
        told.append(
            {
                "number": i,
                "asked": asked[i] if i < len(asked) else "",
                "expected": first.answers[i] if i < len(first.answers) else "",
                "rows": _same(rows),
            }
        )
    return told


def _same(rows: list[tuple[str, bool, str]]) -> list[tuple[str, bool, str]]:
    """Conditions under which the same was written, in one row."""
    names: dict[tuple[bool, str], list[str]] = {}
    for name, right, reply in rows:
        names.setdefault((right, reply), []).append(name)
    return [(", ".join(found), *written) for written, found in names.items()]


def about(name: str) -> list[tuple[str, str]]:
    """What an analysis measures, cannot show and rests on, from its docstring; none if there is none."""
    from interp.analyses import identify

    known = [entry for entry in identify.__all__ if name == entry or name.startswith(f"{entry}_")]
    return parts_of(getattr(identify, max(known, key=len))) if known else []


def parts_of(method: Any) -> list[tuple[str, str]]:
    """What a method measures, cannot show and rests on, from its docstring."""
    told = card(method)
    parts = (("Measures", told.sentence), ("Cannot show", told.cannot_show), ("Source", told.source))
    return [(heading, said[:1].upper() + said[1:]) for heading, said in parts if said]


def facts(scores: HeadScores) -> list[str]:
    """What the side results of an analysis add."""
    told = []
    if (sink := scores.extras.get("sink")) is not None:
        told.append(
            f"Prompt by prompt, {float(sink.float().nanmean()):.1%} of the heads are above the threshold on average."
        )
    if (columns := scores.extras.get("columns")) is not None and "positions" in scores.extras:
        limit = scores.settings.get("column_threshold")
        bar = f"more than {limit:g}" if isinstance(limit, int | float) else "much"
        mean = number(float(columns.float().nanmean()))
        told.append(f"A head has {mean} keys on average that receive {bar} of the attention.")
    if (learned := scores.extras.get("learned")) is not None and bool((learned > 0).any()):
        told.append(f"Learned sinks of the model take {float(learned.float().nanmean()):.1%} of the attention.")
    return told


def provenance(findings: Findings) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything needed to make the results again, in groups of (name, value)."""
    stored = findings.provenance.to_dict()
    versions = stored.pop("versions")
    groups = [
        ("Model and run", [(key.replace("_", " "), _plain(value)) for key, value in stored.items()]),
        ("Versions", [(key, _plain(value)) for key, value in versions.items()]),
        ("Settings of the run", [*_flat(findings.settings), ("time spent measuring", duration(findings.seconds))]),
    ]
    for name, scores in findings.scores.items():
        rows = [
            ("unit", scores.unit),
            ("threshold", _plain(scores.threshold)),
            ("prompts", f"{scores.counted} of {len(scores.per_prompt)} counted"),
            ("prompt labels", _some(scores.labels)),
            ("seed of the intervals", str(scores.seed)),
        ]
        groups.append((title_of(name), [*rows, *_flat(scores.settings)]))
    if findings.causal is not None:
        check = findings.causal
        groups.append(("Causal check", [("ablation", check.kind), ("heads", str(check.k)), ("seed", str(check.seed))]))
    return [(title, [(key, value or "–") for key, value in rows]) for title, rows in groups]


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 12 s" or "2 h 5 min"; "" for 0."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s" if seconds > 0 else ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def date(time: str) -> str:
    """An ISO time as "2 March 2026, 14:05 UTC"; as it is where it cannot be read."""
    try:
        read = datetime.fromisoformat(time)
    except ValueError:
        return time
    return f"{read.day} {read:%B %Y, %H:%M} UTC"


def cut(text: str, length: int = _REPLY) -> str:
    return text if len(text) <= length else f"{text[:length].rstrip()}…"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _plain(value)


def _some(labels: tuple[str, ...]) -> str:
    distinct = list(dict.fromkeys(labels))
    more = f" and {len(distinct) - _LABELS} more" if len(distinct) > _LABELS else ""
    return ", ".join(distinct[:_LABELS]) + more
