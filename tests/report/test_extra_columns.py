"""Computed controls next to the score: the column, the sentence, and a null that comes first."""

from dataclasses import replace

import pytest
import torch
from html_page import Page
from run_results import HEADS, LAYERS, N_PROMPTS, rand, run, table

from interp.analyses import registry
from interp.report import render
from interp.report.extra_columns import extra_columns

CONTROLS = [(entry.name, extra) for entry in registry.entries() for extra in entry.control_extras]


@pytest.mark.parametrize(("name", "extra"), CONTROLS)
@pytest.mark.parametrize("real", [True, False])
def test_a_control_is_a_column_and_a_sentence(name, extra, real):
    scores = table(name, 0)
    # the best head scores 0.6 more than others; in the null its control scores as much
    noise = rand(N_PROMPTS, LAYERS, HEADS, seed=5) * 0.2
    control = noise if real else noise + scores.per_prompt - scores.per_prompt.mean(0)
    control = control if real else control - control.mean(0) + scores.per_prompt.mean(0)
    scores = replace(scores, extras={extra: control})
    heads = scores.top(3)
    (column,) = extra_columns(name, scores, heads)
    assert column.title == registry.get(name).control_extras[extra]
    assert column.values == pytest.approx([float(control.double().mean(0)[head]) for head in heads], abs=1e-6)
    where = f"the control ({column.title[:1].lower()}{column.title[1:]})"
    if real:
        assert column.words == f"Of the 3 leading heads, 1 scores confidently higher than {where}."
    else:
        assert column.words.startswith(f"None of the 3 leading heads is distinguishable from {where}")
    page = Page(render(run({name: scores}))).words
    assert column.title in page
    (digest,) = (part for part in page.split("Prompts used")[1:2])
    assert digest.split(" of 12 ")[1].startswith(extra_columns(name, scores, scores.top(10))[0].words[:25])


def test_prompts_that_do_not_count_are_left_out():
    scores = table("concept_induction", 0)
    values, control = scores.per_prompt.clone(), rand(N_PROMPTS, LAYERS, HEADS, seed=5)
    values[0], control[0] = torch.nan, torch.nan
    control[:, 0, 0] = torch.nan
    scores = replace(scores, per_prompt=values, extras={"control": control})
    (column,) = extra_columns("concept_induction", scores, [*scores.top(1), scores.top(24)[-1]])
    assert column.values[0] == column.values[0]
    (empty,) = extra_columns("concept_induction", scores, [])
    assert (empty.values, empty.words) == ((), "")


def test_other_extras_are_columns_without_a_verdict():
    extras = {"oracle": rand(N_PROMPTS, LAYERS, HEADS, seed=1), "agreement": rand(N_PROMPTS, LAYERS, HEADS, seed=2)}
    scores = replace(table("qada", 0), extras={**extras, "sparsity": rand(N_PROMPTS, LAYERS, HEADS, 7)})
    found = extra_columns("qada", scores, scores.top(2))
    assert [(column.title, column.words) for column in found] == [("By the true sum", ""), ("Same label", "")]
    assert extra_columns("retrieval", scores, scores.top(2)) == []
    assert extra_columns("unknown", scores, scores.top(2)) == []


def test_no_head_above_the_threshold_is_the_first_sentence():
    low = replace(table("retrieval", 0, 0.1), threshold=2.0)
    words = Page(render(run({"retrieval": low}))).words
    assert "No head is above 2. L1H2 has the highest score" in words
    noisy = table("retrieval", 0, 0.1)
    values = torch.zeros_like(noisy.per_prompt)
    values[0, 1, 2] = 9.0
    words = Page(render(run({"retrieval": replace(noisy, per_prompt=values)}))).words
    assert "No head is confidently above 0.1. L1H2 has the highest score" in words
