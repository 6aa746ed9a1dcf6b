"""Sentences and texts of a report; every number is from the results."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from interp import plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.head_scores_text import unranked
from interp.analyses.results.reply_limit import sentence_of_scores
from interp.analyses.results.table_statistics import held_out_means, rank_correlation
from interp.analyses.results.trials import Trials
from interp.analyses.views.head_roles import threshold_of
from interp.plots import number
from interp.runs.results import RunResults

N_LABELS, REPLY_CHARACTERS = 6, 80
"""labels of prompts that are listed, and characters of a reply"""
CONTROL = ".control"
"""ending of the name of a control, after the name of its analysis"""
SETTING_NAMES = {
    "prompts": "hash of the prompts",
    "sizes": "numbers of heads",
    "until": "stop when the measure falls to this share of the baseline",
}
"""stored settings whose names are not clear without their values"""


@dataclass(frozen=True)
class Summary:
    """The entry of a score table in the overview."""

    title: str
    best: str
    value: float
    low: float
    high: float
    scale: float
    """right end of the bar: the highest end of an interval, or 1 where all scores are below 1"""
    held_out: float
    """mean of the best head of one half of the prompts on the other half"""
    above: int | None
    confident: int | None
    """heads above the threshold with a controlled false discovery rate"""
    heads: int
    threshold: float | None
    counted: int
    prompts: int
    found: str
    """sentence about the best heads"""
    certainty: str
    """sentence about prompts and interval"""


def summary(scores: HeadScores, threshold: float | None) -> Summary:
    """The best head, the number of heads above the threshold, and how certain both are.

    Args:
        scores: A score table.
        threshold: Score above which a head has the role of the table; None for none.
    """
    heads, n = scores.top(2), len(scores.per_prompt)
    best = heads[0] if heads else None
    value, low, high = (float(t[best]) if best else math.nan for t in (scores.values, scores.low, scores.high))
    held_out = float(held_out_means(scores.per_prompt.flatten(1), 1, seed=scores.seed))
    above = None if threshold is None else len(scores.heads(above=threshold))
    confident = None if threshold is None else len(scores.confident(threshold))
    return Summary(
        title=title_of(scores.name),
        best=str(best or "–"),
        value=value,
        low=low,
        high=high,
        scale=max([1.0, *(end for end in (value, high) if end == end)]),
        held_out=held_out,
        above=above,
        confident=confident,
        heads=scores.n_scored,
        threshold=threshold,
        counted=scores.counted,
        prompts=n,
        found=_found(scores, above, confident, threshold),
        certainty=_certainty(scores, held_out),
    )


def _found(scores: HeadScores, above: int | None, confident: int | None, threshold: float | None) -> str:
    heads = scores.top(3)
    if not scores.counted:
        return (
            "No prompt counted, so no head has a score. Prompts count where the model shows the behaviour (it gives "
            "the answer, or favours it more on the clean prompt), and for heads whose window reaches what is scored."
        )
    if not heads:
        return f"No head leads: {unranked(scores)}"
    unit = f" (unit: {scores.unit})" if scores.unit else ""
    text = f"{heads[0]} has the highest score, {number(scores[heads[0]])}{unit}"
    if heads[1:]:
        text += f", followed by {' and '.join(f'{head} ({number(scores[head])})' for head in heads[1:])}"
    if above is None:
        return f"{text}."
    if not above:
        return f"No head is above {threshold:g}. {text}."
    share = f"{above} of {scores.n_scored} heads ({above / scores.n_scored:.1%})"
    null = "" if confident else f"No head is confidently above {threshold:g}. "
    return f"{null}{text}; {share} {'is' if above == 1 else 'are'} above {threshold:g}, {confident} confidently."


def _certainty(scores: HeadScores, held_out: float) -> str:
    """Sentences on the interval of the best head and on the scores of heads that other prompts chose."""
    text = _interval(scores)
    if held_out == held_out:
        text += f" The best head of one half of the prompts scores {number(held_out)} on the other half, on average."
    return text


def _interval(scores: HeadScores) -> str:
    heads, counted = scores.top(2), scores.counted
    if not heads and not counted:
        return f"0 of {len(scores.per_prompt)} prompts counted."
    prompts = f"{counted} of {len(scores.per_prompt)} prompts counted"
    if not heads:
        return f"{prompts}."
    best = heads[0]
    low, high = float(scores.low[best]), float(scores.high[best])
    if low != low:
        return f"{prompts}: too few for an interval."
    span = f"{number(low)} to {number(high)} ({number(high - low)} wide)"
    text = f"{prompts}; the 95\u00a0% interval of {best} runs from {span}"
    if len(heads) < 2 or float(scores.high[heads[1]]) != float(scores.high[heads[1]]):
        return f"{text}."
    above = low > float(scores.high[heads[1]])
    return f"{text} and {'is above' if above else 'overlaps'} that of the next head, {heads[1]}."


def stability(scores: HeadScores) -> str:
    """The rank correlation between halves of the prompts, as a sentence above the table.

    Args:
        scores: A score table.
    """
    if scores.split_half != scores.split_half:
        return "There are too few prompts or ranked heads to compare their order between halves of the prompts."
    which = "all heads"
    if scores.n_unranked:
        ranked = int((scores.values > scores.floor).sum())
        which = f"the {ranked} heads that have a rank (score above {number(scores.floor)})"
    return f"Rank correlation between halves of the prompts: {scores.split_half:.2f}, over {which}."


def facts(scores: HeadScores, threshold: float | None) -> list[str]:
    """Sentences about the side results of an analysis.

    Args:
        scores: A score table.
        threshold: Score above which a head has the role of the table; None for none.
    """
    sentences = []
    if (weighted := scores.extras.get("by_value")) is not None:
        means = weighted.float().nanmean(0)
        agreed = rank_correlation(means.flatten(), scores.values.flatten())
        text = f"With each key weighted by the norm of its value, the rank correlation with this table is {agreed:.2f}"
        if threshold is not None:
            above = means > threshold
            both = int((above & (scores.values > threshold)).sum())
            text += f", and {int(above.sum())} heads are above {threshold:g}, "
            text += f"{both} of which are above it in this table too"
        sentences.append(f"{text}.")
    if (sink := scores.extras.get("sink")) is not None:
        sentences.append(
            f"In a single prompt, {float(sink.float().nanmean()):.1%} of the heads are above the threshold, on average "
            "over the prompts."
        )
    if (columns := scores.extras.get("columns")) is not None and "positions" in scores.extras:
        limit = scores.settings.get("column_threshold")
        bar = f"more than {limit:g}" if isinstance(limit, int | float) else "much"
        mean = number(float(columns.float().nanmean()))
        sentences.append(
            f"On average over heads and prompts, {mean} keys of a prompt receive {bar} of a head's attention. The "
            "attention to a key is averaged over the queries that see it."
        )
    if (learned := scores.extras.get("learned")) is not None and bool((learned > 0).any()):
        sentences.append(f"Learned sinks of the model take {float(learned.float().nanmean()):.1%} of the attention.")
    if ended := sentence_of_scores(scores.extras, scores.settings):
        sentences.append(ended)
    return sentences


def provenance(results: RunResults) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that is needed to make the results again, in groups of names and values.

    Args:
        results: The results of a run.
    """
    stored = results.provenance.to_dict()
    versions = stored.pop("versions")
    groups = [
        ("Model and run", [(key.replace("_", " "), _plain(value)) for key, value in stored.items()]),
        ("Versions", [(key, _plain(value)) for key, value in versions.items()]),
        ("Settings of the run", [*_flat(results.settings), ("time spent measuring", duration(results.seconds))]),
    ]
    for name, scores in results.scores.items():
        rows = [
            ("unit", scores.unit),
            ("threshold", _plain(threshold_of(name, scores))),
            ("prompts counted", f"{scores.counted} of {len(scores.per_prompt)}"),
            ("prompt labels", _some(scores.labels)),
            ("seed of the confidence intervals", str(scores.seed)),
        ]
        groups.append((title_of(name), [*rows, *_flat(scores.settings)]))
    for name, trials in results.items():
        if isinstance(trials, Trials):
            rows = [("intervention", trials.intervention), ("seed of the confidence intervals", str(trials.seed))]
            groups.append((_heading(name, trials.title), [*rows, *_flat(trials.settings)]))
    return [(title, [(key, value or "–") for key, value in rows]) for title, rows in groups]


