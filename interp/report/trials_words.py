"""Trials in sentences; every number is from the trials."""

import math
import re
from collections.abc import Sequence

from interp.analyses.results.intervals import Estimate
from interp.analyses.results.reply_limit import sentence_of_trials
from interp.analyses.results.set_test import MIN_COUNTED_PROMPTS, MIN_RANDOM_SETS, SetTest
from interp.analyses.results.shown_behaviour import n_items, sentences_of_counted
from interp.analyses.results.trial import BASELINE, OF_TESTED_SET, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT, TOP
from interp.analyses.results.trial_rows import sized
from interp.analyses.results.trial_tests import compared, counted
from interp.analyses.results.trials import Trials
from interp.plots import number
from interp.report.lists import joined
from interp.report.trials_notes import is_ablation

NULL = re.compile(
    r"Not distinguishable|No condition is|Nothing could be lost|There is no verdict|\d+ random head sets? allow"
)
"""beginnings of sentences that state a null, or that there is no verdict"""
CLAIMED = {"smaller effect": "as small an effect", "higher": "as high a value"}
"""how random sets compare with a tested set that they equal, by its claim; otherwise as large an effect"""
NOUNS = {"refused": "the share of refused requests", "right": "the share of right answers"}
"""measures whose name is no noun, as the subject of a sentence"""
NO_SETS = "There is no verdict, since random heads or the unmodified model were not measured."


def trials_words(result: Trials) -> list[str]:
    """The first measure of trials in sentences: baseline, tested conditions, and their difference from the controls.

    The last sentence counts the replies that ended at the limit of new tokens, where there were replies.

    Args:
        result: The trials.
    """
    ended = sentence_of_trials(result.trials, result.settings)
    counted = sentences_of_counted(result.settings, n_items(result.trials))
    found = _measured(result)
    if found[1:] and NULL.match(found[1]):
        # a null comes before the baseline and the values
        found = [*found[1:], found[0]]
        return [found[0], *counted, *found[1:], *([ended] if ended else [])]
    return [*counted, *found, *([ended] if ended else [])]


def _measured(result: Trials) -> list[str]:
    measure = result.measures[0]
    found = []
    base = _mean(result, BASELINE, measure)
    if base is not None:
        found.append(f"Baseline {measure}: {_shown(result, measure, base)}.")
        if measure in result.shares and not any(map(any, _values(result, measure))):
            return [*found, "Nothing could be lost, so these numbers show nothing about the other conditions."]
    every = [name for name in result.tested if _mean(result, name, measure) is not None]
    tested = [name for name in every if controls_of(result, name, measure, max(result.sizes(name)))] or every
    alone = _without_sets(result, measure, [name for name in every if name not in tested])
    if len(tested) > 1 and result.control in result.conditions:
        verdicts, single = _compared(result, measure), all(len(result.sizes(name)) == 1 for name in tested)
        values = [_values_of(result, name, measure) for name in tested] if single else []
        is_null = bool(verdicts) and NULL.match(verdicts[0])
        found += [*verdicts, *values] if is_null else [*values, *verdicts]
        return [*found, *_other_measures(result, tested), *alone]
    for name in tested:
        found += _condition(result, name, measure)
    return [*found, *_other_measures(result, tested), *alone]


def _other_measures(result: Trials, tested: list[str]) -> list[str]:
    """The findings on all measures but the first, of several conditions with separate random sets."""
    if len(tested) < 2 or result.claim is None:
        return []
    found = []
    for measure in result.measures[1:]:
        words = _tests(result, measure)
        found += (
            [f"{measure[:1].upper()}{measure[1:]}: {words[0][:1].lower()}{words[0][1:]}", *words[1:]] if words else []
        )
    return found


def _without_sets(result: Trials, measure: str, names: list[str]) -> list[str]:
    """Tested conditions for which no random heads were drawn, each at its largest size."""
    if not names:
        return []
    means = [(name, result.mean(name, measure, size=max(result.sizes(name)))) for name in names]
    shown = [f"{name} {_shown(result, measure, mean)}" for name, mean in means]
    return [f"Conditions that were not compared with random heads: {'; '.join(shown)}."]


