"""Queries and keys in one plane: the numbers of attention, put together without changing it."""

import json

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from interp.analyses.views.qk_projection import QKProjection, flatten, qk_projection, together
from interp.errors import HeadError, PromptError, ScoreError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families, planted

LENGTHS = (21, 9, 30)


def prompts(lengths=LENGTHS, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Prompts.from_ids([torch.randint(3, families.VOCAB, (n,), generator=rng).tolist() for n in lengths])


def dots(cloud):
    return torch.tensor(cloud.queries), torch.tensor(cloud.keys)


def close(found, expected, rtol=2e-4):
    """Equal but for what five digits leave of a cloud of some size."""
    for one, other in zip(dots(found), dots(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


def types(seed=0, n=60, d=16):
    """Queries of type A look for keys of type B, those of type B for keys of type A, in clouds far apart.

    Keys have long parts that say nothing, since no query looks there.
    """
    rng = torch.Generator().manual_seed(seed)
    kind = torch.arange(n) % 2
    looks, is_ = torch.eye(d)[kind], torch.eye(d)[1 - kind]
    q = 40 * looks + torch.randn(n, d, generator=rng) + 30 * torch.eye(d)[5]
    k = 0.5 * is_ + 0.02 * torch.randn(n, d, generator=rng) + 7 * torch.eye(d)[6] - 0.4 * torch.eye(d)[7]
    return q, k, kind


def flat(q, k, **how):
    n = len(q)
    method = how.pop("method", "pca")
    return flatten("L0H0", q, k, torch.zeros(n, dtype=torch.int64), torch.arange(n), method, how.pop("seed", 0))


def test_moving_and_scaling_changes_a_row_of_dot_products_by_one_number():
    q, k, _ = types()
    ours, theirs, c = together(q.double(), k.double())
    change = ours @ theirs.T - q.double() @ k.double().T
    assert (change - change[:, :1]).abs().max() < 1e-9
    assert change.abs().max() > 1
    # so attention is what it was
    torch.testing.assert_close((ours @ theirs.T).softmax(-1), (q.double() @ k.double().T).softmax(-1))
    assert c == pytest.approx(float((k - k.mean(0)).norm(dim=1).mean() / (q - q.mean(0)).norm(dim=1).mean()) ** 0.5)


def test_both_clouds_have_one_centre_and_one_spread():
    ours, theirs, _ = together(*types()[:2])
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=1e-4, rtol=1e-4)
    spreads = [float((part - part.mean(0)).norm(dim=1).mean()) for part in (ours, theirs)]
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-4)


def test_equal_points_have_no_spread_to_compare():
    ours, theirs, c = together(torch.ones(4, 3), torch.randn(4, 3))
    assert c == 1.0
    assert ours.isfinite().all()
    assert theirs.isfinite().all()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_queries_lie_near_the_keys_that_they_look_for(method):
    q, k, kind = types()
    cloud = flat(q, k, method=method)
    ours, theirs = dots(cloud)
    apart = torch.cdist(ours, theirs)
    match = kind[:, None] != kind
    assert apart[match].mean() < 0.5 * apart[~match].mean()
    assert cloud.faithful is not None
    assert cloud.faithful > 0.6
    # types that were dealt to the keys without regard to what they are
    dealt = kind[:, None] != torch.arange(len(k)) // 2 % 2
    assert float(apart[dealt].mean() / apart[~dealt].mean()) == pytest.approx(1, abs=0.1)


def test_without_the_move_the_clouds_would_lie_apart():
    """What `together` is for: raw queries are nowhere near the keys they look for."""
    q, k, _ = types()
    gap = float((q.mean(0) - k.mean(0)).norm())
    assert gap > 5 * float((k - k.mean(0)).norm(dim=1).mean())
    ours, theirs = dots(flat(q, k))
    assert float((ours.mean(0) - theirs.mean(0)).norm()) < 0.05 * float(ours.norm(dim=1).mean())


def test_faithful_falls_where_two_dimensions_cannot_hold_what_there_is():
    rng = torch.Generator().manual_seed(0)
    cloud = flat(torch.randn(150, 64, generator=rng), torch.randn(150, 64, generator=rng))
    assert cloud.possible is not None
    assert cloud.faithful is not None
    assert cloud.possible > 0.6 > 0.3 > cloud.faithful
    assert cloud.explained is not None
    assert sum(cloud.explained) < 0.1
    # a plane holds all that lies in one
    full = flat(*(torch.nn.functional.pad(torch.randn(150, 2, generator=rng), (0, 62)) for _ in range(2)))
    assert full.faithful == pytest.approx(full.possible)
    assert sum(full.explained or ()) == pytest.approx(1)


def test_nearest_beside_chance():
    n = 40
    angle = torch.arange(n) * 2.4
    ring = torch.stack([angle.cos(), angle.sin()], 1) * 5
    cloud = flat(ring, ring)
    # a query's own key is its best and its nearest
    assert cloud.nearest == 1.0
    assert cloud.chance == pytest.approx(sum(1 / i for i in range(3, n + 1)) / (n - 2), rel=1e-4)
    assert cloud.faithful == pytest.approx(1.0, abs=1e-3)
    # forty keys at random directions, of which the best one is not known from the plane
    rng = torch.Generator().manual_seed(0)
    other = flat(torch.randn(200, 64, generator=rng), torch.randn(200, 64, generator=rng))
    assert other.nearest is not None
    assert other.nearest < 0.2


def test_first_tokens_have_no_say_in_the_plane():
    q, k, _ = types()
    far_q, far_k = q.clone(), k.clone()
    far_k[0] += 100.0
    far_q[0] -= 50.0
    here, there = dots(flat(q, k)), dots(flat(far_q, far_k))
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one[1:], other[1:], rtol=1e-3, atol=1e-3)
    assert float((here[1][0] - there[1][0]).norm()) > 10


