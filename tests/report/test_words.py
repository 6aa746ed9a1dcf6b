"""Sentences and tables take every number from the results."""

from dataclasses import replace

import pytest
import torch
from run_results import SAFE_HOSTILE, ablation, attention, curve, influence, kept_keys, sinks, whole

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.analyses.views.token_attention import TokenAttention
from interp.report import words
from interp.report.sections import token_attention
from interp.report.trials_tables import by_prompt, pivot, replies, replies_words, table
from interp.report.trials_words import few_words, trials_words


def plain(sentences: list[str]) -> list[str]:
    return [sentence.replace("\u00a0", " ") for sentence in sentences]


ABLATED = "Accuracy with 2 heads ablated: top 8%, random by layer {}% (mean of {} sets), random 92% (mean of 2 sets)."


@pytest.mark.parametrize(
    ("by_layer", "mean", "verdict"),
    [
        ([10, 11] * 48 + [12] * 3, 88,
         "The top heads have a larger effect than all 99 random sets matched by layer (p = 0.01): accuracy is 80 "
         "percentage points lower than the mean of these sets, a difference of 17.1 of their standard deviations."),
        ([10, 11, 1, 0, 1, 1, 12, 1], 39,
         "Not distinguishable from random heads: 5 of 8 random sets have as large an effect (p = 0.62)."),
        ([10, 11], 88, "2 random head sets allow no verdict; at least 39 are needed."),
        ([10], 83, "1 random head set allows no verdict; at least 39 are needed."),
    ],
)  # fmt: skip
def test_an_ablation_test_in_words(by_layer, mean, verdict):
    early = len(by_layer) == 8
    made = replace(ablation((12, 1, 12, 10, *by_layer), n_prompts=12), n_random_sets=99 if early else len(by_layer))
    sentences = plain(trials_words(made))
    # a null, or that there is no verdict, comes first
    base, ablated, found = sentences if verdict.startswith("The top heads") else reversed(sentences)
    assert base == "Baseline accuracy: 100%."
    drawn = f" (mean of {len(by_layer)} sets)" if len(by_layer) > 1 else ""
    assert ablated == ABLATED.replace(" (mean of {} sets)", drawn).format(mean)
    ended = " Drawing stopped after 8 of 99 planned sets, since no further set could make p \u2264 0.05."
    assert found == verdict + (ended if early else "")


def test_shares_of_few_prompts_have_no_verdict():
    made = ablation((8, 1, 8, 6, *[8] * 99))
    assert trials_words(made)[0] == "There is no verdict about shares of fewer than 10 prompts."
    assert few_words(made) == (
        "The intervals below come from only 8 prompts and are rough; use more prompts for reliable ones."
    )


def test_a_baseline_of_0_shows_nothing():
    nothing = trials_words(ablation((0,) * 6))
    assert nothing[:1] == ["Nothing could be lost, so these numbers show nothing about the other conditions."]


def test_a_curve_in_words():
    base, loss, verdict = plain(trials_words(curve()))
    mean = curve().mean("baseline").mean
    assert base == f"Baseline loss: {mean:.2f} nats per token."
    assert loss.startswith(f"Loss with 5 heads ablated: induction {mean + 5:.2f} nats per token, random by layer")
    assert verdict.startswith(
        "Induction has a larger effect than all 99 random sets matched by layer (p = 0.01): loss is 4.255 nats per "
        "token higher than the mean of these sets, a difference of "
    )
    assert few_words(curve()) == ""


def test_several_rankings_are_corrected_for_their_number():
    one = curve()
    second = [
        replace(trial, condition="sinks", values={"loss": tuple(x + 0.12 for x in trial.values["loss"])})
        for trial in one.trials if trial.condition == "baseline" for _ in (0,)
    ]  # fmt: skip
    sized = [replace(trial, size=size) for trial in second for size in (1, 3, 5)]
    sets = [replace(trial, matched="sinks") for trial in one.trials if trial.condition == "random by layer"]
    both = replace(one, trials=(*one.trials, *sized, *sets))
    corrected = "after Benjamini and Hochberg's correction for {} tests"
    # three of six tests of 99 sets have the smallest p, 0.01, and 6 x 0.01 / 3 is below 0.05
    assert plain(trials_words(both))[1:] == [
        f"Larger effect than random sets matched by layer {corrected.format(6)}: induction at 1 head, 3 heads and 5 "
        "heads.",
    ]
    assert [cell and cell["apart"] for cell in dict(pivot(both, "loss")["rows"])["induction"]] == [None, *[True] * 3]
    # of 39 sets the smallest p is 0.025, and one of three tests has it
    few = tuple(
        trial for trial in both.trials
        if trial.draw < 39 and (trial.size == 5 or not trial.size or (trial.condition, trial.size) == ("sinks", 1)
                                or (trial.matched, trial.size) == ("sinks", 1))
    )  # fmt: skip
    found = replace(both, trials=few, n_random_sets=39)
    # a null comes first
    assert plain(trials_words(found))[:2] == [
        f"No condition is distinguishable from random sets matched by layer {corrected.format(3)}.",
        "Only before the correction: induction at 5 heads.",
    ]
    assert not any(cell and cell["apart"] for _, row in pivot(found, "loss")["rows"] for cell in row)


