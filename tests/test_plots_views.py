"""Figures of joint and vocabulary views: what they say is what the views hold, and text from outside is text."""

import json
from dataclasses import replace
from typing import Any

import pytest

import interp.plots
from interp.analyses.views.logit_lens import LogitLens, OvTokens, Place, Reading, Token
from interp.analyses.views.qk_projection import Cloud, QKProjection
from interp.errors import HeadError, UsageError
from interp.plots.style import BLUE, ORANGE

# plotly makes the attributes of its figures at run time
plots: Any = interp.plots

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\u202e\x00"


def cloud(head: str, explained: tuple[float, float] | None = (0.312, 0.105)) -> Cloud:
    shift = float(head[1])
    queries = tuple((float(i) + shift, 1.0) for i in range(6))
    keys = tuple((float(-i), 2.0 + shift) for i in range(6))
    return Cloud(head, queries, keys, explained, 0.42, 0.81, 0.25, 0.125, 1.5)


def view(text: str = " the", label: str = "one", **more) -> QKProjection:
    settings: dict[str, Any] = {
        "method": "pca", "clouds": (cloud("L0H1"), cloud("L2H0")), "tokens": (text, "b", "c", "d", "e", "f"),
        "positions": (0, 1, 2, 0, 1, 5), "prompts": (0, 0, 0, 1, 1, 1), "labels": (label, "two"),
    }  # fmt: skip
    return QKProjection(**settings | more)


def written(text: str = " the", label: str = "one", logits: tuple[float, ...] = (2.0, 1.0, 0.5)) -> LogitLens:
    row = tuple(Token(text if i == 0 else f"t{i}", i, logit) for i, logit in enumerate(logits))
    down = tuple(Token("d", 9, -logit) for logit in logits)
    return LogitLens(
        ("L0H1", "L2H0"), (label, "two"), (Place(text, 3, 7), Place("x", 4, 8)), ((row, row),) * 2, ((down, down),) * 2
    )


def read(text: str = " saffron", count: int = 3) -> OvTokens:
    rows = tuple(
        Reading(Place(text, i, 10 + i), i / (count + 1), i, (Token(text, i, 1.5), Token("b", 99, 0.5)))
        for i in range(count)
    )
    return OvTokens(("L0H1", "L2H0"), ("one",), (Place("q", 1, 20),), "needle", ((rows, rows[::-1]),))


def plain(figure) -> dict:
    return json.loads(figure.to_json())


def title(figure) -> str:
    return figure.layout.title.text + " " + figure.layout.title.subtitle.text


def named(figure, name: str):
    (found,) = (trace for trace in figure.data if trace.name == name)
    return found


def test_joint_draws_every_query_and_key_where_it_is():
    joint = view()
    for head in (None, "L2H0"):
        figure = plots.qk_projection(joint, head)
        shown = joint["L0H1" if head is None else head]
        for name, dots in (("queries", shown.queries), ("keys", shown.keys)):
            trace = named(figure, name)
            assert list(zip(trace.x, trace.y, strict=True)) == list(dots)
            assert trace.text[5] == f"{shown.head}, {'query' if name == 'queries' else 'key'}<br>f<br>position 5, two"
    assert title(figure).startswith("L2H0: queries and keys")
    assert "2 prompts, 6 tokens" in title(figure)
    assert "Spearman 0.42 (0.81 in all dimensions)" in title(figure)
    assert "largest q·k for 25% of queries (chance 12%)" in title(figure)


def test_queries_and_keys_differ_in_shape_and_colour():
    queries, keys = (named(plots.qk_projection(view()), name).marker for name in ("queries", "keys"))
    assert queries.symbol != keys.symbol
    assert queries.color != keys.color
    assert {queries.color, keys.color} <= {BLUE, ORANGE}


def test_first_tokens_are_marked_in_both():
    rings = [trace for trace in plots.qk_projection(view()).data if trace.name == "first token"]
    assert [list(ring.x) for ring in rings] == [[0.0, 3.0], [0.0, -3.0]]
    assert [ring.showlegend for ring in rings] == [True, False]
    none = view(positions=(1, 2, 3, 4, 5, 6))
    assert not [trace for trace in plots.qk_projection(none).data if trace.name == "first token"]


def test_position_is_lightness_and_kind_is_hue():
    figure = plots.qk_projection(view(), color="position")
    shown = [trace for trace in figure.data if trace.text]
    assert [trace.name for trace in shown] == ["queries", "keys"]
    # the legend shows the hue, not the lightness of the first token
    assert not any(trace.showlegend for trace in shown)
    assert [trace.marker.color for trace in figure.data if trace.x == (None,)] == [BLUE, ORANGE]
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
    figure = plots.qk_projection(view(), color="prompt")
    for number, name in enumerate(("one", "two")):
        traces = [trace for trace in figure.data if trace.name == name]
        assert [trace.marker.symbol for trace in traces] == ["circle", "diamond-open"]
        assert len({trace.marker.color for trace in traces}) == 1
        assert [trace.showlegend for trace in traces] == [True, False]
        assert list(traces[0].x) == [float(i) for i in range(3 * number, 3 * number + 3)]
    assert named(figure, "queries").marker.symbol != named(figure, "keys").marker.symbol
    # too many to name
    labels = tuple(f"p{i}" for i in range(13))
    many = view(
        clouds=(Cloud("L0H0", ((0.0, 0.0),) * 13, ((1.0, 1.0),) * 13, None, None, None, None, None, 1.0),),
        tokens=("a",) * 13, positions=(1,) * 13, prompts=tuple(range(13)), labels=labels,
    )  # fmt: skip
    figure = plots.qk_projection(many, color="prompt")
    assert not any(trace.showlegend for trace in figure.data if trace.name in labels)
    assert title(figure).strip().endswith("13 prompts, 13 tokens")


