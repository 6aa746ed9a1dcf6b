"""The cost of a run: every stage of the plan, counted by the cost that its analysis or control declares."""

import re
from dataclasses import replace

import pytest
import run_cases

from interp.analyses import memory, registry
from interp.analyses.kv.kv_curve import KEEP_RATIOS
from interp.analyses.kv.kv_tasks import KVTask
from interp.errors import CostError
from interp.runs import estimate as estimates
from interp.runs.estimate import estimate
from interp.runs.run import Run
from interp.runs.stages.analyses import settings_of


def test_every_stage_that_declares_a_cost_is_counted(model, tokenizer):
    plan = run_cases.score_plan("basic", "gradient_importance", heads="")
    cost = estimate(plan, model, tokenizer)
    stages = plan.stages(model, tokenizer)
    assert [row.name for row in cost.stages] == [stage.name for stage in stages if stage.cost is not None]
    names = [row.name for row in cost.stages]
    assert [f"{name}.control" in names for name in plan.analyses] == [True] * len(plan.analyses)
    assert cost.tokens == sum(row.cost.tokens for row in cost.stages) > 0
    assert cost.to_dict()["tokens"] == cost.tokens
    assert len(cost.to_dict()["stages"]) == len(cost.stages)
    assert len(str(cost).splitlines()) == len(cost.stages) + 2
    assert "total" in str(cost)


@pytest.mark.parametrize("name", ["retrieval", "induction", "sinks", "positional", "gradient_importance"])
def test_a_stage_costs_what_its_analysis_declares(model, tokenizer, name):
    plan = run_cases.score_plan(name, check=False)
    entry = registry.get(name)
    (row,) = (row for row in estimate(plan, model, tokenizer).stages if row.name == name)
    given = entry.prompts(plan.sizes, tokenizer)
    assert row.n_prompts == len(given)
    assert row.cost == entry.cost(model, given, plan.batch_size, settings_of(entry, plan))


@pytest.mark.parametrize("name", ["retrieval", "induction", "sinks", "gradient_importance"])
def test_a_control_costs_what_it_declares(model, tokenizer, name):
    plan = run_cases.score_plan(name, heads="")
    entry = registry.get(name)
    control = entry.control.with_sizes(plan.sizes)
    prompts = control.prompts(plan.sizes, tokenizer) or entry.prompts(plan.sizes, tokenizer)
    (row,) = (row for row in estimate(plan, model, tokenizer).stages if row.name == f"{name}.control")
    assert row.cost == control.cost(model, prompts, plan.batch_size, n_heads=2, n_random_sets=2, n_kinds=2)


def test_named_heads_are_tested_once(model, tokenizer):
    names = [row.name for row in estimate(run_cases.score_plan("sinks"), model, tokenizer).stages]
    assert "heads.control" in names
    names = [row.name for row in estimate(run_cases.score_plan("retrieval", "sinks"), model, tokenizer).stages]
    assert "heads.control" not in names
    names = [row.name for row in estimate(run_cases.score_plan("sinks", check=False), model, tokenizer).stages]
    assert not [name for name in names if name.endswith("control")]


def test_key_selectors_count_every_continuation(model, tokenizer):
    plan = run_cases.score_plan("kv", heads="")
    (row,) = (row for row in estimate(plan, model, tokenizer).stages if row.name == "kv")
    tasks = KVTask.from_whole(registry.get("kv").prompts(plan.sizes, tokenizer))
    entries = [registry.get(name, "selector") for name in registry.names("selector")]
    tested = [entry.thing() for entry in entries if not entry.baseline]
    # random keys run once for each pair of first and last keys that selectors keep in any case
    assert len(tested) == len(entries) - 1
    times = 1 + (len(tested) + len({each.forced for each in tested})) * len(KEEP_RATIOS)
    contexts = sum(sum(task.contexts.lengths) for task in tasks)
    assert row.cost.tokens == contexts + times * sum(len(rest) for task in tasks for rest in task.rest)
    assert row.cost.forward_passes == (1 + times) * sum(len(task.contexts) for task in tasks)


def test_the_sizes_of_the_plan_and_own_prompts_count(model, tokenizer):
    plan = run_cases.score_plan("sinks", check=False)
    small, large = (
        estimate(replace(plan, sizes=replace(plan.sizes, n_texts=n)), model, tokenizer).stages[0] for n in (2, 4)
    )
    assert (small.n_prompts, large.n_prompts) == (2, 4)
    assert large.cost.tokens == 2 * small.cost.tokens
    own = registry.get("sinks").prompts(replace(plan.sizes, n_texts=7), tokenizer)
    assert estimate(plan, model, tokenizer, own).stages[0].n_prompts == 7


def test_the_memory_of_gradients_is_printed(model, tokenizer):
    plan = run_cases.score_plan("gradient_importance", "sinks", check=False)
    cost = estimate(plan, model, tokenizer)
    rows = {row.name: row for row in cost.stages}
    prompts = registry.get("gradient_importance").prompts(plan.sizes, tokenizer)
    expected = memory.largest(
        memory.gradients, memory.Shape.of(model), memory.batches(prompts, plan.batch_size), {"checkpoint": True}
    )
    assert rows["gradient_importance"].cost.activation_megabytes == pytest.approx(expected / 1e6)
    assert not rows["sinks"].cost.activation_megabytes
    assert not cost.excess
    assert "activations, MB" in str(cost)
    assert f"{expected / 1e6:,.1f}" in str(cost)
    assert cost.to_dict()["free_megabytes"] > 0


def test_a_run_that_does_not_fit_is_refused_before_anything_is_computed(model, tokenizer, monkeypatch, tmp_path):
    plan = run_cases.score_plan("sinks", "gradient_importance", check=False)
    sentence = "gradient_importance needs .* for activations and 1.0 KB is free: give a smaller batch size"
    monkeypatch.setattr(estimates, "free_memory", lambda where: 1000)
    (found,) = estimate(plan, model, tokenizer).excess
    assert re.match(sentence, found)
    assert found in str(estimate(plan, model, tokenizer))
    run = Run.open(tmp_path, plan, model, tokenizer)
    with pytest.raises(CostError, match=sentence):
        run.finish()
    assert not run.scores
    monkeypatch.undo()
    finished = run.finish(progress=False)
    # a finished run is read with any memory
    monkeypatch.setattr(estimates, "free_memory", lambda where: 1000)
    assert list(run.finish(progress=False)) == list(finished)