def test_selectors_in_words_and_numbers():
    assert plain(trials_words(kept_keys(16))) == [
        "Baseline right: 81%.",
        "Furthest above random: at 10% none, as no interval is above 0; at 40% HeadKV-R, +50 points [+9, +64].",
        "The intervals hold together for all 4 comparisons with 95 % (Bonferroni's correction).",
    ]
    assert few_words(kept_keys(3)) == (
        "The intervals below come from only 3 prompts of a task and are rough; use more prompts for reliable ones."
    )
    made = kept_keys(16)
    # another one that is above random keys too, by less
    second = tuple(
        replace(
            trial, condition="SnapKV", values={**trial.values, "right": (0.7 + 0.125 * (trial.task != "needle"),) * 16}
        )
        for trial in made.trials
        if trial.condition == "HeadKV-R"
    )
    for trials in ((*second, *made.trials), (*made.trials, *second)):
        (furthest,) = (words for words in plain(trials_words(replace(made, trials=trials))) if "Furthest" in words)
        assert "at 40% HeadKV-R, +50 points" in furthest
    found = pivot(kept_keys(16), "right")
    assert found["sizes"] == ["10%", "40%", "100%"]
    rows = {name: [cell and (cell["mean"], cell["gain"], cell["apart"]) for cell in cells]
            for name, cells in found["rows"]}  # fmt: skip
    assert rows["HeadKV-R"] == [("19%", "0 points [-15, +15]", False), ("81%", "+50 points [+19, +60]", True), None]
    assert rows["baseline"] == [None, None, ("81%", "", False)]
    assert pivot(curve(), "loss")["sizes"] == ["0", "1", "3", "5"]


def test_a_table_has_one_row_for_all_random_sets():
    rows = table(ablation())
    assert [row["condition"] for row in rows] == ["baseline", "top", "random (2 sets)", "random by layer (2 sets)"]
    assert [row["count"] for row in rows] == ["8 of 8", "1 of 8", "14 of 16", "14 of 16"]
    assert [row["heads"] for row in rows[2:]] == ["2 sets"] * 2
    assert "L1H2" in rows[1]["heads"]


def test_replies_begin_with_those_that_the_heads_change_and_join_equal_ones():
    first = replies(ablation())[0]
    assert (first["number"], first["question"], first["expected"]) == (1, "which spice?", "saffron")
    assert [(right, text) for _, right, text in first["rows"]] == [(True, "it is saffron"), (False, "no idea")]
    assert first["rows"][1][0] == "top"
    assert replies(curve()) == []
    assert replies_words(curve()) == ""
    assert replies_words(ablation()) == (
        "4 of 8 prompts are shown, beginning with those where only one of baseline and top is right. Conditions with "
        "the same reply share a row. Right: the reply contains all content words of the expected answer, in order "
        "(stricter than the setting recall of retrieval). A reply ends as soon as it is certain to be right, so right "
        "replies may break off after one more word."
    )
    other = replace(ablation(), settings={"judge": "exact"})
    assert replies_words(other).endswith("Conditions with the same reply share a row.")
    few = tuple(
        replace(trial, values={"accuracy": trial.values["accuracy"][:3]}, replies=trial.replies[:3])
        for trial in ablation().trials
    )
    assert replies_words(replace(ablation(), trials=few)).startswith("All 3 prompts are shown, beginning with those")
    assert words.cut("x" * 100) == "x" * 80 + "…"


def test_prompts_are_listed_by_the_tested_condition():
    found = by_prompt(influence())
    assert found is not None
    values = [float(numbers[0]) for _, numbers in found["rows"]]
    assert values == sorted(values, reverse=True)
    assert found["conditions"] == ["heads", "random"]
    assert found["rows"][0][0].startswith("document ")
    assert by_prompt(ablation()) is None