def by_hand(model, ids):
    """q [l h q d] and k [l g q d] of one prompt, from the projections and the rotary embedding."""
    inputs = torch.tensor([ids])
    with torch.no_grad():
        hidden = model(inputs, output_hidden_states=True).hidden_states
        cos, sin = model.model.rotary_emb(hidden[0], torch.arange(len(ids))[None])
        found = []
        for layer, x in zip(model.model.layers, hidden[:-1], strict=True):
            x = layer.input_layernorm(x)
            parts = (layer.self_attn.q_proj(x), layer.self_attn.k_proj(x))
            q, k = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts)
            found.append([part[0] for part in apply_rotary_pos_emb(q, k, cos, sin)])
    return [torch.stack(part) for part in zip(*found, strict=True)]


def test_a_query_head_is_drawn_with_the_keys_of_its_group(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    view = qk_projection(model, batch, "L0H1 L1H0 L1H2 L1H3", points=10_000)
    assert view.heads == ("L0H1", "L1H0", "L1H2", "L1H3")
    own = [by_hand(model, prompt.ids) for prompt in batch]
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    for head in view.heads:
        layer, h = int(head[1]), int(head[3])
        q = torch.cat([one[0][layer, h] for one in own])
        # two query heads to a kv head
        right, wrong = (torch.cat([one[1][layer, g] for one in own]) for g in (h // 2, 1 - h // 2))
        close(view[head], flatten(head, q, right, number, position, "pca", 0))
        with pytest.raises(AssertionError):
            close(view[head], flatten(head, q, wrong, number, position, "pca", 0))
    assert view.positions == tuple(position.tolist())
    assert view.prompts == tuple(number.tolist())
    assert view.tokens == tuple(str(token) for prompt in batch for token in prompt.ids)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_every_family_can_be_drawn(name, tiny_model):
    view = qk_projection(tiny_model(name), prompts(), "L0H0 L1H3")
    for cloud in view.clouds:
        assert len(cloud.queries) == len(cloud.keys) == sum(LENGTHS)
        # whatever the plane shows, q.k is what attention multiplied, and distances in all dimensions follow it
        assert cloud.possible is not None
        assert cloud.possible > 0.2
        assert cloud.explained is not None
        assert 0 < sum(cloud.explained) <= 1


def test_batches_and_padding_change_nothing(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    one, many = (qk_projection(model, batch, "L1", batch_size=size) for size in (1, 3))
    for head in one.heads:
        close(one[head], many[head], rtol=1e-3)
        assert one[head].faithful == pytest.approx(many[head].faithful, abs=1e-3)
    assert (one.tokens, one.prompts, one.positions) == (many.tokens, many.prompts, many.positions)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_seed_says_which_tokens_and_which_plane(method, tiny_model):
    model, batch = tiny_model("llama"), prompts((40, 40))
    first, again, other = (
        qk_projection(model, batch, "L1H1", method=method, points=60, seed=seed) for seed in (3, 3, 4)
    )
    assert first.clouds == again.clouds
    assert first.positions == again.positions != other.positions


def test_points_are_drawn_evenly_over_prompts_first_tokens_included(tiny_model):
    view = qk_projection(tiny_model("llama"), prompts((50, 6, 40, 60)), "L0H0", points=80)
    counts = [view.prompts.count(number) for number in range(4)]
    # the short one gives all it has, the others share the rest
    assert counts[1] == 6
    assert sorted(counts[::2] + counts[3:]) == [11, 11, 12]
    assert view.positions.count(0) == 4
    assert len(set(zip(view.prompts, view.positions, strict=True))) == 40


def test_first_tokens_can_be_left_out(tiny_model):
    view = qk_projection(tiny_model("llama"), prompts(), "L0H0", drop_first=True)
    assert 0 not in view.positions
    assert len(view.tokens) == sum(LENGTHS) - 3
    assert view.settings == {"points": 2000, "drop_first": True}


@pytest.mark.parametrize("seed", range(2))
def test_queries_of_a_planted_head_lie_by_the_key_before_them(seed):
    """The control: the same model with the entries of the head's query weights shuffled."""
    for shuffled in (False, True):
        model, task = (
            planted.make("previous_token", seed, "llama", shuffled=shuffled),
            planted.prompts("previous_token", seed),
        )
        view = qk_projection(model.model, Prompts.from_ids(task.ids, pad_id=planted.PAD), [model.head])
        cloud = view.clouds[0]
        apart = torch.cdist(*dots(cloud))
        number, position = torch.tensor(view.prompts), torch.tensor(view.positions)
        seen = (number[:, None] == number) & (position <= position[:, None])
        nearest = position[apart.masked_fill(~seen, torch.inf).argmin(1)]
        right = float((nearest == position - 1)[position > 1].float().mean())
        assert cloud.nearest is not None
        if shuffled:
            assert max(right, cloud.nearest) < 0.4
        else:
            assert min(right, cloud.nearest) > 0.95


def test_a_view_comes_back_from_json(tiny_model):
    for method in ("pca", "tsne"):
        view = qk_projection(tiny_model("llama"), prompts(), "L0H0 L1H1", method=method)
        again = QKProjection.from_dict(json.loads(json.dumps(view.to_dict(), allow_nan=False)))
        assert again == view
        assert again.provenance == view.provenance
    assert repr(view) == "Joint(tsne, L0H0, L1H1; 60 tokens of 3 prompts)"


def test_a_frame_has_a_row_for_each_dot(tiny_model):
    view = qk_projection(tiny_model("llama"), prompts(), "L0H0 L1H1")
    frame = view.to_frame("L1H1")
    assert len(frame) == 120
    assert list(frame["kind"].value_counts()) == [60, 60]
    assert tuple(frame[["x", "y"]].iloc[60]) == view["L1H1"].keys[0]
    assert set(view.to_frame()["head"]) == {"L0H0"}
    assert set(frame["label"]) == {"prompt 0", "prompt 1", "prompt 2"}


def broken(change):
    view = QKProjection(
        "pca", (flat(*types(n=6)[:2]),), tuple("abcdef"), tuple(range(6)), (0,) * 6, ("one",)
    ).to_dict()  # fmt: skip
    change(view)
    return view


@pytest.mark.parametrize(
    "change",
    [
        lambda view: view.pop("clouds"),
        lambda view: view.update(clouds=[]),
        lambda view: view.update(tokens=["a"]),
        lambda view: view.update(prompts=[0] * 5 + [1]),
        lambda view: view.update(positions=["x"] * 6),
        lambda view: view["clouds"][0].update(queries=[[1.0]] * 6),
        lambda view: view["clouds"][0].update(head="<b>"),
        lambda view: view["clouds"][0].pop("scale"),
    ],
)
def test_broken_views_are_refused(change):
    assert QKProjection.from_dict(broken(lambda view: None)).heads == ("L0H0",)
    with pytest.raises(ScoreError, match="joint view is broken"):
        QKProjection.from_dict(broken(change))


def test_bad_input(tiny_model):
    model, batch = tiny_model("llama"), prompts()
    with pytest.raises(UsageError, match="method='umap'"):
        qk_projection(model, batch, "L0H0", method="umap")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="points=5"):
        qk_projection(model, batch, "L0H0", points=5)
    with pytest.raises(HeadError, match="L7H0"):
        qk_projection(model, batch, "L7H0")
    with pytest.raises(HeadError, match="no heads"):
        qk_projection(model, batch, [])
    with pytest.raises(PromptError, match="2 tokens make no plane"):
        qk_projection(model, Prompts.from_ids([[5], [6]]), "L0H0")
    with pytest.raises(HeadError, match="L1H1 is not in this view"):
        qk_projection(model, batch, "L0H0")["L1H1"]


def test_prompts_too_short_to_rank_are_drawn_without_numbers(tiny_model):
    view = qk_projection(tiny_model("llama"), prompts((2, 2, 2)), "L0H0")
    assert view.clouds[0].faithful is None
    assert view.clouds[0].nearest is None
    assert QKProjection.from_dict(json.loads(json.dumps(view.to_dict()))) == view