def test_axes_say_how_much_they_show():
    layout = plain(plots.qk_projection(view()))["layout"]
    assert layout["xaxis"]["title"]["text"] == "component 1, 31% of variance"
    assert layout["yaxis"]["title"]["text"] == "component 2, 10% of variance"
    # near is near in both directions
    assert (layout["yaxis"]["scaleanchor"], layout["yaxis"]["scaleratio"]) == ("x", 1)
    flat = view(method="tsne", clouds=(cloud("L0H1", None),))
    assert plain(plots.qk_projection(flat))["layout"]["xaxis"]["title"]["text"] == "t-SNE 1 (no unit)"


def test_vocabulary_has_a_token_in_each_cell():
    result = written()
    figure = plots.logit_lens(result, 1)
    (cells,) = figure.data
    assert [list(row) for row in cells.text] == [["·the", "t1", "t2"]] * 2
    assert [list(row) for row in cells.z] == [[2.0, 1.0, 0.5]] * 2
    assert (cells.zmin, cells.zmax) == (0, 2.0)
    assert cells.customdata[1][0] == "L2H0<br>·the<br>+2.000 logits, rank 1"
    assert list(figure.layout.yaxis.ticktext) == ["L0H1", "L2H0"]
    assert "two; written at x (position 8); in logits, by the unembedding" in title(figure)
    lowered = plots.logit_lens(result, side="lowered").data[0]
    assert [list(row) for row in lowered.z] == [[2.0, 1.0, 0.5]] * 2
    assert lowered.customdata[0][2] == "L0H1<br>d<br>-0.500 logits, rank 3"


def test_a_lens_is_named():
    assert "layer 2 by its lens" in title(plots.logit_lens(replace(written(), lens=2)))


def test_spaces_are_seen_and_long_tokens_cut():
    (cells,) = plots.logit_lens(written("\n\t  of a long token")).data
    assert cells.text[0][0] == "↵→··of·a·l…"
    assert "<br>↵→··of·a·long·token<br>" in cells.customdata[0][0]


def test_logits_of_nothing_can_be_drawn():
    cells = plots.logit_lens(written(logits=(0.0, -1.0, -2.0))).data[0]
    assert (cells.zmin, cells.zmax) == (0, 1)


def test_ov_has_a_row_for_each_token_of_the_span():
    figure = plots.ov(read())
    (cells,) = figure.data
    assert list(figure.layout.yaxis.ticktext) == ["·saffron  0.00", "·saffron  0.25", "·saffron  0.50"]
    assert [list(row) for row in cells.text] == [["·saffron", "b"]] * 3
    assert title(figure).startswith("L0H1: what it reads")
    assert "100% of those of all prompts are among the first 5" in title(figure)
    assert plots.ov(read(), "L2H0").layout.yaxis.ticktext[0] == "·saffron  0.50"


def test_a_long_span_shows_its_most_attended_tokens_in_order():
    figure = plots.ov(read(count=50))
    shown = list(figure.layout.yaxis.ticktext)
    assert len(shown) == 30
    assert shown == [f"·saffron  {i / 51:.2f}" for i in range(20, 50)]
    assert "30 most attended of 50" in title(figure)


def test_hostile_text_is_text_in_every_figure():
    joint = view(HOSTILE, HOSTILE)
    figures = [plots.qk_projection(joint, color=color) for color in ("kind", "position", "prompt")]
    figures += [plots.logit_lens(written(HOSTILE, HOSTILE)), plots.ov(read(HOSTILE))]
    for figure in figures:
        text = json.dumps(plain(figure), ensure_ascii=False)
        assert "<script" not in text
        assert "<img" not in text
        assert "&lt;script" in text
        assert not {"\u2028", "\u202e"} & set(text)
        assert "\\u0000" not in text


def test_a_large_joint_view_stays_small():
    dots = tuple((i / 7, i / 9) for i in range(1000))
    big = view(
        clouds=(Cloud("L0H0", dots, dots, None, 0.1, 0.2, 0.3, 0.1, 1.0),), tokens=(" token",) * 1000,
        positions=tuple(range(1000)), prompts=(0,) * 1000,
    )  # fmt: skip
    assert len(str(plots.qk_projection(big).to_json())) < 250_000


def test_bad_input():
    with pytest.raises(UsageError, match="color='head'"):
        plots.qk_projection(view(), color="head")
    with pytest.raises(HeadError, match="L5H5 is not in this view"):
        plots.qk_projection(view(), "L5H5")
    with pytest.raises(UsageError, match="side='up'"):
        plots.logit_lens(written(), side="up")
    for prompt in (-1, 2):
        with pytest.raises(UsageError, match=f"prompt {prompt} of"):
            plots.logit_lens(written(), prompt)
    with pytest.raises(UsageError, match="prompt 1 of a view of 1"):
        plots.ov(read(), prompt=1)
    with pytest.raises(HeadError, match="L5H5 is not in this view"):
        plots.ov(read(), "L5H5")