def test_the_tokens_of_a_text_are_all_there_with_the_answer_marked():
    view = attention()
    row = token_attention.token_row(view)
    tokens = [token for run in row.runs for token in run.tokens]
    assert [place for place, _, _ in tokens] == list(range(len(view.tokens)))
    assert tokens[503][2] == 1.0
    assert [run.marks for run in row.runs if run.marks] == [("answer",)]
    assert row.table[0]["on"] == [1.0]
    assert row.weights[0] == view.weights[0].tolist()


def test_a_long_text_keeps_the_mark_and_the_strongest_tokens_and_counts_the_others():
    n = 20_000
    weights = torch.zeros(1, n)
    weights[0, 12_345] = 1.0
    row = token_attention.token_row(TokenAttention("t", ("a",) * n, ("L0H0",), weights, {"answer": ((5_000, 9_000),)}))
    kept = [i for run in row.runs for i, _, _ in run.tokens]
    assert len(kept) + sum(run.gap for run in row.runs) == n
    assert {0, 4_999, 5_000, 8_999, 12_345, n - 1} <= set(kept)
    assert len(kept) < token_attention.MAX_TOKENS
    assert len(row.weights[0]) == len(kept)
    assert row.table[0]["most"][0] == (12_345, "a", 1.0)


def test_text_from_outside_is_unchanged_in_words():
    assert SAFE_HOSTILE in " ".join(trials_words(kept_keys(16, better=SAFE_HOSTILE)))


def test_the_provenance_names_the_analysis_of_each_control():
    both = replace(curve(), title="Loss with heads ablated", settings={"sizes": [5], "prompts": "a1b2"})
    results = {"retrieval.control": ablation(), "induction.control": both, "sinks.control": both}
    found = dict(words.provenance(replace(whole(), results=whole().results | results)))
    assert [heading for heading in found if heading.startswith("Ablation test of")] == [
        "Ablation test of Retrieval: accuracy with heads ablated",
        "Ablation test of Induction: loss with heads ablated",
        "Ablation test of Sinks: loss with heads ablated",
    ]
    rows = dict(found["Ablation test of Sinks: loss with heads ablated"])
    assert rows["number of ablated heads"] == "5"
    assert rows["hash of the prompts"] == "a1b2"
    assert dict(found["Sinks"])["prompts"] == "12, each of 64 tokens"
    assert dict(found["Sinks"])["prompts used"] == "12 of 12"


def test_side_results_of_sinks_in_sentences():
    scores = sinks()
    share, keys = words.facts(replace(scores, extras=scores.extras | {"columns": torch.full((12, 6, 4), 3.0)}), None)
    assert share.startswith("When each prompt is taken alone, ")
    assert share.endswith("% of the heads are above the threshold, on average over prompts.")
    assert keys.startswith("On average over heads and prompts, 3.00 keys of a prompt receive more than 0.1 of a head's")
    assert keys.endswith("The attention to a key is averaged over all queries at or after it.")


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ({"sizes": [10], "until": None}, [("number of ablated heads", "10")]),
        ({"ablation": "zero", "kinds": ["zero", "mean"]}, [("ablation", "zero"), ("further ablations", "mean")]),
        ({"ablation": "zero", "kinds": ["zero"]}, [("ablation", "zero")]),
        (
            {"counted": {"accuracy": [18, 20]}},
            [("prompts that the unmodified model answers right", "18 of 20")],
        ),
        ({"n_random_sets": 99, "counted": {}, "prompts": ""}, [("random sets, at most", "99")]),
    ],
)
def test_settings_of_an_ablation_test_in_words(stored, shown):
    assert words.named_settings(stored, tested=True) == shown


