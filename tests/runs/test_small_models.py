"""A model of few heads: a run is refused before anything is scored, or it ends with all its results."""

from dataclasses import replace

import pytest
import run_cases
import torch

import interp
from interp.analyses import registry
from interp.analyses.causal.controls import loss
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.runs.run import Run
from interp.runs.safety import SafetyPlan

LAYOUT = HeadLayout(layers=2, heads=4, kv_heads=2)
PLAIN = ("induction", "sinks", "gradient_importance")
MOST = LAYOUT.size // 2


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("n_heads", [MOST, 10])
def test_a_run_ends_or_is_refused_before_it_scores(model, tokenizer, tmp_path, name, n_heads):
    plan = run_cases.score_plan(name, heads="", n_heads=n_heads)
    if max(registry.get(name).control.head_counts(n_heads, LAYOUT)) > MOST:
        with pytest.raises(UsageError, match="leave too few for a random control"):
            Run.open(tmp_path / "run", plan, model, tokenizer)
        assert not (tmp_path / "run").exists()
        return
    found = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    assert f"{name}.control" in found
    assert not found.missing


def test_every_control_is_checked_before_the_run(model, tokenizer):
    """No control of the registry asks for more heads than the check allows."""
    named = [entry for entry in registry.entries() if entry.control is not None and entry.prompts is not None]
    tested = {entry.name: entry.control for entry in named if not entry.needs and entry.inputs is None}
    assert len(tested) >= 10
    for name, control in tested.items():
        for n_heads in (1, 2, 3, 4, 5, 8, 10, 100):
            most = max(control.head_counts(n_heads, LAYOUT))
            plan = replace(run_cases.score_plan(name, heads=""), n_heads=n_heads)
            if most > MOST:
                with pytest.raises(UsageError, match=f"{most} ablated heads of 8 leave too few"):
                    plan.stages(model, tokenizer)


def table(n_ranked):
    """Scores of 8 heads, of which all but the first share the lowest."""
    values = torch.zeros(2, 2, 4)
    values.flatten(1)[:, :n_ranked] = torch.arange(n_ranked, 0.0, -1.0)
    return HeadScores("table", values, kv_heads=2)


@pytest.mark.parametrize("n_ranked", [1, 2, 3, 8])
@pytest.mark.parametrize("control", [loss(), loss(n_tokens=300)])
def test_a_table_that_ranks_few_heads_is_tested_on_these(model, tokenizer, control, n_ranked):
    prompts = interp.Prompts.encode(tokenizer, ["The cat sat on the mat.", "A dog ran through a door."])
    found = control(model, prompts, table(n_ranked), n_heads=4, n_random_sets=2)
    assert max(found.sizes("top")) == min(n_ranked, max(control.head_counts(4, LAYOUT)))


@pytest.mark.parametrize("sizes", [(5,), (10, 20)])
def test_a_safety_run_needs_a_size_that_fits(model, tokenizer, sizes):
    with pytest.raises(UsageError, match="are all more than half of the 8 heads of this model"):
        SafetyPlan(head_set_sizes=sizes).stages(model, tokenizer)
