"""Task-KV: distances against eager patterns, a planted outlier, invariances, and the choice of heads by layer."""

import math
from copy import deepcopy
from typing import Any

import families
import pytest
import torch
from reading import eager_patterns, prompts

from interp.analyses.identify.task_kv import heterogeneous, output_weights, task_kv
from interp.analyses.scores import HeadScores
from interp.hooks import keep
from interp.hooks.capture import capture, run
from interp.hooks.heads import HeadSet
from interp.hooks.modules import attention_layers
from interp.kernels.errors import UsageError


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_distances_equal_eager(tiny_model, name, weighted):
    model, batch = tiny_model(name), prompts((70, 90))
    scores = task_kv(model, batch, rows=9, top=12, weighted=weighted)
    patterns = eager_patterns(model, batch)
    with capture(model, keep.v(), batch) as cap:
        run(model, batch)
    for row, n in enumerate(batch.lengths):
        for layer in range(2):
            c = patterns[row, layer, :, -9:, -n:].mean(1)
            v = cap[keep.v()][row, layer, :, :n]
            each = len(c) // len(v)
            gathered = []
            for head in range(4):
                keys = c[head].argsort(descending=True)[:12]
                s = (c[head, keys, None] * v[head // each, keys]).sum(0)
                if weighted:
                    s = written(model, name, layer, head, s)
                gathered.append(s)
            gathered = torch.stack(gathered)
            expected = (gathered - gathered.mean(0)).norm(dim=1)
            # norms of the weights make distances small in some families
            unit = expected.max()
            torch.testing.assert_close(scores.per_prompt[row, layer] / unit, expected / unit, atol=1e-4, rtol=1e-4)
            assert unit > 1e-4


def written(model, name, layer, head, s):
    """What the model's own output projection makes of one head, without its bias."""
    module = attention_layers(model)[layer]
    projection = next(getattr(module, part) for part in ("o_proj", "c_proj", "dense") if hasattr(module, part))
    x = torch.zeros(1, 64)
    x[0, 16 * head : 16 * (head + 1)] = s
    return (projection(x) - projection(torch.zeros(1, 64)))[0].detach()


def test_short_prompts_give_all_they_have(tiny_model):
    model = tiny_model("llama")
    few, many = (task_kv(model, prompts((9,)), rows=r, top=t) for r, t in ((9, 9), (32, 256)))
    assert torch.equal(few.per_prompt, many.per_prompt)
    assert (many.settings["rows"], many.settings["top"]) == (32, 256)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_batch_is_one_by_one_padded_or_not(tiny_model, name):
    model, batch = tiny_model(name), prompts((24, 40, 9))
    settings: dict[str, Any] = {"rows": 12, "top": 30}
    together = task_kv(model, batch, **settings, batch_size=3)
    alone = HeadScores.concat([task_kv(model, batch[i : i + 1], **settings) for i in range(3)])
    torch.testing.assert_close(together.per_prompt, alone.per_prompt, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_head_with_values_of_its_own_is_far_and_its_control_is_not(tiny_model, name):
    """One head's value bias set far off; the control adds the same to every head, whose centre moves along."""
    batch = prompts((40, 30))
    for planted in (True, False):
        model = deepcopy(tiny_model(name))
        with torch.no_grad():
            for head in [2] if planted else range(4):
                if name == "gpt2":
                    model.transformer.h[1].attn.c_attn.bias[128 + 16 * head : 128 + 16 * (head + 1)] += 5
                else:
                    # q, k and v of a head side by side
                    model.gpt_neox.layers[1].attention.query_key_value.bias[48 * head + 32 : 48 * (head + 1)] += 5
        found = task_kv(model, batch).values[1]
        if planted:
            assert found.argmax() == 2
            assert found[2] > 2 * found[[0, 1, 3]].max()
        else:
            plain = task_kv(tiny_model(name), batch).values[1]
            torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-3)


def test_nothing_changes_in_the_model(tiny_model):
    model, batch = tiny_model("llama"), prompts((40,))
    with torch.no_grad():
        before = model(**batch.tensors()).logits
        task_kv(model, batch)
        assert torch.equal(model(**batch.tensors()).logits, before)
    assert model.config._attn_implementation == "sdpa"


def test_output_weights_add_up_to_the_projection(tiny_model):
    for name in ("gpt2", "llama"):
        module: Any = attention_layers(tiny_model(name))[0]
        x = torch.randn(3, 64)
        projection = module.c_proj if name == "gpt2" else module.o_proj
        parts = torch.einsum("nhd,hdm->nm", x.unflatten(1, (4, 16)), output_weights(module, 4))
        torch.testing.assert_close(parts, projection(x) - projection(torch.zeros(3, 64)), atol=1e-5, rtol=1e-5)


def test_counts_fall_with_the_layer_and_the_nearest_takes_the_last_place():
    # 3 layers of 8 heads, head h at distance 8 - h
    scores = HeadScores("task_kv", torch.arange(8.0, 0, -1).expand(1, 3, 8))
    # b 0.5, m 2: 4, 3 and 2 heads
    assert heterogeneous(scores, 0.5, 2) == HeadSet.parse("L0H0-L0H2, L0H7, L1H0-L1H1, L1H7, L2H0, L2H7")
    # 4, 2.5 and 1: half goes up, and a single head is the farthest
    assert heterogeneous(scores, 0.5, 1) == HeadSet.parse("L0H0-L0H2, L0H7, L1H0-L1H1, L1H7, L2H0")
    assert len(heterogeneous(scores, 1.0, 8)) == 24
    # the paper's settings for 32 layers of 32 heads: 8 heads down to 4
    large = HeadScores("task_kv", torch.rand(1, 32, 32))
    counts = [len(heads) for heads in heterogeneous(large, 0.25, 4).by_layer().values()]
    assert counts == [math.floor(8 - 4 / 31 * r + 0.5) for r in range(32)]
    assert (counts[0], counts[-1]) == (8, 4)


def test_what_it_refuses(tiny_model):
    model, batch = tiny_model("llama"), prompts((20,))
    with pytest.raises(UsageError, match="rows=0, top=256: give at least one row and one key"):
        task_kv(model, batch, rows=0)
    scores = task_kv(model, batch)
    with pytest.raises(UsageError, match=r"b=0.25, m=5: give a share in \(0, 1\] and 1 to 4 heads"):
        heterogeneous(scores, m=5)
    with pytest.raises(UsageError, match="'x' has heads without a score"):
        heterogeneous(HeadScores("x", torch.full((1, 2, 4), math.nan)), 0.5, 1)
