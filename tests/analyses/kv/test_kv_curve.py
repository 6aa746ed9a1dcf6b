"""The evaluation of selectors: its tasks, against literal forwards, and its control."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny_chat_model
import torch

from interp.analyses import registry
from interp.analyses.kv.kv_curve import kv_curve
from interp.analyses.kv.kv_selection import _prompts, kv_selection
from interp.analyses.kv.kv_tasks import KVTask, kv_tasks
from interp.analyses.kv.random_keys import RandomKeys
from interp.analyses.kv.selectors_of import selectors_of
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.intervals import pooled_mean
from interp.analyses.results.trials import Trials
from interp.errors import PromptError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families

SELECTORS: dict[str, Any] = {
    "random": lambda ratio: RandomKeys(ratio, n_sink=1, n_recent=1),
    "streaming": lambda ratio: Streaming(ratio, n_sink=1, n_recent=1),
    "snapkv": lambda ratio: SnapKV(ratio, n_sink=1, n_recent=1, window=4, kernel_size=3),
}


def task(rows: int = 3, name: str = "made") -> KVTask:
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts.from_ids([torch.randint(5, 60, (30 + 4 * i,), generator=draw).tolist() for i in range(rows)])
    return KVTask.cut(
        name, prompts, [20 + 2 * i for i in range(rows)], [[7, 8, 9 + i][: 2 + i % 2] for i in range(rows)]
    )


@pytest.fixture(scope="module")
def curve() -> Trials:
    return kv_curve(families.make("llama"), [task()], SELECTORS, keep_ratios=(0.3, 0.6), batch_size=2)


@torch.no_grad()
def test_the_baseline_is_the_plain_model(curve):
    model: Any = families.make("llama")
    given = task()
    (trial,) = curve.select("baseline")
    for row, (context, rest, count) in enumerate(zip(given.contexts, given.rest, given.answers, strict=True)):
        ids = torch.tensor([[*context.ids, *rest]])
        logits = model(ids).logits[0, -count - 1 : -1].float()
        wanted = ids[0, -count:]
        expected = float(torch.nn.functional.cross_entropy(logits, wanted))
        assert trial.values["loss"][row] == pytest.approx(expected, abs=1e-4)
        assert trial.values["right"][row] == float((logits.argmax(-1) == wanted).float().mean())


def test_every_selector_keeps_its_share_and_loses_something(curve):
    assert curve.conditions == ("baseline", *SELECTORS)
    assert curve.tested == ("streaming", "snapkv")
    assert curve.measures == ("right", "loss")
    (whole,) = curve.select("baseline")
    assert (whole.size, whole.facts["kept"]) == (1.0, 1.0)
    for name in SELECTORS:
        assert curve.sizes(name) == (0.3, 0.6)
        for ratio in (0.3, 0.6):
            for trial in curve.select(name, ratio):
                # a key more or less of some twenty
                assert trial.facts["kept"] == pytest.approx(ratio, abs=0.03)
                assert trial.values["loss"] != whole.values["loss"]
    # these two keep different last keys in any case
    assert [trial.matched for trial in curve.select("random", 0.3)] == ["streaming", "snapkv"]


def test_batches_and_their_padding_change_nothing(curve):
    alone = kv_curve(families.make("llama"), [task()], SELECTORS, keep_ratios=(0.3, 0.6), batch_size=1)
    for one, other in zip(curve.trials, alone.trials, strict=True):
        assert one.values["loss"] == pytest.approx(other.values["loss"], abs=1e-4)


def test_a_ratio_of_one_is_the_baseline():
    curve = kv_curve(families.make("llama"), [task()], SELECTORS, keep_ratios=(0.5, 1.0))
    for name in SELECTORS:
        assert curve.mean(name, "loss", size=1.0) == curve.mean("baseline", "loss")


@pytest.mark.parametrize("wrong", [{"tasks": []}, {"keep_ratios": ()}, {"batch_size": 0}], ids=str)
def test_nothing_to_evaluate_is_refused(wrong):
    given = {"tasks": [task()], "selectors": SELECTORS} | wrong
    with pytest.raises(UsageError, match="give at least one of each"):
        kv_curve(families.make("llama"), **given)


def test_a_model_of_windows_alone_has_no_keys_to_drop():
    model = families.make("mistral")
    with pytest.raises(UsageError, match="every layer of this model has a sliding window"):
        kv_curve(model, [task()], SELECTORS)
    with pytest.raises(UsageError, match="every layer of this model has a sliding window"):
        kv_selection(model, task().whole)


def test_tasks_weigh_the_same_and_gains_are_paired(curve, tmp_path):
    model = families.make("llama")
    both = kv_curve(model, [task(), task(2, "other")], SELECTORS, keep_ratios=(0.3,), batch_size=2)
    rows = {name: [t.values["loss"] for t in both.select(name, 0.3, matched="snapkv")] for name in ("snapkv", "random")}
    assert [len(row) for row in rows["snapkv"]] == [3, 2]
    assert both.mean("snapkv", "loss") == pooled_mean(rows["snapkv"])
    apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(rows["snapkv"], rows["random"], strict=True)]
    assert both.gain("snapkv", "loss") == pooled_mean(apart)
    assert both.gain("snapkv", "loss", task="other").mean == pytest.approx(sum(apart[1]) / 2)
    parts = [
        kv_curve(model, [each], SELECTORS, keep_ratios=(0.3,), batch_size=2) for each in (task(), task(2, "other"))
    ]
    assert Trials.concat(parts).trials == both.trials
    assert Trials.load(both.save(tmp_path / "kv")).trials == both.trials
    assert both.summary().splitlines()[0].split()[:3] == ["baseline", "100%", "right"]


def test_a_task_is_read_back_from_whole_prompts():
    given = (task(), task(2, "other"))
    whole = replace(given[0].whole, items=tuple(prompt for each in given for prompt in each.whole))
    assert KVTask.from_whole(whole) == given
    for row, (prompt, context) in enumerate(zip(given[0].whole, given[0].contexts, strict=True)):
        assert prompt.ids == (*context.ids, *given[0].rest[row])
        assert prompt.spans["context"] == ((0, len(context)),)
        assert prompt.ids[slice(*prompt.spans["answer"][0])] == given[0].rest[row][-given[0].answers[row] :]
    # another cut of the same tokens is another set of prompts
    later = replace(given[0], answers=(1, 1, 1))
    assert later.whole.fingerprint() != given[0].whole.fingerprint()
    with pytest.raises(PromptError, match="give prompts of key selection"):
        KVTask.from_whole(Prompts.from_ids([[5, 6, 7]]))


def test_three_tasks_are_cut_before_the_question():
    tokenizer = tiny_chat_model.tokenizer()
    first, second, third = kv_tasks(tokenizer, n=2, length=900)
    text = tokenizer.decode(first.contexts[0].ids)
    assert text.rstrip().endswith("Question:")
    assert tokenizer.decode(first.rest[0][-first.answers[0] :]).strip() in text
    copy = second.contexts[0].ids
    # the second copy goes on as the first did
    seen = second.rest[0]
    at = next(i for i in range(len(copy)) if copy[i : i + 4] == tuple(seen[:4]))
    assert tuple(seen) == copy[at : at + len(seen)]
    assert len(third.contexts) == 2
    for context, rest, answer in zip(third.contexts, third.rest, third.answers, strict=True):
        statements, question = tokenizer.decode(context.ids), tokenizer.decode(rest)
        assert statements.count("Currently,") == 5
        assert question.count("?") == 1
        assert "Currently," not in question
        assert tokenizer.decode(rest[-answer:]).strip() in statements
    assert kv_tasks(tokenizer, n=2, length=900, seed=1)[2].contexts[0].ids != third.contexts[0].ids


def test_a_curve_without_its_control_is_refused():
    model = families.make("llama")
    with pytest.raises(UsageError, match="add 'random', which is the control"):
        kv_curve(model, [task()], {"streaming": SELECTORS["streaming"]})
    with pytest.raises(PromptError, match="cannot be cut at 0"):
        KVTask.cut("x", Prompts.from_ids([[5, 6, 7]]), [0], [[1]])


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run that the prompts of key selection depend on."""

    seed: int = 1
    n_texts: int = 2
    needle_length: int = 900