def title_of(name: str) -> str:
    """The heading of a result: the title of its analysis, with the folder of a run inside of this one.

    Args:
        name: Name in `RunResults`, such as "retrieval" or "steered/profile".
    """
    folder, _, last = name.rpartition("/")
    tested = last.removesuffix(CONTROL)
    title = plots.title_of(tested) if tested == last else f"Control of {plots.title_of(tested)}"
    return f"{title} ({folder})" if folder else title


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 12 s" or "2 h 5 min"; empty for 0.

    Args:
        seconds: The time.
    """
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s" if seconds > 0 else ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def date(time: str) -> str:
    """An ISO time as "2 March 2026, 14:05 UTC"; unchanged where it cannot be read.

    Args:
        time: The time.
    """
    try:
        read = datetime.fromisoformat(time)
    except ValueError:
        return time
    return f"{read.day} {read:%B %Y, %H:%M} UTC"


def cut(text: str, length: int = REPLY_CHARACTERS) -> str:
    """The first characters of a text, with an ellipsis where more follow.

    Args:
        text: Any text.
        length: Number of characters.
    """
    return text if len(text) <= length else f"{text[:length].rstrip()}…"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _heading(name: str, title: str) -> str:
    """The heading of trials, with the analysis that they belong to."""
    heading = title_of(name)
    return heading if title in ("", heading) else f"{heading}: {title[:1].lower()}{title[1:]}"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{SETTING_NAMES.get(key, key)}", _plain(value)


def _some(labels: tuple[str, ...]) -> str:
    distinct = list(dict.fromkeys(labels))
    more = f" and {len(distinct) - N_LABELS} more" if len(distinct) > N_LABELS else ""
    return ", ".join(distinct[:N_LABELS]) + more
