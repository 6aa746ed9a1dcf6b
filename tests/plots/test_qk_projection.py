"""Figures of projected queries and keys show the coordinates of the view, and text from outside as text."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from run_results import SAFE_HOSTILE, cloud, projection

import interp.plots
from interp.analyses.views.qk_projection import Cloud
from interp.errors import HeadError, UsageError
from interp.plots.style import BLUE, ORANGE

# plotly makes the attributes of its figures at run time
plots: Any = interp.plots


def plain(figure) -> dict:
    return json.loads(figure.to_json())


def title(figure) -> str:
    return figure.layout.title.text + " " + figure.layout.title.subtitle.text


def named(figure, name: str):
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def test_a_projection_draws_every_query_and_key_where_it_is():
    view = projection()
    for head in (None, "L2H0"):
        figure = plots.qk_projection(view, head)
        shown = view["L0H1" if head is None else head]
        for name, dots in (("queries", shown.queries), ("keys", shown.keys)):
            trace = named(figure, name)
            assert np.allclose(np.stack([trace.x, trace.y], 1), dots)
            assert trace.text[5] == f"{shown.head}, {'query' if name == 'queries' else 'key'}<br>f<br>position 5, two"
    assert title(figure).startswith("L2H0: queries and keys")
    assert "2 prompts, 6 tokens" in title(figure)
    assert "Spearman 0.42 (0.81 in all dimensions)" in title(figure)
    assert "largest q·k for 25% of queries (chance 12%)" in title(figure)


def test_queries_and_keys_differ_in_shape_and_colour():
    queries, keys = (named(plots.qk_projection(projection()), name).marker for name in ("queries", "keys"))
    assert queries.symbol != keys.symbol
    assert queries.color != keys.color
    assert {queries.color, keys.color} <= {BLUE, ORANGE}


def test_first_tokens_are_marked_in_both():
    rings = [trace for trace in plots.qk_projection(projection()).data if trace.name == "first token"]
    assert [list(ring.x) for ring in rings] == [[0.0, 3.0], [0.0, -3.0]]
    assert [ring.showlegend for ring in rings] == [True, False]
    none = projection(positions=torch.arange(1, 7))
    assert not [trace for trace in plots.qk_projection(none).data if trace.name == "first token"]


def test_position_is_lightness_and_kind_is_hue():
    figure = plots.qk_projection(projection(), color="position")
    shown = [trace for trace in figure.data if trace.text]
    assert [trace.name for trace in shown] == ["queries", "keys"]
    # the legend shows the hue, not the lightness of the first token
    assert not any(trace.showlegend for trace in shown)
    assert [trace.marker.color for trace in figure.data if tuple(trace.x) == (None,)] == [BLUE, ORANGE]
    assert "darker: later in the prompt" in title(figure)
    queries, keys = (trace.marker for trace in shown)
    assert list(queries.color) == list(keys.color) == [0, 1, 2, 0, 1, 5]
    assert queries.colorscale != keys.colorscale
    for marker in (queries, keys):
        steps = [step for step, _ in marker.colorscale]
        assert steps[0] == 0
        assert steps[-1] == 1
        assert steps == sorted(steps)
        assert (marker.cmin, marker.cmax) == (0, 5)


def test_prompts_have_a_colour_each_and_one_place_in_the_legend():
    figure = plots.qk_projection(projection(), color="prompt")
    for number, name in enumerate(("one", "two")):
        traces = [trace for trace in figure.data if trace.name == name]
        assert [trace.marker.symbol for trace in traces] == ["circle", "diamond-open"]
        assert len({trace.marker.color for trace in traces}) == 1
        assert [trace.showlegend for trace in traces] == [True, False]
        assert list(traces[0].x) == [float(i) for i in range(3 * number, 3 * number + 3)]
    assert named(figure, "queries").marker.symbol != named(figure, "keys").marker.symbol
    # too many to name
    labels = tuple(f"p{i}" for i in range(13))
    many = projection(
        clouds=(Cloud("L0H0", torch.zeros(13, 2), torch.ones(13, 2), None, None, None, None, None, 1.0),),
        tokens=("a",) * 13, positions=torch.ones(13, dtype=torch.int64), prompts=torch.arange(13), labels=labels,
    )  # fmt: skip
    figure = plots.qk_projection(many, color="prompt")
    assert not any(trace.showlegend for trace in figure.data if trace.name in labels)
    assert title(figure).strip().endswith("13 prompts, 13 tokens")


def test_axes_say_how_much_they_show():
    layout = plain(plots.qk_projection(projection()))["layout"]
    assert layout["xaxis"]["title"]["text"] == "component 1, 31% of variance"
    assert layout["yaxis"]["title"]["text"] == "component 2, 10% of variance"
    # near is near in both directions
    assert (layout["yaxis"]["scaleanchor"], layout["yaxis"]["scaleratio"]) == ("x", 1)
    flat = projection(method="tsne", clouds=(cloud("L0H1", None),))
    assert plain(plots.qk_projection(flat))["layout"]["xaxis"]["title"]["text"] == "t-SNE 1 (no unit)"


def test_text_from_outside_is_text():
    view = projection(SAFE_HOSTILE, SAFE_HOSTILE)
    for color in ("kind", "position", "prompt"):
        text = json.dumps(plain(plots.qk_projection(view, color=color)), ensure_ascii=False)
        assert "<script" not in text
        assert "&lt;script" in text
        assert not {"\u2028", "\u202e"} & set(text)


def test_a_large_projection_stays_small():
    dots = torch.stack([torch.arange(1000) / 7, torch.arange(1000) / 9], 1)
    big = projection(
        clouds=(Cloud("L0H0", dots, dots, None, 0.1, 0.2, 0.3, 0.1, 1.0),), tokens=(" token",) * 1000,
        positions=torch.arange(1000), prompts=torch.zeros(1000, dtype=torch.int64),
    )  # fmt: skip
    assert len(str(plots.qk_projection(big).to_json())) < 250_000


def test_unknown_colors_and_heads_are_refused():
    with pytest.raises(UsageError, match="unknown color 'head'; choose from 'kind', 'position', 'prompt'"):
        plots.qk_projection(projection(), color="head")
    with pytest.raises(HeadError, match="L5H5 is not in this view; choose from L0H1, L2H0"):
        plots.qk_projection(projection(), "L5H5")
