"""Figures of the tokens that heads write show those of the views, and text from outside as text."""

import json
from dataclasses import replace
from typing import Any

import pytest
from run_results import SAFE_HOSTILE, lens, ov

import interp.plots
from interp.errors import HeadError, UsageError

# plotly makes the attributes of its figures at run time
plots: Any = interp.plots


def plain(figure) -> dict:
    return json.loads(figure.to_json())


def title(figure) -> str:
    return figure.layout.title.text + " " + figure.layout.title.subtitle.text


def test_a_lens_has_a_token_in_each_cell():
    result = lens()
    figure = plots.logit_lens(result, 1)
    (cells,) = figure.data
    assert [list(row) for row in cells.text] == [["·the", "t1", "t2"]] * 2
    assert [list(row) for row in cells.z] == [[2.0, 1.0, 0.5]] * 2
    assert (cells.zmin, cells.zmax) == (0, 2.0)
    assert cells.customdata[1][0] == "L2H0<br>·the<br>+2.000 logits, rank 1"
    assert list(figure.layout.yaxis.ticktext) == ["L0H1", "L2H0"]
    assert "two; written at x (position 8); in logits, through the unembedding" in title(figure)
    lowered = plots.logit_lens(result, side="lowered").data[0]
    assert [list(row) for row in lowered.z] == [[2.0, 1.0, 0.5]] * 2
    assert lowered.customdata[0][2] == "L0H1<br>d<br>-0.500 logits, rank 3"


def test_a_lens_is_named():
    assert "layer 2 through its lens" in title(plots.logit_lens(replace(lens(), lens=2)))


def test_spaces_are_seen_and_long_tokens_cut():
    (cells,) = plots.logit_lens(lens("\n\t  of a long token")).data
    assert cells.text[0][0] == "↵→··of·a·l…"
    assert "<br>↵→··of·a·long·token<br>" in cells.customdata[0][0]


def test_logits_of_nothing_can_be_drawn():
    cells = plots.logit_lens(lens(logits=(0.0, -1.0, -2.0))).data[0]
    assert (cells.zmin, cells.zmax) == (0, 1)


def test_ov_has_a_row_for_each_token_of_the_span():
    figure = plots.ov(ov())
    (cells,) = figure.data
    assert list(figure.layout.yaxis.ticktext) == ["·saffron  0.00", "·saffron  0.25", "·saffron  0.50"]
    assert [list(row) for row in cells.text] == [["·saffron", "b"]] * 3
    assert title(figure).startswith("L0H1: tokens that it would write")
    assert "100% of those of all prompts are among the first 5" in title(figure)
    assert plots.ov(ov(), "L2H0").layout.yaxis.ticktext[0] == "·saffron  0.50"


def test_a_long_span_shows_its_most_attended_tokens_in_order():
    figure = plots.ov(ov(count=50))
    shown = list(figure.layout.yaxis.ticktext)
    assert len(shown) == 30
    assert shown == [f"·saffron  {i / 51:.2f}" for i in range(20, 50)]
    assert "30 most attended of 50" in title(figure)


def test_text_from_outside_is_text():
    for figure in (plots.logit_lens(lens(SAFE_HOSTILE, SAFE_HOSTILE)), plots.ov(ov(SAFE_HOSTILE))):
        text = json.dumps(plain(figure), ensure_ascii=False)
        assert "<script" not in text
        assert "&lt;script" in text
        assert not {"\u2028", "\u202e"} & set(text)


def test_unknown_sides_prompts_and_heads_are_refused():
    with pytest.raises(UsageError, match="unknown side 'up'; choose from 'raised', 'lowered'"):
        plots.logit_lens(lens(), side="up")
    for prompt in (-1, 2):
        with pytest.raises(UsageError, match=f"prompt {prompt} of a view of 2; give a number from 0 to 1"):
            plots.logit_lens(lens(), prompt)
    with pytest.raises(UsageError, match="prompt 1 of a view of 1"):
        plots.ov(ov(), prompt=1)
    with pytest.raises(HeadError, match="L5H5 is not in this view"):
        plots.ov(ov(), "L5H5")