@pytest.mark.parametrize(
    ("weighted", "end"),
    [
        ([0.5, 0.4, 0.1, 0.0], "2 heads are then above 0.3, all of them also without the weighting."),
        ([0.5, 0.1, 0.4, 0.0], "2 heads are then above 0.3, 1 of them also without the weighting."),
        ([0.5, 0.1, 0.1, 0.0], "1 head is then above 0.3."),
        ([0.2, 0.1, 0.1, 0.0], "no heads are then above 0.3."),
    ],
)
def test_scores_weighted_by_values_in_a_sentence(weighted, end):
    values, other = (torch.tensor(row)[None, None].repeat(3, 1, 1) for row in ([0.9, 0.8, 0.2, 0.1], weighted))
    (sentence,) = words.facts(HeadScores("x", values, extras={"by_value": other}), 0.3)
    assert sentence.startswith("If attention is weighted by the norm of the value vectors, the head scores correlate")
    assert sentence.endswith(f" (ranks); {end}")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, ""), (0.4, "0.4 s"), (42.4, "42 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert words.duration(seconds) == text


def sets(name: str, values: dict[str, float], matched: str, n: int = 39) -> list[Trial]:
    """Random sets whose measures differ a little."""
    return [
        Trial(name, {key: (x + 0.001 * draw,) * 2 for key, x in values.items()}, size=2, draw=draw, matched=matched)
        for draw in range(n)
    ]


def test_heads_that_are_kept_and_conditions_without_random_sets_in_words():
    trials = (
        Trial("baseline", {"loss": (1.0, 1.0)}),
        Trial("made", {"loss": (5.0, 5.0)}, size=2),
        Trial("made kept", {"loss": (1.2, 1.2)}, size=2),
        Trial("made (mean)", {"loss": (4.0, 4.0)}, size=2),
        *sets("random by layer", {"loss": 1.5}, "made"),
        *sets("random kept", {"loss": 4.5}, "made kept"),
    )
    made = Trials(
        "made", trials, "zero", control="random by layer", claim="larger effect", n_random_sets=39,
        claims={"made kept": "smaller effect"},
    )  # fmt: skip
    words = plain(trials_words(made))
    assert words[1] == "Loss with 2 heads ablated: made 5.00, random by layer 1.52 (mean of 39 sets)."
    assert words[2].startswith("Loss with 2 heads kept and the others of their role ablated: made kept 1.20, random")
    assert words[3:] == [
        "Larger effect (smaller where heads are kept) than matched random sets after Benjamini and Hochberg's "
        "correction for 2 tests: made at 2 heads; made kept at 2 heads.",
        "Conditions that were not compared with random heads: made (mean) 4.00.",
    ]
    by_name = {row["condition"]: row["sets"] for row in table(made)}
    assert by_name["made"] == "larger effect than 39 of 39, p = 0.025"
    assert by_name["made kept"] == "smaller effect than 39 of 39, p = 0.025"
    assert by_name["made (mean)"] == by_name["baseline"] == ""
    # heads that are kept and do no better than random ones
    null = replace(made, trials=tuple(replace(t, values={"loss": (4.6, 4.6)}) if t.condition == "made kept" else t
                                      for t in trials))  # fmt: skip
    assert not any("made kept at 2 heads" in each for each in trials_words(null))


def test_several_sets_and_measures_in_words():
    values = {"accuracy": 0.9, "loss": 2.0}
    trials = (
        Trial("baseline", {"accuracy": (1.0,) * 12, "loss": (1.9, 1.9)}),
        Trial("only a", {"accuracy": (0.0,) * 12, "loss": (1.9, 1.9)}, size=2),
        Trial("only b", {"accuracy": (1.0,) * 12, "loss": (7.0, 7.0)}, size=2),
        *(each for name in ("only a", "only b") for each in sets("random by layer", values, name)),
    )
    made = Trials("made", trials, "zero", control="random by layer", claim="larger effect", n_random_sets=39)
    words = plain(trials_words(made))
    corrected = "arger effect than random sets matched by layer after Benjamini and Hochberg's correction for 2 tests"
    assert words[-2:] == [f"L{corrected}: only a at 2 heads.", f"Loss: l{corrected}: only b at 2 heads."]
    rows = [(row["condition"], row["measure"], row["sets"]) for row in table(made)]
    assert ("only b", "loss", "larger effect than 39 of 39, p = 0.025") in rows
    assert ("random by layer for only b (39 sets)", "loss", "") in rows


@pytest.mark.parametrize(("lead", "verdict"), [(0.0005, "overlaps"), (0.05, "overlaps"), (0.3, "is above")])
def test_the_interval_of_the_best_head_is_compared_with_that_of_the_next(lead, verdict):
    noise = torch.linspace(-0.2, 0.2, 9)
    scores = HeadScores("made", torch.stack([0.5 + lead + 0.01 * noise, 0.5 + noise, 0.1 + noise.abs()], 1)[:, None])
    best, after = scores.top(2)
    # the interval of the best head may be above the mean of the next, and still overlap its interval
    assert (float(scores.low[best]) > scores[after]) is (lead > 0.01)
    assert (float(scores.low[best]) > float(scores.high[after])) is (verdict == "is above")
    assert f"and {verdict} that of the next head, {after}." in words.summary(scores, None).certainty
