"""Visibility of keys: against the mask of every attention call, in one forward pass and while decoding."""

import pytest
import torch

from interp.hooks.generate import generate
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import run
from interp.hooks.read.visibility import Visibility, keys_by_query, keys_from, visible_at
from interp.hooks.seam import AttentionTap, tapping
from interp.testing.families import VOCAB, WINDOW


def random_prompts(lengths=(50, 43), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Prompts.from_ids([torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths])


class Compared(AttentionTap):
    """Compares chosen keys with the mask of the call, which has a place for every pair."""

    def __init__(self):
        self.calls = 0

    def want(self, site):
        call = site.call
        n, keys = call.q.shape[2], call.k_start + call.k.shape[2]
        columns = torch.arange(-2, keys + 2).expand(len(site.first), n, -1)
        rows = torch.arange(n)
        found = visible_at(call, rows, columns)
        whole = call.visible_ignoring_biases().expand(len(site.first), -1, -1, -1)
        padded = torch.nn.functional.pad(whole, (call.k_start + 2, 2))
        assert torch.equal(found, padded)
        self.calls += 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_chosen_keys_equal_the_mask(tiny_model, name):
    model, tap = tiny_model(name), Compared()
    with tapping(model, tap):
        run(model, random_prompts())
        generate(model, random_prompts(), max_new_tokens=3)
    assert tap.calls == 2 * (1 + 3)


def test_keys_of_a_table_and_of_later_queries(tiny_model):
    model, prompts = tiny_model("gemma2"), random_prompts((60, 40))
    # layer 0 sees the last 32 tokens
    far, near = 60 - 1 - WINDOW, 60 - WINDOW
    with tapping(model, sight := Visibility()):
        table = torch.full((2, 60, 2), -1)
        table[0, 59] = torch.tensor([far, near])
        table[1, 39, 0] = 0
        sight.start(keys_by_query(table))
        run(model, prompts)
        seen = sight.seen
        sight.start(keys_from([59, 39], [[far, near], [39]]))
        run(model, prompts)
    assert seen.shape == (2, 2, 4, 2)
    assert seen[0, 0].tolist() == [[False, True]] * 4
    assert seen[0, 1].all()
    assert seen[1, :, 0].tolist() == [[False, False], [True, False]]
    later = sight.seen
    assert torch.equal(later[0], seen[0])
    assert later[1, :, 0].tolist() == [[True, False]] * 2


def test_a_key_is_seen_if_any_step_sees_it(tiny_model):
    model = tiny_model("mistral")
    prompts = random_prompts((WINDOW + 2, WINDOW + 2))
    with tapping(model, sight := Visibility(keys_from([WINDOW + 1] * 2, [[1], [2]]))):
        generate(model, prompts, max_new_tokens=4)
    # the last token of the prompt is WINDOW - 1 tokens from key 2, and all later ones are farther
    assert sight.seen[:, 0, 0, 0].tolist() == [False, True]
