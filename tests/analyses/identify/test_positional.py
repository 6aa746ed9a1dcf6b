"""Positional heads: against eager attention and the model's own rotation, in both layouts, and planted."""

import math

import capture_oracle
import pytest
import torch
import transformers as tf
from detectors import prompts as planted_prompts

from interp.analyses import identify, tasks
from interp.analyses.identify.positional import pairs_of_dimensions
from interp.errors import UsageError
from interp.testing import families, planted


def assert_offsets_equal_eager_attention(model, eager, prompts, scores):
    for i, prompt in enumerate(prompts):
        p = eager(model, prompt)
        lines = [p.diagonal(-delta, -2, -1) for delta in range(9)]
        mean = torch.stack([line.mean(-1) for line in lines], -1)
        torch.testing.assert_close(scores.extras["offsets"][i], mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.per_prompt[i], mean.amax(-1), atol=1e-4, rtol=0)
        assert torch.equal(scores.extras["delta"][i], mean.argmax(-1))
        spread = torch.stack([line.std(-1, correction=0) for line in lines], -1)
        best = spread.gather(-1, mean.argmax(-1, keepdim=True))[..., 0]
        torch.testing.assert_close(scores.extras["std"][i], best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_offsets_equal_eager_attention(tiny_model, eager, name):
    model, prompts = tiny_model(name), capture_oracle.prompts((30, 41, 26))
    assert_offsets_equal_eager_attention(model, eager, prompts, identify.positional(model, prompts, batch_size=2))


def test_offsets_and_bands_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    prompts = tasks.repeated(tokenizer, n=80, copies=1, batch=2, seed=4)
    scores = identify.positional(model, prompts)
    assert_offsets_equal_eager_attention(model, eager, prompts, scores)
    assert_bands_are_norms_of_halves(model, prompts, scores, 8)


ROTARY = [name for name in families.CONFIGS if name != "gpt2"]


@pytest.mark.parametrize("name", ROTARY)
def test_pairs_are_halves_of_what_turns(tiny_model, name):
    turning = 4 if name == "gpt_neox" else 16
    expected = torch.tensor([(i, i + turning // 2) for i in range(turning // 2)])
    pairs = pairs_of_dimensions(tiny_model(name))
    assert pairs is not None
    assert torch.equal(pairs, expected)


@pytest.mark.parametrize("kind", [tf.CohereConfig, tf.GlmConfig])
def test_pairs_are_neighbours_where_a_model_turns_neighbours(kind):
    sizes = {**families.GROUPED, "num_hidden_layers": 1, "head_dim": 16, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        model = tf.AutoModelForCausalLM.from_config(kind(**sizes)).eval()
    pairs = pairs_of_dimensions(model)
    assert pairs is not None
    # GLM turns half of the dimensions
    assert torch.equal(pairs, torch.tensor([(2 * i, 2 * i + 1) for i in range(4 if kind is tf.GlmConfig else 8)]))


def assert_bands_are_norms_of_halves(model, prompts, scores, bands):
    """Dimensions i and i + d/2 turn together, the first pair fastest; turning leaves the norm of a pair as it is."""
    for i, prompt in enumerate(prompts):
        q, k = (torch.stack(x.chunk(2, -1)).norm(dim=0) for x in capture_oracle.content(model, prompt))
        u = (q * k).mean(2)
        expected = u[..., :bands].sum(-1) / u.sum(-1)
        torch.testing.assert_close(scores.extras["band"][i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bands_are_norms_of_the_parts_that_turn_together(tiny_model, name):
    model, prompts = tiny_model(name), capture_oracle.prompts((40, 30))
    # eight pairs of 16 dimensions: all of them are the band
    assert torch.allclose(identify.positional(model, prompts).extras["band"], torch.ones(2, 2, 4))
    assert_bands_are_norms_of_halves(model, prompts, identify.positional(model, prompts, bands=3), 3)


def test_no_band_without_a_rotation(tiny_model):
    scores = identify.positional(tiny_model("gpt2"), capture_oracle.prompts())
    assert pairs_of_dimensions(tiny_model("gpt2")) is None
    assert scores.extras["band"].isnan().all()
    assert not scores.per_prompt.isnan().any()
    assert identify.positional(tiny_model("llama"), capture_oracle.prompts(), bands=0).extras["band"].isnan().all()
    with pytest.raises(UsageError, match="bands=-1 is negative; give how many"):
        identify.positional(tiny_model("gpt2"), capture_oracle.prompts(), bands=-1)


def test_a_layer_without_rotation_has_no_band():
    sizes = {**families.GROUPED, "num_hidden_layers": 2, "no_rope_layers": [1, 0]}
    with torch.random.fork_rng(devices=[]):
        model = tf.AutoModelForCausalLM.from_config(tf.SmolLM3Config(**sizes)).eval()
    band = identify.positional(model, capture_oracle.prompts((30,))).extras["band"]
    assert not band[:, 0].isnan().any()
    assert band[:, 1].isnan().all()


def test_the_planted_head_works_in_the_fast_band_whatever_the_tokens():
    for seed in range(6):
        place = planted.make("previous_token", seed, "llama")
        scores = identify.positional(place.model, planted_prompts("previous_token", seed))
        layer, head = place.head
        assert (scores.extras["delta"][:, layer, head] == 1).all()
        assert scores.extras["std"][:, layer, head].max() < 0.1
        band = scores.extras["band"].mean(0)
        others = band.masked_fill(planted_mask(place.head), -math.inf)
        assert band[place.head] > 0.6
        assert band[place.head] > others.max()
        # a head that looks for the same token keeps its queries in the slow pairs
        word = planted.make("duplicate_token", seed, "llama")
        slow = identify.positional(word.model, planted_prompts("duplicate_token", seed))
        assert slow.extras["band"].mean(0)[word.head] < 0.4
        assert slow[word.head] < 0.9


def planted_mask(head):
    mask = torch.zeros(planted.LAYERS, planted.HEADS, dtype=torch.bool)
    mask[head] = True
    return mask
