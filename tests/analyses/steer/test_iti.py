"""ITI: probes find the head that knows, and the edit moves it by what the paper says."""

import pytest
import torch
from safetensors.torch import save_file

from interp import steer
from interp.analyses.steer.iti import _probed
from interp.errors import UsageError
from interp.hooks.edit.edit import steering
from interp.hooks.model.heads import Head
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import capture, run
from interp.hooks.read.keep import z
from interp.testing.families import VOCAB


def answered(n=24, seed=0):
    """Prompts whose last token says whether they are true."""
    rng = torch.Generator().manual_seed(seed)
    labels = [i % 2 == 0 for i in range(n)]
    ids = [[*torch.randint(10, VOCAB, (8 + i % 5,), generator=rng).tolist(), 4 if labels[i] else 5] for i in range(n)]
    return Prompts.from_ids(ids), labels


def last_z(model, prompts):
    found = []
    for prompt in prompts.batches(1):
        with capture(model, z(), prompt) as cap:
            run(model, prompt)
        found.append(cap[z()][0, :, :, -1])
    return torch.stack(found)


def test_probes_find_the_planted_head_and_not_on_shuffled_labels():
    true = torch.arange(60) % 3 > 0
    written = torch.randn(60, 2, 4, 16)
    written[:, 1, 2, 5] += 4.0 * true
    right, weights = _probed(written, true, folds=5, seed=0)
    accuracy = right.mean(0)
    assert accuracy.argmax() == 1 * 4 + 2
    assert accuracy[1, 2] > 0.9
    assert weights[1, 2].abs().argmax() == 5
    assert weights[1, 2, 5] > 0
    shuffled = _probed(written, true[torch.randperm(60)], folds=5, seed=0)[0].mean(0)
    assert shuffled[1, 2] < 0.8


def test_the_edit_is_alpha_sigma_theta_at_the_last_position(tiny_model):
    model, (prompts, labels) = tiny_model("llama"), answered()
    edit, scores = steer.iti(model, prompts, labels, k=3, alpha=2.0, batch_size=5)
    assert scores.per_prompt.shape == (24, 2, 4)
    assert scores[scores.top(1)[0]] > 0.9
    assert scores.heads(top=3) == edit.chosen(scores.layout)
    written, true = last_z(model, prompts), torch.tensor(labels)
    for name, vector in edit.vectors:
        layer, head = Head.parse(name)
        theta = written[true, layer, head].mean(0) - written[~true, layer, head].mean(0)
        theta = theta / theta.norm()
        sigma = (written[:, layer, head] @ theta).std(correction=0)
        torch.testing.assert_close(torch.tensor(vector), 2.0 * sigma * theta, atol=1e-5, rtol=1e-4)
    layer = min(head.layer for head in scores.heads(top=3))
    with steering(model, edit, prompts[:2]), capture(model, z(), prompts[:2], layers=[layer]) as cap:
        run(model, prompts[:2])
    moves = torch.zeros(4, 16)
    for name, vector in edit.vectors:
        if Head.parse(name).layer == layer:
            moves[Head.parse(name).head] = torch.tensor(vector)
    for row, length in enumerate(prompts[:2].lengths):
        found = cap[z()][row, 0]
        torch.testing.assert_close(found[:, length - 1], written[row, layer] + moves, atol=1e-5, rtol=1e-5)
        before = last_z(model, Prompts.from_ids([prompts[row].ids[:-1]]))[0, layer]
        torch.testing.assert_close(found[:, length - 2], before, atol=1e-5, rtol=1e-5)


def test_seeds_and_directions(tiny_model):
    model, (prompts, labels) = tiny_model("gpt2"), answered()
    once, again = (steer.iti(model, prompts, labels, k=2, seed=3, direction="probe") for _ in range(2))
    assert once.edit == again.edit
    assert torch.equal(once.scores.per_prompt, again.scores.per_prompt)
    assert once.edit != steer.iti(model, prompts, labels, k=2, seed=3).edit


def test_vectors_from_a_file(tmp_path):
    vectors = {"L1H3": torch.randn(16), "L0H1": torch.randn(16)}
    save_file(vectors, tmp_path / "vectors.safetensors")
    assert steer.Offset(tmp_path / "vectors.safetensors") == steer.Offset(vectors)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="holds no vectors"):
        steer.Offset(tmp_path / "bad.safetensors")


BAD = [
    ({"k": 9}, "k=9 is not between 1 and 8"),
    ({"direction": "up"}, "unknown direction 'up'"),
    ({"folds": 13}, "13 folds of 12 true and 12 false"),
    ({"labels": [True]}, "1 labels for 24 prompts"),
    ({"labels": ["yes"] * 24}, "24 labels for 24 prompts; give true or false"),
]


@pytest.mark.parametrize(("more", "text"), BAD)
def test_bad_settings(tiny_model, more, text):
    prompts, labels = answered()
    with pytest.raises(UsageError, match=text):
        steer.iti(tiny_model("llama"), prompts, **({"labels": labels, "k": 2} | more))