def controls_of(result: Trials, name: str, measure: str, size: float) -> list[str]:
    """The control conditions that were measured for a tested condition and size.

    Args:
        result: The trials.
        name: A tested condition.
        measure: One of the measures.
        size: One of its sizes.
    """
    names = dict.fromkeys((result.control, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT))
    found = {
        (trial.condition, measure in trial.values)
        for trial in result.trials
        if trial.size == size and trial.matched in ("", name)
    }
    return [control for control in names if (control, True) in found and control != name]


def _values(result: Trials, measure: str) -> list[tuple[float, ...]]:
    return [trial.values[measure] for trial in result.trials if measure in trial.values]


def few_words(result: Trials) -> str:
    """A warning where the prompts are few; empty where they are not.

    Args:
        result: The trials.
    """
    first = result.measures[0]
    least = min(len(trial.values[first]) for trial in result.trials if first in trial.values)
    each = " of a task" if len(result.tasks) > 1 else ""
    few = 1 < least < MIN_COUNTED_PROMPTS
    if not few:
        return ""
    few_of = f"only {least} prompts{each}"
    return f"The intervals below come from {few_of} and are rough; use more prompts for reliable ones."


def _values_of(result: Trials, name: str, measure: str) -> str:
    """The values of a tested condition at its largest size, and of random conditions of that size."""
    size = max(result.sizes(name))
    controls = controls_of(result, name, measure, size)
    parts = []
    for condition in (name, *controls):
        own = None if condition == name else name
        draws = len({trial.draw for trial in result.select(condition, size, matched=own)})
        drawn = f" (mean of {draws} sets)" if draws > 1 else ""
        value = _shown(result, measure, result.mean(condition, measure, size=size, matched=own))
        parts.append(f"{condition} {value}{drawn}")
    ablated = " ablated" if is_ablation(result) and result.size_name == "heads" else ""
    ablated = " kept and the others of their role ablated" if RANDOM_KEPT in controls else ablated
    ablation = f" with {sized(result, size)}{ablated}" if size else ""
    return f"{measure[:1].upper()}{measure[1:]}{ablation}: {', '.join(parts)}."


def _condition(result: Trials, name: str, measure: str) -> list[str]:
    """One tested condition at its largest size, compared with the baseline or random conditions of that size."""
    size = max(result.sizes(name))
    sentences = [_values_of(result, name, measure)]
    if any(measure in trial.intervals for trial in result.trials):
        return sentences
    if result.claim is not None:
        test = result.set_test(name, measure, size=size)
        verdict = [NO_SETS] if test is None else set_words(result, measure, test, name, size)
        return [*verdict, *sentences] if NULL.match(verdict[0]) else [*sentences, *verdict]
    for over in controls_of(result, name, measure, size):
        gain = result.gain(name, measure, over=over, size=size)
        verdict = f", {_excludes(gain)}" if counted(result, measure) else ""
        if verdict and not gain.excludes_zero:
            sentences.insert(
                0,
                f"Not distinguishable from {over}: the difference ({name} minus {over}) is "
                f"{gain_text(result, measure, gain)}{verdict}.",
            )
            continue
        sentences.append(f"Difference from {over} ({name} minus {over}): {gain_text(result, measure, gain)}{verdict}.")
    return sentences


