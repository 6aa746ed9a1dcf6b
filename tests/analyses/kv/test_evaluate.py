"""The evaluation of selectors: what is asked, against literal forwards, and its control."""

import json
from dataclasses import replace
from typing import Any

import families
import pytest
import tiny_chat_model
import torch

import interp.plots
from interp.analyses.causal.ablation_test import paired
from interp.analyses.kv import KeyCurve, KVTask, asked, key_curve
from interp.analyses.kv.curve import KeyPoint
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import RandomKeys, Streaming
from interp.errors import PromptError, UsageError
from interp.hooks.prompts.prompts import Prompts

plots: Any = interp.plots
SELECTORS: dict[str, Any] = {
    "random": lambda share: RandomKeys(share, sink=1, recent=1),
    "streaming": lambda share: Streaming(share, sink=1, recent=1),
    "snapkv": lambda share: SnapKV(share, sink=1, recent=1, window=4, pool=3),
}


def task(rows: int = 3) -> KVTask:
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts.from_ids([torch.randint(5, 60, (30 + 4 * i,), generator=draw).tolist() for i in range(rows)])
    return KVTask.cut(
        "made", prompts, [20 + 2 * i for i in range(rows)], [[7, 8, 9 + i][: 2 + i % 2] for i in range(rows)]
    )


@pytest.fixture(scope="module")
def curve() -> KeyCurve:
    return key_curve(families.make("llama"), [task()], SELECTORS, shares=(0.3, 0.6), batch_size=2)


@torch.no_grad()
def test_the_model_with_every_key_is_the_plain_model(curve):
    model: Any = families.make("llama")
    given = task()
    point = next(p for p in curve.points if p.selector == "whole")
    for row, (context, rest, count) in enumerate(zip(given.contexts, given.rest, given.answers, strict=True)):
        ids = torch.tensor([[*context.ids, *rest]])
        logits = model(ids).logits[0, -count - 1 : -1].float()
        wanted = ids[0, -count:]
        assert point.loss[row] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)), abs=1e-4)
        assert point.right[row] == float((logits.argmax(-1) == wanted).float().mean())


def test_every_selector_keeps_its_share_and_loses_something(curve):
    whole = next(p for p in curve.points if p.selector == "whole")
    assert {(p.selector, p.share) for p in curve.points if p is not whole} == {
        (name, share) for name in SELECTORS for share in (0.3, 0.6)
    }
    for point in curve.points:
        # a key more or less of some twenty
        assert point.kept == pytest.approx(point.share, abs=0.03)
        assert point is whole or point.loss != whole.loss


def test_batches_and_their_padding_change_nothing(curve):
    alone = key_curve(families.make("llama"), [task()], SELECTORS, shares=(0.3, 0.6), batch_size=1)
    for one, other in zip(curve.points, alone.points, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)


def test_a_share_of_everything_is_the_whole_model():
    curve = key_curve(families.make("llama"), [task()], SELECTORS, shares=(0.5, 1.0))
    for name in SELECTORS:
        assert curve.at(name, 1.0, "made", "loss") == curve.at("whole", 1.0, "made", "loss")


@pytest.mark.parametrize("wrong", [{"tasks": []}, {"shares": ()}, {"batch_size": 0}], ids=str)
def test_nothing_to_evaluate_is_refused(wrong):
    given = {"tasks": [task()], "selectors": SELECTORS} | wrong
    with pytest.raises(UsageError, match="give at least one of each"):
        key_curve(families.make("llama"), **given)


def test_a_model_of_windows_alone_has_no_keys_to_drop():
    with pytest.raises(UsageError, match="every layer of this model has a window"):
        key_curve(families.make("mistral"), [task()], SELECTORS)


def test_a_curve_comes_back_from_json_and_compares_with_chance(curve):
    again = KeyCurve.from_dict(json.loads(json.dumps(curve.to_dict())))
    assert again == curve
    mean, low, high = curve.gain("snapkv", 0.3, "made", "loss")
    pairs = zip(
        *(next(p.loss for p in curve.points if p.selector == n and p.share == 0.3) for n in ("snapkv", "random")),
        strict=True,
    )
    assert mean == pytest.approx(sum(a - b for a, b in pairs) / 3)
    assert low <= mean <= high


def hand_made(**right: dict[str, tuple[float, ...]]) -> KeyCurve:
    """A curve of known numbers: share of right tokens by task, of each selector."""
    points = [
        KeyPoint(name, 1.0 if name == "whole" else 0.2, task, 0.2, (0.0,) * len(values), values)
        for task in ("long", "short")
        for name, tasks in right.items()
        for values in (tasks[task],)
    ]
    return KeyCurve(tuple(points))


