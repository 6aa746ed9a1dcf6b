"""Figures of trials show means, intervals and draws: points for one size, lines over several."""

import json
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from run_results import SAFE_HOSTILE, ablation, curve, influence, kept_keys

import interp.plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.model.heads import Head, HeadSet
from interp.plots.style import BLUE, GREY, ORANGE

# plotly makes the attributes of its figures at run time
plots: Any = interp.plots


def title(figure) -> str:
    return figure.layout.title.text + " | " + figure.layout.title.subtitle.text


def test_conditions_of_one_size_are_points_with_a_dot_for_each_draw():
    trials = ablation()
    figure = plots.figure(trials)
    means, draws = figure.data
    assert list(means.x) == [1.0, 1 / 8, 14 / 16, 14 / 16]
    assert list(draws.x) == [1.0, 6 / 8, 7 / 8, 7 / 8]
    assert draws.text[1] == "random, set 2: 6 of 8<br>L0H0, L0H1"
    mean, low, high = trials.mean("random")
    assert means.error_x.array[2] == pytest.approx(high - mean)
    assert means.error_x.arrayminus[2] == pytest.approx(mean - low)
    assert list(means.marker.color) == [BLUE, ORANGE, BLUE, BLUE]
    assert [tick.split("<br>") for tick in figure.layout.yaxis.ticktext][:3] == [
        ["baseline", "100%"], ["top", "12%"], ["random", "88% (2 sets)"]
    ]  # fmt: skip
    assert figure.layout.xaxis.tickformat == ".0%"
    assert title(figure) == (
        "Accuracy with heads ablated | zero ablation; 8 prompts; bars: 95 % interval over prompts and random sets; "
        "small dots: single random sets"
    )


def test_conditions_of_several_sizes_are_lines_that_begin_at_the_baseline():
    trials = curve()
    figure = plots.figure(trials)
    drawn = [trace for trace in figure.data if "central" not in trace.name]
    assert [trace.name for trace in drawn] == ["induction", "random", "random by layer"]
    base = trials.mean("baseline").mean
    for trace, slope in zip(drawn, (1.0, 0.15, 0.149), strict=True):
        assert list(trace.x) == [0, 1, 3, 5]
        assert list(trace.y) == pytest.approx([base + slope * size for size in (0, 1, 3, 5)])
    assert [trace.line.color for trace in drawn] == [ORANGE, GREY, GREY]
    assert [trace.line.dash for trace in drawn] == ["solid", "dot", "dash"]
    # the band holds the means of all sets but the outermost 2.5 % at each end
    (band,) = (trace for trace in figure.data if trace.name == "random by layer, central 95 %")
    assert band.fill == "toself"
    assert list(band.x) == [1, 3, 5, 5, 3, 1]
    for size, *ends in zip((1, 3, 5), band.y[:3], band.y[:2:-1], strict=True):
        means = [base + (0.1 + 0.001 * draw) * size for draw in range(99)]
        assert ends == pytest.approx(list(numpy.quantile(means, [0.025, 0.975])))
    assert figure.layout.xaxis.title.text == "heads"
    assert figure.layout.yaxis.title.text == "loss, nats per token"
    assert title(figure).startswith("Induction: loss | zero ablation; 12 prompts")


def test_a_baseline_of_another_size_is_a_line_across():
    trials = kept_keys()
    figure = plots.trials(trials)
    assert [trace.name for trace in figure.data] == ["random", "StreamingLLM", "HeadKV-R", "baseline"]
    *selectors, base = figure.data
    for trace in selectors:
        assert list(trace.x) == [0.1, 0.4]
        assert list(trace.y) == [trials.mean(trace.name, size=size).mean for size in (0.1, 0.4)]
    assert (tuple(base.x), tuple(base.y)) == ((0.1, 0.4), (trials.mean("baseline").mean,) * 2)
    assert figure.layout.xaxis.tickformat == figure.layout.yaxis.tickformat == ".0%"
    assert "mean over tasks" in title(figure)
    assert "24 prompts" in title(figure)
    one = plots.trials(trials, "loss", "needle")
    assert one.layout.yaxis.tickformat is None
    assert "Key selectors: loss, needle | 12 prompts" in title(one)


def test_conditions_without_a_measure_are_left_out():
    figure = plots.trials(influence(), "influence")
    assert [tick.split("<br>")[0] for tick in figure.layout.yaxis.ticktext] == ["heads", "random"]
    assert len(plots.trials(influence(), "loss").layout.yaxis.ticktext) == 3


