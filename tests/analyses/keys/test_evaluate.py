"""The evaluation of selectors: what is asked, against literal forwards, and its control."""

import json
from typing import Any

import families
import pytest
import speaking
import torch

import interp.plots
from interp.analyses.keys.evaluate import Asked, KeyCurve, asked, key_curve
from interp.analyses.keys.simple import RandomKeys, Streaming
from interp.analyses.keys.window import SnapKV
from interp.hooks.prompts import Prompts
from interp.kernels.errors import PromptError, UsageError

plots: Any = interp.plots
SELECTORS: dict[str, Any] = {
    "random": lambda share: RandomKeys(share, sink=1, recent=1),
    "streaming": lambda share: Streaming(share, sink=1, recent=1),
    "snapkv": lambda share: SnapKV(share, sink=1, recent=1, window=4, pool=3),
}


def task(rows: int = 3) -> Asked:
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts.from_ids([torch.randint(5, 60, (30 + 4 * i,), generator=draw).tolist() for i in range(rows)])
    return Asked.cut(
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
        # draws of random keys are of a batch
        if one.selector != "random":
            assert one.loss == pytest.approx(other.loss, abs=1e-4)


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


def test_the_figure_has_a_line_for_each_selector_and_one_for_every_key(curve):
    figure = plots.key_curve(curve, "made", "loss")
    assert [trace.name for trace in figure.data] == [*SELECTORS, "every key"]
    assert figure.data[1].y[0] == pytest.approx(curve.at("streaming", 0.3, "made", "loss")[0])
    assert "kept" in figure.layout.xaxis.title.text


def test_three_tasks_are_cut_before_what_is_asked():
    tokenizer = speaking.tokenizer()
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


def test_a_curve_without_its_control_is_refused():
    model = families.make("llama")
    with pytest.raises(UsageError, match='"random" is the control'):
        key_curve(model, [task()], {"streaming": SELECTORS["streaming"]})
    with pytest.raises(PromptError, match="was cut at 0"):
        Asked.cut("x", Prompts.from_ids([[5, 6, 7]]), [0], [[1]])
