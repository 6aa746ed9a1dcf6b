"""Selectors against the rules of the released code, and controls against what selectors keep in any case."""

from typing import Any

import pytest
import torch
from kv_oracle import SELECTORS, continuation, continued, prompts, scores
from steering_oracle import batch, literal, logits, real, weighed
from transformers import DynamicCache

from interp import steer
from interp.analyses import registry
from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.head_kv import HeadKV
from interp.analyses.kv.kv_curve import kv_curve
from interp.analyses.kv.kv_tasks import KVTask
from interp.analyses.kv.random_keys import RandomKeys
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.analyses.kv.task_kv import TaskKV
from interp.hooks.edit.edit import steering
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families


def chosen_by(model: Any, selector: Any, asked: Prompts) -> dict[int, Any]:
    later = continuation()[:1].expand(len(asked), -1)
    return continued(model, selector, asked, later, DynamicCache(config=model.config))[1]


def patterns_of(model: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([list(ids)]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return found


def released(rows: torch.Tensor, window: int, kernel: int, pooling: str) -> torch.Tensor:
    """Scores of the keys before the window, from the window's rows [h w k], as in update_kv of the released code."""
    summed = rows[:, -window:, :-window].sum(1)
    pool = torch.nn.functional.avg_pool1d if pooling == "mean" else torch.nn.functional.max_pool1d
    return pool(summed[None], kernel, padding=kernel // 2, stride=1)[0]


# (selector, whether one ranking serves the whole layer)
RANKED: dict[str, Any] = {
    "no pooling": SnapKV(0.5, n_recent=0, window=5, kernel_size=1),
    "a mean of three": SnapKV(0.5, n_recent=0, window=5, kernel_size=3),
    "a mean of nine, cut at both ends": SnapKV(0.4, n_recent=0, window=4, kernel_size=9),
    "a maximum of five": SnapKV(0.4, n_recent=0, window=4, kernel_size=5, pooling="max"),
    "one row": SnapKV(0.3, n_recent=0, window=1, kernel_size=3),
    "a window that uses up most of the share": SnapKV(0.35, n_recent=0, window=10, kernel_size=3),
    "first keys": SnapKV(0.5, n_sink=3, n_recent=0, window=5, kernel_size=3),
    "voters of a layer": CompressKV(0.4, voters="L0H1 L0H3 L1H0", n_recent=0, window=4),
    "a layer without voters": CompressKV(0.4, voters="L1H2", n_recent=0, window=4, pooling="max"),
}


@pytest.mark.parametrize("name", RANKED)
def test_keys_are_ranked_as_in_the_released_code(name):
    model: Any = families.make("llama")
    selector, asked = RANKED[name], prompts()
    noted = chosen_by(model, selector, asked)
    for row, n in enumerate(asked.lengths):
        patterns = patterns_of(model, asked[row].ids)
        for layer, chosen in noted.items():
            rows = patterns[layer][0]
            if isinstance(selector, CompressKV):
                voters = HeadSet.parse(selector.voters).by_layer().get(layer) or range(len(rows))
                rank = released(rows[list(voters)].mean(0, keepdim=True), selector.window, selector.kernel_size,
                                selector.pooling).expand(2, -1).clone()  # fmt: skip
            else:
                # a mean of pooled maxima is not the pooled maximum of means: a kv head has one ranking
                of_group = rows.unflatten(0, (2, -1)).mean(1)
                rank = released(of_group, selector.window, selector.kernel_size, selector.pooling)
            rank[:, : selector.n_sink] = 99.0
            count = round(selector.keep_ratio * n) - selector.window
            expected = torch.zeros(2, n, dtype=torch.bool)
            expected[:, n - selector.window :] = True
            if count > 0:
                # pooled maxima have ties, of which the first keys are kept
                best = rank.argsort(dim=-1, descending=True, stable=True)[:, :count]
                expected.scatter_(1, best, True)
            assert torch.equal(chosen.kept[row, :, :n], expected), (row, layer)


@pytest.mark.parametrize("window", [2, 4, 6])
@pytest.mark.parametrize("beta", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_head_of_headkv_keeps_the_window_and_its_part_of_the_rest(window, beta, ratio):
    model: Any = families.make("llama")
    layout, asked = HeadLayout.of(model), prompts()
    part = torch.rand(layout.layers, layout.kv_heads, generator=torch.Generator().manual_seed(1)) + 0.3
    part = part / part.sum()
    selector = HeadKV(ratio, n_recent=0, window=window, beta=beta, importance=tuple(map(tuple, part.tolist())))
    noted = chosen_by(model, selector, asked)
    for row, n in enumerate(asked.lengths):
        base = ratio * n - window
        wanted = window + base - base / beta + part * (base / beta) * part.numel()
        assert wanted.max() < n, "a head that keeps everything"
        for layer, chosen in noted.items():
            kept = chosen.kept[row, :, :n]
            assert (kept.sum(-1) - wanted[layer]).abs().max() <= 0.5 + 1e-3
            assert bool(kept[:, n - window :].all())


def test_a_head_without_importance_still_has_keys_beyond_the_window():
    model: Any = families.make("llama")
    part = ((0.5, 0.0), (0.3, 0.2))
    noted = chosen_by(model, HeadKV(0.6, n_recent=0, window=6, beta=1.5, importance=part), prompts(1))
    least = round(6 + (0.6 * 41 - 6) / 3)
    assert int(noted[0].kept[0, 1].sum()) == least


def test_defaults_are_those_of_the_released_code():
    assert (SnapKV().forced, SnapKV().window, SnapKV().kernel_size, SnapKV().pooling) == ((0, 32), 32, 5, "mean")
    assert (HeadKV().forced, HeadKV().window, HeadKV().kernel_size, HeadKV().pooling) == ((0, 32), 32, 7, "max")
    assert (CompressKV().forced, CompressKV().window, CompressKV().kernel_size) == ((0, 8), 8, 5)
    assert (Streaming().n_sink, TaskKV().window, TaskKV().kernel_size) == (4, 32, 7)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "random"])
def test_a_control_keeps_what_its_selector_keeps_in_any_case(name):
    model: Any = families.make("llama")
    asked, selector = prompts(), SELECTORS[name](scores(families.make("llama")))
    control = RandomKeys(0.9, n_sink=1, n_recent=1, seed=3).control_of(selector)
    assert (control.keep_ratio, control.seed) == (selector.keep_ratio, 3)
    first, last = selector.forced
    for each in (selector, control):
        for chosen in chosen_by(model, each, asked).values():
            for row, n in enumerate(asked.lengths):
                kept = chosen.kept[row, :, :n]
                assert bool(kept[:, :first].all())
                assert bool(kept[:, n - last :].all())


def test_every_declared_selector_has_forced_keys_of_its_own_in_a_curve():
    model: Any = families.make("llama")
    rng = torch.Generator().manual_seed(2)
    task = KVTask.cut("made", Prompts.from_ids([torch.randint(5, 60, (40,), generator=rng).tolist()]), [34], [[7, 8]])
    made = {
        "random": RandomKeys,
        "snapkv": lambda ratio: SnapKV(ratio, n_sink=0, n_recent=6, window=4),
        "streaming": lambda ratio: Streaming(ratio, n_sink=2, n_recent=3),
        "also six": lambda ratio: CompressKV(ratio, n_recent=6, window=2),
    }
    curve = kv_curve(model, [task], made, keep_ratios=(0.4, 0.6))
    drawn = {(t.matched, t.size): t.values["loss"] for t in curve.trials if t.condition == "random"}
    assert set(drawn) == {(name, ratio) for name in list(made)[1:] for ratio in (0.4, 0.6)}
    assert drawn["snapkv", 0.4] == drawn["also six", 0.4] != drawn["streaming", 0.4]
    assert curve.gain("streaming", "loss", size=0.4).mean == pytest.approx(
        curve.select("streaming", 0.4)[0].values["loss"][0] - drawn["streaming", 0.4][0], abs=1e-6
    )
    same = kv_curve(model, [task], {name: made[name] for name in ("random", "snapkv")}, keep_ratios=(0.4,))
    assert [t.matched for t in same.trials if t.condition == "random"] == [""]
    assert all(entry.thing().forced for entry in registry.entries("selector"))


@pytest.mark.parametrize(
    "selector",
    [SnapKV(0.5), SnapKV(0.1, window=4, n_recent=2), TaskKV(0.3, top=9), CompressKV(0.2)],
    ids=["snapkv", "few", "task_kv", "compress_kv"],
)
def test_a_share_that_the_window_uses_up_is_warned_of(selector):
    with pytest.warns(UserWarning, match="come before all others, so no key is ranked"):
        chosen_by(families.make("llama"), selector, prompts())


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 4.0])
def test_pasta_on_generated_keys_lowers_the_whole_prompt(tiny_model, alpha, protect):
    """The mode "generation" of the authors' code: log alpha on every key of the prompt."""
    model, asked = tiny_model("llama", attn_implementation="eager"), batch((17, 17))
    edit = steer.Pasta("mark", alpha, scope="generated", protect_first=protect)
    longer = Prompts.from_ids([[*prompt.ids, 7, 8, 9, 10] for prompt in asked])
    place = torch.arange(21)
    lowered = (place < 17) & ((place > 0) | ~torch.tensor(protect))
    with literal(model, lambda layer, pattern: weighed(pattern, torch.where(lowered, alpha, 1.0))):
        expected = logits(model, longer)
    with steering(model, edit, asked):
        # the prompt first, so that the context knows where it ends
        logits(model, asked)
        found = logits(model, longer)
    torch.testing.assert_close(real(found, longer), real(expected, longer), atol=1e-5, rtol=1e-5)
    plain = logits(model, longer)
    assert (found - plain)[:, 17:].abs().max() > 1e-3
    if not protect:
        torch.testing.assert_close(found[:, :17], plain[:, :17], atol=1e-5, rtol=1e-5)