def set_words(result: Trials, measure: str, test: SetTest, condition: str = "", size: float | None = None) -> list[str]:
    """The test of a head set against random head sets, in sentences. A null comes first.

    Args:
        result: The trials.
        measure: The measure that was tested.
        test: The test.
        condition: The tested condition.
        size: Its size.
    """
    if not test.decided:
        sets = "1 random head set allows" if test.n_sets == 1 else f"{test.n_sets} random head sets allow"
        return [f"{sets} no verdict; at least {MIN_RANDOM_SETS} are needed."]
    if not counted(result, measure):
        few = f"shares of fewer than {MIN_COUNTED_PROMPTS} prompts" if measure in result.shares else "a single prompt"
        return [f"There is no verdict about {few}."]
    p = f"p = {test.p_value:.2g}"
    reached = test.n_sets - test.n_beyond
    claim = result.claims.get(condition, result.claim)
    claimed = CLAIMED.get(claim or "", "as large an effect")
    ended = ""
    if test.ended_early:
        n = f"{test.n_sets} of {test.n_planned}"
        ended = f" Drawing stopped after {n} planned sets, since no further set could make p \u2264 0.05."
        if not reached:
            p_value = f"p = 1/{test.n_sets + 1}"
            ended = f" Drawing stopped at the planned check after {n} sets: none of them had {claimed} ({p_value})."
    shared, n_heads = _shared_heads(result, condition, size)
    if not test.is_beyond:
        sets = f"{reached} of {test.n_sets} random sets {'has' if reached == 1 else 'have'} {claimed}"
        weak = ""
        if n_heads and shared >= n_heads / 2:
            weak = f" The random sets share {shared:.1f} of the {n_heads:g} tested heads on average"
            weak = f"{weak}, so the test has little power."
        return [f"Not distinguishable from random heads: {sets} ({p}).{ended}{weak}"]
    subject = f"{condition[:1].upper()}{condition[1:]} has" if condition and condition != TOP else "The top heads have"
    larger = f"higher {measure}" if claim == "higher" else claim
    n = f"all {test.n_sets}" if test.n_beyond == test.n_sets else f"{test.n_beyond} of {test.n_sets}"
    drawn = " matched by layer" if RANDOM_BY_LAYER in result.conditions else ""
    drawn = " of the same role" if condition in result.claims else drawn
    deviations = f", a difference of {abs(test.deviations):.1f} of their standard deviations"
    deviations = "" if math.isnan(test.deviations) else deviations
    overlap = " A set matched by layer may contain some of the tested heads." if shared else ""
    return [
        f"{subject} a {larger} than {n} random sets{drawn} ({p}): {NOUNS.get(measure, measure)} is "
        f"{compared_text(result, measure, test.difference)} than the mean of these sets{deviations}.{ended}{overlap}"
    ]


def _shared_heads(result: Trials, condition: str, size: float | None) -> tuple[float, float]:
    """The mean number of tested heads that are in a random set too, and the number of tested heads."""
    sets = [
        trial
        for trial in result.trials
        if trial.condition == RANDOM_BY_LAYER and trial.matched in ("", condition) and size in (None, trial.size)
    ]
    if not sets or result.size_name != "heads":
        return 0.0, 0.0
    return sum(trial.facts.get(OF_TESTED_SET, 0) for trial in sets) / len(sets), sets[0].size


def test_text(claim: str | None, test: SetTest) -> str:
    """The number of random sets that a tested set is beyond, in a few words.

    Args:
        claim: How the tested set is claimed to differ.
        test: The test.
    """
    return f"{claim} than {test.n_beyond} of {test.n_sets}"


def compared_text(result: Trials, measure: str, value: float) -> str:
    """How much higher or lower a measure is, as in "78 percentage points lower".

    Args:
        result: The trials.
        measure: One of its measures.
        value: The difference.
    """
    way = "lower" if value < 0 else "higher"
    if measure in result.shares:
        points = round(100 * abs(value))
        return f"{points} percentage point{'' if points == 1 else 's'} {way}"
    return f"{abs(value):.3f}{_unit(result, measure)} {way}"


def difference_text(result: Trials, measure: str, value: float) -> str:
    """A difference of a measure with its unit, in points for shares.

    Args:
        result: The trials.
        measure: One of its measures.
        value: The difference.
    """
    if measure in result.shares:
        return f"{round(100 * value):+d} points"
    return f"{value:+.3f}{_unit(result, measure)}"


