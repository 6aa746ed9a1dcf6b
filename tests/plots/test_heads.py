"""Figures of score tables show their numbers, and text from outside as text."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import interp.plots
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError

# plotly makes the attributes of its figures at run time
plots: Any = interp.plots

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\u202e\x00"


def scores(seed: int = 0, name: str = "retrieval", threshold: float | None = 0.5, **more) -> HeadScores:
    values = torch.rand(8, 4, 3, generator=torch.Generator().manual_seed(seed))
    return HeadScores(name, values, unit="hits per token", threshold=threshold, **more)


def title(figure) -> str:
    return figure.layout.title.text + " " + figure.layout.title.subtitle.text


def plain(figure) -> dict:
    return json.loads(figure.to_json())


def test_head_map_holds_every_head_once_with_its_numbers():
    table = scores()
    figure = plots.head_map(table)
    cells = figure.data[0]
    assert np.array_equal(cells.z, table.values.T.numpy())
    assert cells.z.dtype == np.float32
    low, high = float(table.low[3, 1]), float(table.high[3, 1])
    assert cells.text[1][3].startswith(f"L3H1<br>{table['L3H1']:.3f} [{low:.3f}, {high:.3f}]")
    assert f"above 0.5 ({len(table.heads())} of 12 heads)" in title(figure)
    assert "hits per token" in title(figure)


def test_the_outline_runs_around_the_heads_above_the_threshold_and_no_others():
    values = torch.zeros(2, 4, 3)
    values[:, 1, 1] = values[:, 2, 1] = 1.0
    outline = plots.head_map(HeadScores("x", values, threshold=0.5)).data[1]
    points = {(x, y) for x, y in zip(outline.x, outline.y, strict=True) if x is not None}
    assert points == {(x, y) for x in (0.5, 1.5, 2.5) for y in (0.5, 1.5)}
    # two neighbours have six sides to the outside; each piece is two points and a gap
    assert len(outline.x) == 6 * 3


def test_a_head_without_a_score_is_a_gap():
    values = scores().per_prompt.clone()
    values[:, 2, 0] = torch.nan
    figure = plots.head_map(HeadScores("x", values))
    assert math.isnan(figure.data[0].z[0][2])
    assert figure.data[0].text[0][2] == "L2H0<br>no prompt counts"
    assert len(figure.data) == 1


def test_a_table_without_any_score_can_be_drawn():
    empty = HeadScores("x", torch.full((2, 4, 3), torch.nan), threshold=0.1)
    assert plain(plots.head_map(empty))["layout"]["coloraxis"]["cmax"] == 1.0
    assert len(plots.top_heads(empty).data[0].x) == 0


def test_top_heads_are_ordered_with_their_intervals():
    table = scores()
    figure = plots.top_heads(table, 5)
    dots, best = figure.data[0], table.top(5)
    assert np.allclose(dots.x, [table[head] for head in best])
    assert [text.split("<br>")[0] for text in dots.text] == [str(head) for head in best]
    assert np.allclose(dots.x + dots.error_x.array, [float(table.high[head]) for head in best])
    assert np.allclose(dots.x - dots.error_x.arrayminus, [float(table.low[head]) for head in best])
    layout = plain(figure)["layout"]
    assert layout["yaxis"]["ticktext"][0].startswith(str(best[0]))
    assert layout["shapes"][0]["x0"] == 0.5


def test_one_prompt_has_no_bars():
    dots = plots.top_heads(HeadScores("x", torch.rand(1, 4, 3))).data[0]
    assert not np.any(dots.error_x.array)
    assert "[" not in dots.text[0]


def test_scatter_shows_the_numbers_of_compare():
    one, other = scores(0), scores(1, "induction")
    figure, agreed = plots.scatter(one, other, 4), one.compare(other, 4)
    assert f"Spearman {plots.number(agreed.spearman)}" in title(figure)
    assert f"The two top 4 share {agreed.overlap} head" in title(figure)
    chances = [plots.number(value) for value in (agreed.expected_overlap, agreed.expected_within_layers)]
    within = f"{chances[1]} for random lists with the same number of heads in each layer"
    assert f"Expected: {chances[0]} for random lists; {within}" in title(figure)
    depth = plots.number(agreed.depth_overlap)
    assert f"{depth} if heads were ranked by their layer" in title(figure)
    found = {
        name: (x, y)
        for trace in figure.data
        for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }  # fmt: skip
    assert len(found) == 12
    assert found["L2H1"] == pytest.approx((one["L2H1"], other["L2H1"]))
    shared = [trace for trace in figure.data if trace.name == "in both top 4"]
    assert sum(len(trace.x) for trace in shared) == agreed.overlap


def test_threshold_curves_draw_the_numbers_of_the_table():
    table = scores()
    points, figure = table.threshold_curve(), plots.threshold_curve(table)
    above, confident = figure.data
    assert list(above.x) == list(confident.x) == [point.threshold for point in points]
    assert list(above.y) == [point.above for point in points]
    assert list(confident.y) == [point.confident for point in points]
    assert plain(figure)["layout"]["shapes"][0]["x0"] == 0.5
    assert plain(plots.threshold_curve(table, 0.2))["layout"]["shapes"][0]["x0"] == 0.2


def test_positions_average_over_prompts_and_leave_out_missing_values():
    received = torch.rand(8, 4, 3, 5)
    received[:4, :, :, 4] = torch.nan
    table = scores(name="sinks", extras={"positions": received})
    figure = plots.positions(table, 2)
    best = table.top(1)[0]
    assert [trace.name for trace in figure.data] == [*map(str, table.top(2)), "all heads"]
    assert np.allclose(figure.data[0].y, received.nanmean(0)[best].numpy())
    assert np.allclose(figure.data[2].y, received.nanmean((0, 1, 2)).numpy(), atol=1e-6)


def test_positions_need_the_scores_of_sinks():
    with pytest.raises(UsageError, match=r"identify\.sinks"):
        plots.positions(scores())


def test_hostile_names_are_text_in_every_figure():
    one = HeadScores(
        HOSTILE, scores().per_prompt, unit=HOSTILE, threshold=0.5, extras={"positions": torch.rand(8, 4, 3, 5)}
    )
    figures = [
        plots.head_map(one), plots.top_heads(one), plots.scatter(one, scores(1), 4), plots.positions(one),
    ]  # fmt: skip
    for figure in figures:
        text = json.dumps(plain(figure), ensure_ascii=False)
        assert "<script" not in text
        assert "<img" not in text
        assert "&lt;script" in text
        assert not {"\u2028", "\u202e"} & set(text)
        assert "\\u0000" not in text


def test_a_map_of_many_heads_stays_small():
    big = HeadScores("retrieval", torch.rand(3, 80, 64), threshold=0.5)
    assert len(str(plots.head_map(big).to_json())) < 1_000_000


@pytest.mark.parametrize(
    ("value", "text"), [(0.614, "0.61"), (0.0, "0.00"), (0.0142, "0.014"), (2e-5, "2e-05"), (math.nan, "–")]
)
def test_numbers(value, text):
    assert plots.number(value) == text


def test_a_long_unit_is_broken_into_lines():
    scores = HeadScores("made", torch.rand(3, 2, 4), unit="attention on the <answer>, summed over copied tokens")
    title = plots.top_heads(scores).layout.xaxis.title.text
    assert title == "attention on the &lt;answer&gt;,<br>summed over copied tokens"


def test_rankings_draw_the_correlation_below_and_the_shared_share_above():
    tables = {name: scores(seed, name) for seed, name in enumerate(("retrieval", "induction", "sinks"))}
    figure = plots.rankings(tables, 5)
    (cells,) = figure.data
    names = list(tables)
    for i in range(3):
        assert cells.z[i][i] is None
        for j in range(i + 1, 3):
            agreed = tables[names[i]].compare(tables[names[j]], 5)
            assert cells.z[j][i] == agreed.spearman
            assert cells.z[i][j] == agreed.overlap / 5
            assert f"{agreed.spearman:.2f}" in cells.text[j][i]
            assert cells.text[i][j].startswith(f"{agreed.overlap} of 5<br>chance {agreed.expected_overlap:.1f}, ")
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext)


def test_bars_end_where_the_intervals_do():
    """Intervals of scores near their bounds are cut off, so that a bar is longer to one side."""
    values = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(2)) ** 0.2
    table = HeadScores("retrieval", values, unit="share")
    best = table.top(6)
    (dots,) = plots.top_heads(table, 6).data
    upper, lower = (np.array(each) for each in (dots.error_x.array, dots.error_x.arrayminus))
    assert not np.allclose(upper, lower)
    assert np.allclose(dots.x + upper, [float(table.high[head]) for head in best])
    assert np.allclose(dots.x - lower, [float(table.low[head]) for head in best])
