"""Profiles: a planted head comes first, rounds change no number, what was cut goes on."""

import json
from dataclasses import replace

import pytest
import torch

from interp import steer
from interp.analyses.measures.continuations import ContinuationScorer
from interp.analyses.steer.choose import choose
from interp.analyses.steer.profile import Profile, directions, intersection, profile
from interp.errors import ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.testing.families import VOCAB, make

PASTA = steer.Pasta("mark", 0.02)


def prompts(n=12, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def ids(size):
        return torch.randint(3, VOCAB, (size,), generator=rng).tolist()

    rows = [ids(int(torch.randint(9, 16, (1,), generator=rng))) for _ in range(n)]
    meta = [{"right": [ids(1)], "wrong": [ids(1)], "id": f"item {i}"} for i in range(n)]
    return Prompts.from_ids(rows, spans=[{"mark": (2, 5)}] * n, meta=meta)


def planted(head: Head, seed: int):
    """A model in which one head alone writes anything, and prompts on which marking helps it."""
    model = make("llama", seed=seed, layers=3).eval()
    size = model.config.head_dim
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            kept = layer.self_attn.o_proj.weight[:, size * head.head : size * (head.head + 1)].clone()
            layer.self_attn.o_proj.weight.zero_()
            if number == head.layer:
                layer.self_attn.o_proj.weight[:, size * head.head : size * (head.head + 1)] = 4 * kept
    batch = prompts(8, seed)
    made = ContinuationScorer(model, batch, PASTA)
    moved = made.under([HeadSet((head,))])[:, 0] - made.base
    # what the head gains is made the right continuation
    items = []
    for prompt, (one, other) in zip(batch, moved[:, :2].tolist(), strict=True):
        right, wrong = prompt.meta["right"], prompt.meta["wrong"]
        swapped = {"right": wrong, "wrong": right} if other > one else {}
        items.append(replace(prompt, meta={**prompt.meta, **swapped}))
    return model, replace(batch, items=tuple(items))


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_head_comes_first(seed):
    head = Head(seed % 3, seed % 4)
    model, batch = planted(head, seed)
    found = profile(model, batch, PASTA, keep=2, start=2, seed=seed)
    assert found.ranking[0] == head
    assert found.heads(1) == HeadSet((head,))
    assert found.helpful(1e-5) == HeadSet((head,))
    others = [h for h in found.ranking if h.layer <= head.layer and h != head]
    assert all(found.scores[h] == pytest.approx(0, abs=1e-6) for h in others)


def test_rounds_change_no_number():
    model, batch = make("llama", layers=3).eval(), prompts()
    short = profile(model, batch, PASTA, keep=3, start=3)
    whole = profile(model, batch, PASTA, start=len(batch))
    assert short.scores.settings["rounds"] == [[12, 3], [6, 6], [3, 12]]
    assert not whole.scores.per_prompt.isnan().any()
    seen = ~short.scores.per_prompt.isnan()
    torch.testing.assert_close(short.scores.per_prompt[seen], whole.scores.per_prompt[seen], atol=2e-5, rtol=1e-4)
    assert sorted(short.ranking) == sorted(whole.ranking)
    means = [short.scores[h] for h in short.ranking[:3]]
    assert means == sorted(means, reverse=True)
    # a head ranks above those that left before it, and among heads that left together by its gain
    measured = [int((~short.scores.per_prompt[:, h.layer, h.head].isnan()).sum()) for h in short.ranking]
    assert measured == [12] * 3 + [6] * 3 + [3] * 6
    # heads that stayed have been asked everything
    assert all(not short.scores.per_prompt[:, h.layer, h.head].isnan().any() for h in short.ranking[:3])
    assert short.cost["prompts"] == 12 * 3 + 6 * 3 + 3 * 6
    assert short.cost["forwards"] < short.cost["prompts"]
    # the order of prompts is drawn by the seed
    assert profile(model, batch, PASTA, keep=3, start=3, seed=1).scores.per_prompt.isnan().sum() == (~seen).sum()


def test_a_profile_that_was_cut_goes_on(tmp_path, monkeypatch):
    model, batch = make("llama", layers=2).eval(), prompts()
    whole = profile(model, batch, PASTA, keep=3, start=3, folder=tmp_path / "one")
    calls = []

    def counted(self, sets, rows=32):
        calls.append(len(sets))
        if len(calls) == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return under(self, sets, rows)

    stopped, under = [], ContinuationScorer.under
    monkeypatch.setattr(ContinuationScorer, "under", counted)
    with pytest.raises(KeyboardInterrupt):
        profile(model, batch, PASTA, keep=3, start=3, folder=tmp_path / "two")
    again = profile(model, batch, PASTA, keep=3, start=3, folder=tmp_path / "two")
    assert torch.equal(again.scores.per_prompt.nan_to_num(9), whole.scores.per_prompt.nan_to_num(9))
    assert again.ranking == whole.ranking
    assert again.cost == whole.cost
    files = len(list((tmp_path / "one").iterdir()))
    assert len(calls) == files + 1
    calls.clear()
    profile(model, batch, PASTA, keep=3, start=3, folder=tmp_path / "one")
    assert not calls
    profile(model, batch, steer.Pasta("mark", 0.5), keep=3, start=3, folder=tmp_path / "one")
    assert len(calls) == files
    broken = next((tmp_path / "one").glob("profile-*.safetensors"))
    for path in (tmp_path / "one").glob("profile-*.safetensors"):
        path.write_text(json.dumps({"gains": [1]}))
    with pytest.raises(ScoreError, match="delete it and run again"):
        profile(model, batch, PASTA, keep=3, start=3, folder=broken.parent)


def test_save_and_load(tmp_path):
    model, batch = make("llama", layers=2).eval(), prompts(6)
    found = profile(model, batch, PASTA, keep=3, start=3)
    path = found.save(tmp_path / "profile")
    again = Profile.load(path, model)
    assert again.ranking == found.ranking
    assert torch.equal(again.scores.per_prompt.nan_to_num(9), found.scores.per_prompt.nan_to_num(9))
    frame = again.to_frame()
    assert list(frame["name"]) == list(map(str, found.ranking))
    assert frame["prompts"].max() == 6
    assert len(again.summary(3).splitlines()) == 3
    with pytest.raises(ScoreError):
        Profile.load(path, make("llama", seed=1, layers=2))
    found.scores.__class__("other", found.scores.per_prompt).save(tmp_path / "other")
    with pytest.raises(ScoreError, match="holds a HeadScores, not a Profile"):
        Profile.load(tmp_path / "other.json")


def test_sets_from_profiles():
    model, batch = make("llama", layers=2).eval(), prompts(6)
    one, other = (profile(model, prompts(6, seed), PASTA, start=6) for seed in (0, 1))
    assert intersection([one, other], 6) == one.heads(6) & other.heads(6)
    assert intersection([one], 3) == one.heads(3)
    with pytest.raises(UsageError, match="k=0 is not between 1 and 8"):
        one.heads(0)
    with pytest.raises(UsageError, match="no profiles"):
        intersection([], 3)
    up, down = (profile(model, batch, steer.ZeroTuning(g), start=6) for g in (3.0, 0.3))
    more, less = directions(up, down)
    assert not more & less
    assert all(up.scores[h] > 0 and up.scores[h] >= down.scores[h] for h in more)
    assert all(down.scores[h] > 0 and down.scores[h] > up.scores[h] for h in less)
    assert len(more) + len(less) == sum(up.scores[h] > 0 or down.scores[h] > 0 for h in up.ranking)


def test_settings_are_compared_on_the_same_prompts():
    model, batch = make("llama", layers=2).eval(), prompts(9)
    found = choose(model, batch, {"weak": steer.Boost("mark", 1.0), "strong": steer.Boost("mark", 50.0, heads="L1H2")})
    by_name = {choice.name: choice for choice in found}
    assert by_name["weak"].score == by_name["baseline"].score
    made = ContinuationScorer(model, batch, steer.Boost("mark", 50.0))
    scores = made.under([HeadSet.parse("L1H2")])
    right, wrong = scores[:, 0, 0], scores[:, 0, 1]
    assert by_name["strong"].score == pytest.approx(float((right - wrong).mean()), abs=2e-5)
    assert [choice.score for choice in found] == sorted((choice.score for choice in found), reverse=True)
    assert all(choice.low <= choice.score <= choice.high for choice in found)
    free = choose(model, batch, {"up": steer.ZeroTuning(4.0)}, score="entropy")
    assert all(choice.score <= 0 and 0 < choice.common <= 1 for choice in free)


def test_heads_that_are_alike_are_drawn_by_lot():
    model, batch = make("llama", layers=3).eval(), prompts(4)
    found = [profile(model, batch, steer.Boost("mark", 1.0001), score="accuracy", start=2, keep=2, seed=s).ranking
             for s in (0, 1, 0)]  # fmt: skip
    assert found[0] == found[2] != found[1]
    assert found[0] != tuple(sorted(found[0]))


def test_bad_input():
    model, batch = make("llama", layers=2).eval(), prompts(4)
    with pytest.raises(UsageError, match="keep=0"):
        profile(model, batch, PASTA, keep=0)
    with pytest.raises(UsageError, match="set of heads is empty"):
        profile(model, batch, PASTA, heads=HeadSet(()))
    with pytest.raises(UsageError, match="unknown score 'f1'"):
        profile(model, batch, PASTA, score="f1")  # pyright: ignore[reportArgumentType]