def test_over_all_tasks_each_weighs_the_same_and_prompts_are_drawn_within_theirs():
    curve = hand_made(
        whole={"long": (1.0,) * 6, "short": (1.0, 0.0)},
        random={"long": (0.5, 0.25) * 3, "short": (0.0, 0.0)},
        snapkv={"long": (0.75, 0.5) * 3, "short": (0.5, 0.5)},
    )
    assert curve.tasks == ("long", "short")
    assert (curve.selectors, curve.shares) == (("random", "snapkv"), (0.2,))
    # of 6 prompts 1, of 2 one half
    assert curve.at("whole", 1.0)[0] == pytest.approx(0.75)
    # no draw within a task changes what is equal in all of its prompts; drawn together it would
    assert curve.gain("snapkv", 0.2) == pytest.approx((0.375, 0.375, 0.375))
    _, low, high = curve.at("whole", 1.0)
    assert (low, high) == (0.5, 1.0)
    told = str(curve).splitlines()
    assert told[0].split() == ["whole", "100%", "kept", "75%", "right", "[50%,", "100%]"]
    assert told[-1].endswith("+38 points over random keys  [+38, +38]")
    assert [row.get("gain") for row in curve.rows()] == [None, None, pytest.approx(0.375)]
    with pytest.raises(UsageError, match=r"no point of 'snapkv' at 0\.3"):
        curve.at("snapkv", 0.3)
    with pytest.raises(UsageError, match='give "right" or "loss"'):
        curve.at("snapkv", 0.2, measure="kept")


def test_one_task_compares_as_pairs_do(curve):
    one, other = ([p.right for p in curve.points if (p.selector, p.share) == (n, 0.6)] for n in ("streaming", "random"))
    assert curve.gain("streaming", 0.6, "made") == pytest.approx(paired(one, other))


def test_curves_of_tasks_are_joined(curve):
    parts = [replace(curve, points=tuple(replace(p, task=name) for p in curve.points)) for name in ("a", "b")]
    both = KeyCurve.join(parts)
    assert both.tasks == ("a", "b")
    assert both.at("snapkv", 0.3)[0] == pytest.approx(curve.at("snapkv", 0.3, "made")[0])
    with pytest.raises(UsageError, match="no curves"):
        KeyCurve.join([])


def test_what_is_asked_as_one_prompt():
    given = task()
    for row, (whole, context) in enumerate(zip(given.whole, given.contexts, strict=True)):
        assert whole.ids == (*context.ids, *given.rest[row])
        assert whole.spans["context"] == ((0, len(context)),)
        assert whole.ids[slice(*whole.spans["answer"][0])] == given.rest[row][-given.answers[row] :]
    # another cut of the same tokens is another set of prompts
    later = replace(given, answers=(1, 1, 1))
    assert later.whole.fingerprint() != given.whole.fingerprint()


def test_the_figure_has_a_line_for_each_selector_and_one_for_every_key(curve):
    figure = plots.key_curve(curve, "made", "loss")
    assert [trace.name for trace in figure.data] == [*SELECTORS, "every key"]
    assert figure.data[1].y[0] == pytest.approx(curve.at("streaming", 0.3, "made", "loss")[0])
    assert "kept" in figure.layout.xaxis.title.text
    every = plots.key_curve(KeyCurve.join([curve, replace(curve, points=tuple(
        replace(p, task="other", right=tuple(1.0 for _ in p.right)) for p in curve.points))]))  # fmt: skip
    assert every.data[2].y[1] == pytest.approx((1 + curve.at("snapkv", 0.6, "made")[0]) / 2)
    assert every.layout.title.text.startswith("Mean over 2 tasks")
    assert "6 prompts" in every.layout.title.subtitle.text


def test_three_tasks_are_cut_before_what_is_asked():
    tokenizer = tiny_chat_model.tokenizer()
    first, second, third = asked(tokenizer, n=2, length=900)
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
        told, question = tokenizer.decode(context.ids), tokenizer.decode(rest)
        assert told.count("Currently,") == 5
        assert question.count("?") == 1
        assert "Currently," not in question
        assert tokenizer.decode(rest[-answer:]).strip() in told
    assert asked(tokenizer, n=2, length=900, seed=1)[2].contexts[0].ids != third.contexts[0].ids


def test_a_curve_without_its_control_is_refused():
    model = families.make("llama")
    with pytest.raises(UsageError, match='"random" is the control'):
        key_curve(model, [task()], {"streaming": SELECTORS["streaming"]})
    with pytest.raises(PromptError, match="was cut at 0"):
        KVTask.cut("x", Prompts.from_ids([[5, 6, 7]]), [0], [[1]])