def _compared(result: Trials, measure: str) -> list[str]:
    """The conditions and sizes that differ from their control, corrected for the number of comparisons."""
    if result.claim is not None:
        return _tests(result, measure)
    places = compared(result, measure)
    if not places or not counted(result, measure):
        return []
    found = result.findings(measure)
    if not found:
        return [f"No condition is distinguishable from {result.control} ({len(places)} comparisons)."]
    gains = {place: result.gain(place[0], measure, size=place[1], n_comparisons=len(places)) for place in found}
    best = []
    for size in sorted({size for _, size in places}):
        above = {name: gain for (name, at), gain in gains.items() if at == size and gain.low > 0}
        if not above:
            best.append(f"at {sized(result, size)} none, as no interval is above 0")
            continue
        first = max(above, key=lambda name: above[name].mean)
        best.append(f"at {sized(result, size)} {first}, {gain_text(result, measure, above[first])}")
    words = [f"Furthest above {result.control}: {'; '.join(best)}."]
    if below := [place for place, gain in gains.items() if gain.high < 0]:
        words.append(f"Below {result.control}: {_named_sizes(result, below)}.")
    together = f"for all {len(places)} comparisons with 95\u00a0% (Bonferroni's correction)"
    return [*words, f"The intervals hold together {together}."]


def _tests(result: Trials, measure: str) -> list[str]:
    """The tests of all conditions and sizes against random head sets."""
    tests = {
        place: test
        for place in compared(result, measure)
        if (test := result.set_test(place[0], measure, size=place[1])) is not None
    }
    decided = {place: test for place, test in tests.items() if test.decided}
    if not decided or not counted(result, measure):
        return set_words(result, measure, next(iter(tests.values()))) if tests else []
    beyond, n = result.findings(measure), len(decided)
    single = [place for place, test in decided.items() if test.is_beyond and place not in beyond]
    corrected = f"after Benjamini and Hochberg's correction for {n} tests"
    if not beyond and not single:
        return [f"No condition is distinguishable from {_control_sets(result)} ({n} tests)."]
    found = []
    if beyond:
        larger = f"{(result.claim or '')[:1].upper()}{(result.claim or '')[1:]}"
        kept = " (smaller where heads are kept)" if result.claims else ""
        found.append(f"{larger}{kept} than {_control_sets(result)} {corrected}: {_named_sizes(result, beyond)}.")
    else:
        found.append(f"No condition is distinguishable from {_control_sets(result)} {corrected}.")
    if single:
        found.append(f"Only before the correction: {_named_sizes(result, single)}.")
    return found


def _control_sets(result: Trials) -> str:
    if result.claims:
        return "matched random sets"
    return "random sets matched by layer" if RANDOM_BY_LAYER in result.conditions else "random sets"


def _named_sizes(result: Trials, keys: Sequence[tuple[str, float]]) -> str:
    names = dict.fromkeys(name for name, _ in keys)
    return "; ".join(
        f"{name} at {joined([sized(result, size) for other, size in sorted(keys) if other == name])}" for name in names
    )


def gain_text(result: Trials, measure: str, gain: Estimate, with_unit: bool = True) -> str:
    """A difference and its interval, in points for shares.

    Args:
        result: The trials.
        measure: One of its measures.
        gain: The difference.
        with_unit: Add the unit of the measure.
    """
    if measure in result.shares:
        if math.isnan(gain.low):
            return difference_text(result, measure, gain.mean)
        points = [f"{round(100 * value):+d}" if round(100 * value) else "0" for value in gain]
        return f"{points[0]} points [{points[1]}, {points[2]}]"
    unit = _unit(result, measure) if with_unit else ""
    interval = "" if math.isnan(gain.low) else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"{gain.mean:+.3f}{unit}{interval}"


def _excludes(gain: Estimate) -> str:
    return f"the 95\u00a0% interval {'excludes' if gain.excludes_zero else 'includes'} 0"


def _mean(result: Trials, condition: str, measure: str) -> Estimate | None:
    if condition not in result.conditions:
        return None
    size = max(result.sizes(condition))
    return result.mean(condition, measure, size=size) if _held(result, condition, measure, size) else None


def _held(result: Trials, condition: str, measure: str, size: float) -> bool:
    return all(measure in trial.values for trial in result.select(condition, size))


def _shown(result: Trials, measure: str, value: Estimate) -> str:
    """A mean, as a share in percent, or with its unit."""
    if measure in result.shares:
        return f"{value.mean:.0%}"
    return f"{number(value.mean)}{_unit(result, measure)}"


def _unit(result: Trials, measure: str) -> str:
    unit = result.units.get(measure, "")
    return f" {unit}" if unit else ""