def test_text_from_outside_is_text():
    rows = tuple(replace(trial, condition=SAFE_HOSTILE) for trial in ablation().trials[1:2])
    trials = replace(ablation(), trials=(*ablation().trials, *rows), title=SAFE_HOSTILE, intervention=SAFE_HOSTILE)
    for figure in (plots.trials(trials), plots.trials(kept_keys(better=SAFE_HOSTILE))):
        text = json.dumps(json.loads(figure.to_json()), ensure_ascii=False)
        assert "<script" not in text
        assert "&lt;script" in text
        assert not {"\u2028", "\u202e"} & set(text)


def test_unknown_measures_and_tasks_are_refused():
    with pytest.raises(UsageError, match="unknown measure 'x'; choose from 'accuracy'"):
        plots.trials(ablation(), "x")
    with pytest.raises(UsageError, match="unknown task 'x'; choose from 'needle', 'new facts'"):
        plots.trials(kept_keys(), task="x")


def test_every_result_draws_itself_and_other_things_are_refused():
    table = HeadScores("induction", torch.rand(3, 2, 4))
    assert table.figure().layout.title.text == plots.head_map(table).layout.title.text
    assert "accuracy" in ablation().figure().layout.xaxis.title.text

    class Other(Result):
        pass

    with pytest.raises(UsageError, match="results of type Other have no figure; register one"):
        plots.figure(Other())
    with pytest.raises(UsageError, match="objects of type int are no results"):
        plots.figure(3)


def dose(n_sets: int = 8) -> Trials:
    """Two kinds of ablation at two sizes, each with random sets of its own, and the heads kept."""
    trials = [Trial("baseline", {"loss": (1.0, 2.0)})]
    for place, kind in enumerate(("zero", "mean")):
        for size in (1, 3):
            heads = HeadSet(tuple(Head(0, head) for head in range(size)))
            value = (2.0 * size + place, 3.0 * size)
            trials.append(Trial(f"made ({kind})", {"loss": value}, heads, size))
            trials.append(Trial(f"made kept ({kind})", {"loss": (1.0, 2.0)}, heads, size))
            trials += [
                Trial(name, {"loss": (1.0 + draw + place, 1.0)}, heads, size, draw, matched=f"{of} ({kind})")
                for name, of in (("random by layer", "made"), ("random kept", "made kept"))
                for draw in range(n_sets)
            ]
    claims: Any = {"made kept (zero)": "smaller effect", "made kept (mean)": "smaller effect"}
    return Trials(
        "made", tuple(trials), "ablations: zero, mean", control="random by layer", claim="larger effect", claims=claims
    )


def test_each_kind_of_ablation_has_a_line_and_a_band_of_its_own_random_sets():
    figure = plots.figure(dose())
    shown = [trace.name for trace in figure.data if "central" not in trace.name]
    # heads that are kept have a figure of their own
    assert shown == ["made (zero)", "made (mean)"]
    colours = {trace.name: trace.line.color for trace in figure.data}
    for kind, place in (("zero", 0), ("mean", 1)):
        (band,) = [t for t in figure.data if t.name == f"random by layer for made ({kind}), central 95 %"]
        assert band.line.color == colours[f"made ({kind})"]
        means = [(2.0 + draw + place) / 2 for draw in range(8)]
        assert [band.y[1], band.y[2]] == pytest.approx(list(numpy.quantile(means, [0.025, 0.975])))
    assert "bands: central 95 % of the random sets" in title(figure)
    kept = plots.trials(dose(), leave_out=["made (zero)", "made (mean)"])
    names = [trace.name for trace in kept.data if "central" not in trace.name]
    assert names == ["made kept (zero)", "made kept (mean)"]
    # few sets make no band
    assert not [trace for trace in plots.figure(dose(4)).data if "central" in trace.name]


def test_sets_of_different_sizes_are_rows_with_their_own_random_sets():
    trials = [Trial("baseline", {"loss": (1.0, 2.0)})]
    for name, size in (("only a", 1), ("both", 3)):
        heads = HeadSet(tuple(Head(0, head) for head in range(size)))
        trials.append(Trial(name, {"loss": (3.0, 4.0)}, heads, size))
        trials += [
            Trial("random by layer", {"loss": (float(draw), float(size))}, heads, size, draw, matched=name)
            for draw in range(3)
        ]
    made = Trials("made", tuple(trials), "zero", control="random by layer", claim="larger effect")
    means, dots = plots.figure(made).data
    rows = ["baseline", "only a (1 head)", "random by layer for only a", "both (3 heads)", "random by layer for both"]
    ticks = [tick.split("<br>")[0] for tick in plots.figure(made).layout.yaxis.ticktext]
    assert sorted(ticks) == sorted(rows)
    at = dict(zip(ticks, means.x, strict=True))
    assert at["random by layer for only a"] == pytest.approx(1.0)
    assert at["random by layer for both"] == pytest.approx(2.0)
    assert len(dots.x) == 6