def test_the_analysis_evaluates_what_the_scores_of_a_run_make(tmp_path, monkeypatch):
    entry = registry.get("kv")
    model, prompts = tiny_chat_model.model(), entry.prompts(Sizes(), tiny_chat_model.tokenizer())
    tasks = kv_tasks(tiny_chat_model.tokenizer(), n=2, length=900, seed=1 + 3_000_017)
    assert KVTask.from_whole(prompts) == tasks
    short = [task(2), task(2, "other")]
    prompts = replace(short[0].whole, items=tuple(prompt for each in short for prompt in each.whole))
    scores = {"duo_gates": HeadScores("duo_gates", torch.rand(1, 2, 4), kv_heads=2)}

    class Inputs:
        pass

    run = Inputs()
    run.scores = scores  # pyright: ignore[reportAttributeAccessIssue]
    # settings of selectors come from the run, those of analyses do not
    run.settings = {"snapkv": {"window": 4}, "qada": {"tau": 0.5}}  # pyright: ignore[reportAttributeAccessIssue]
    settings = {"keep_ratios": (0.5,), "batch_size": 2, "seed": 3}
    found = entry.thing(model, prompts, **entry.inputs(run), **settings)
    made = selectors_of(scores, 3, model, settings={"snapkv": {"window": 4}})
    expected = kv_curve(model, short, made, keep_ratios=(0.5,), batch_size=2, seed=3)
    assert found.trials == expected.trials
    assert found.conditions == ("baseline", "random", "streaming", "snapkv", "task_kv", "duo_attention")
    assert found.settings["selectors"]["duo_attention"] == {"title": "DuoAttention", "scores": ["duo_gates"]}
    assert found.settings["selectors"]["random"] == {"title": "Random keys", "scores": []}
    # a killed evaluation continues with the next task
    calls = []

    def watched(*args, **kw):
        calls.append(args[1][0].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kv_curve(*args, **kw)

    monkeypatch.setattr(sys.modules["interp.analyses.kv.kv_selection"], "kv_curve", watched)
    with pytest.raises(KeyboardInterrupt):
        kv_selection(model, prompts, scores=scores, **settings, folder=tmp_path)
    again = kv_selection(model, prompts, scores=scores, **settings, folder=tmp_path)
    assert calls == ["made", "other", "other"]
    assert again.trials == found.trials
    kv_selection(model, prompts, **settings, folder=tmp_path)
    assert len(calls) == 5
    only = kv_selection(model, prompts, selectors="snapkv", keep_ratios=(0.5,))
    assert only.conditions == ("baseline", "random", "snapkv")


def test_the_prompts_of_the_analysis_fit_the_run():
    prompts = _prompts(Sizes(), tiny_chat_model.tokenizer())
    assert [prompt.meta["task"] for prompt in prompts] == [
        name for name in ("needle", "repeated tokens", "new facts") for _ in range(2)
    ]
