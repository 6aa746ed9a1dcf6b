"""Sentences and texts of a report; every number is from the results."""

import json
import math
import re
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
from interp.analyses.source_settings import is_set, text
from interp.analyses.views.head_roles import threshold_of
from interp.plots import number
from interp.report.run_words import CONTROL, run_settings
from interp.runs.results import RunResults

N_LABELS, REPLY_CHARACTERS, LENGTH = 6, 80, " tokens"
"""labels of prompts that are listed, characters of a reply, and end of a label that is a length"""
QUERIES_AFTER = "all queries at or after it"
"""queries over which the attention to a key is averaged, except with `rows="visible"`"""
STORED_NAMES = {"bos": "BOS token"}
"""fields of a provenance whose names are not clear"""
SETTING_NAMES = {
    "ablation": "ablation",
    "counted.accuracy": "prompts that the unmodified model answers right",
    "counted.logit difference": "prompts on which the unmodified model favours the right answer",
    "kinds": "further ablations",
    "max_new_tokens": "new tokens of a reply, at most",
    "n_heads": "number of ablated heads",
    "n_random_sets": "random sets, at most",
    "prompts": "hash of the prompts",
    "sizes": "number of ablated heads",
    "until": "stop when the measure falls to this share of the baseline",
}
"""stored settings of an ablation test -> their names in a report"""


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
            "No prompt could be used, so no head has a score. A prompt is used where the model shows the behaviour (it "
            "gives the answer, or favours it more on the clean prompt), and for heads whose window reaches what is "
            "scored."
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
        return f"0 of {len(scores.per_prompt)} prompts used."
    prompts = f"{counted} of {len(scores.per_prompt)} prompts used"
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
        which = f"the {ranked} heads with a score above {scores.floor:.3g}"
    correlation = f"{scores.split_half:.2f} on average, over {which}"
    return f"Scores from random halves of the prompts have a rank correlation of {correlation}."


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
        text = "If attention is weighted by the norm of the value vectors, the head scores correlate with those above"
        text += f" at {agreed:.2f} (ranks)"
        if threshold is not None:
            above = means > threshold
            n, both = int(above.sum()), int((above & (scores.values > threshold)).sum())
            text += f"; {n or 'no'} head{' is' if n == 1 else 's are'} then above {threshold:g}"
            text += f", {'all' if both == n else both} of them also without the weighting" if n > 1 else ""
        sentences.append(f"{text}.")
    if (sink := scores.extras.get("sink")) is not None:
        sentences.append(
            f"When each prompt is taken alone, {float(sink.float().nanmean()):.1%} of the heads are above the "
            "threshold, on average over prompts."
        )
    if (columns := scores.extras.get("columns")) is not None and "positions" in scores.extras:
        limit = scores.settings.get("column_threshold")
        bar = f"more than {limit:g}" if isinstance(limit, int | float) else "much"
        mean = number(float(columns.float().nanmean()))
        queries = "the queries that can see it" if scores.settings.get("rows") == "visible" else QUERIES_AFTER
        sentences.append(
            f"On average over heads and prompts, {mean} keys of a prompt receive {bar} of a head's attention. The "
            f"attention to a key is averaged over {queries}."
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
        (
            "Model and run",
            [(STORED_NAMES.get(key, key.replace("_", " ")), _plain(value)) for key, value in stored.items()],
        ),
        ("Versions", [(key, _plain(value)) for key, value in versions.items()]),
        (
            "Settings of the run",
            [*run_settings(results), ("time spent measuring", duration(results.seconds))],
        ),
    ]
    for name, scores in results.scores.items():
        rows = [
            ("unit", scores.unit),
            ("threshold", _plain(threshold_of(name, scores))),
            ("prompts used", f"{scores.counted} of {len(scores.per_prompt)}"),
            _labels(scores),
            ("seed of the confidence intervals", str(scores.seed)),
        ]
        groups.append((title_of(name), [*rows, *named_settings(scores.settings)]))
    for name, trials in results.items():
        if isinstance(trials, Trials):
            rows = named_settings(trials.settings, tested=name.endswith(CONTROL))
            if trials.intervention and ("ablation", trials.intervention) not in rows:
                rows.insert(0, ("intervention", trials.intervention))
            rows.append(("seed of the confidence intervals", str(trials.seed)))
            groups.append((_heading(name, trials.title), rows))
    return [(title, [(key, value or "–") for key, value in rows]) for title, rows in groups]


def title_of(name: str) -> str:
    """The heading of a result: the title of its analysis, with the folder of a run inside of this one.

    Args:
        name: Name in `RunResults`, such as "retrieval" or "steered/profile".
    """
    folder, _, last = name.rpartition("/")
    tested = last.removesuffix(CONTROL)
    title = plots.title_of(tested) if tested == last else f"Ablation test of {plots.title_of(tested)}"
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


def named_settings(settings: Mapping[str, Any], tested: bool = False) -> list[tuple[str, str]]:
    """Stored settings as names and texts, without those that are not set.

    Args:
        settings: The settings of a result.
        tested: Whether the result is an ablation test, whose settings have names in words.
    """
    found = []
    for key, value in _flat(settings):
        if key == "kinds":
            value = [kind for kind in value if kind != settings.get("ablation")]
        if key.startswith("counted.") and isinstance(value, list | tuple) and len(value) == 2:
            value = f"{value[0]} of {value[1]}"
        if is_set(value):
            found.append((SETTING_NAMES.get(key, key) if tested else key, text(value)))
    return found


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _labels(scores: HeadScores) -> tuple[str, str]:
    """The lengths of the prompts where the labels are lengths, else some of the labels."""
    lengths = [int(label.removesuffix(LENGTH)) for label in scores.labels if re.fullmatch(rf"\d+{LENGTH}", label)]
    if lengths and len(lengths) == len(scores.labels):
        low, high = min(lengths), max(lengths)
        return "prompts", f"{len(lengths)}, each of {low:,}{f' to {high:,}' if high > low else ''}{LENGTH}"
    distinct = list(dict.fromkeys(scores.labels))
    more = f" and {len(distinct) - N_LABELS} more" if len(distinct) > N_LABELS else ""
    return "prompt labels", ", ".join(distinct[:N_LABELS]) + more
