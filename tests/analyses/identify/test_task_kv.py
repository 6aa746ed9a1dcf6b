"""Task-KV: distances against eager patterns, a planted outlier, invariances, and the choice of heads by layer."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from capture_oracle import prompts
from eager_calls import calls

from interp.analyses import tasks
from interp.analyses.identify.task_kv import heterogeneous, output_weights, task_kv
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.model.heads import HeadSet
from interp.hooks.model.layers import attention_layers
from interp.testing import families


def literal(model, prompt, rows, top, weighted):
    """Distance [l h] by the formula; and in which layers [l] two keys compete for the last place of `top`."""
    eager = calls(model, prompt)
    distances, close = [], []
    for layer, (pattern, v) in enumerate(zip(eager.pattern, eager.v, strict=True)):
        gathered, rivals = [], False
        for head, p in enumerate(pattern):
            c = p[-rows:].mean(0)
            weight, keys = c.sort(descending=True)
            if len(c) > top:
                rivals |= bool(weight[top - 1] - weight[top] < 1e-7) and bool(weight[top] * v[head].abs().max() > 1e-6)
            s = torch.zeros(v.shape[-1])
            for key in keys[:top]:
                s = s + c[key] * v[head, key]
            gathered.append(written(model, layer, head, s) if weighted else s)
        gathered = torch.stack(gathered)
        distances.append((gathered - gathered.mean(0)).square().sum(1).sqrt())
        close.append(rivals)
    return torch.stack(distances), torch.tensor(close)


def written(model, layer, head, s):
    """What the model's own output projection makes of one head, without its bias."""
    module = attention_layers(model)[layer]
    projection = next(getattr(module, part) for part in ("o_proj", "c_proj", "dense") if hasattr(module, part))
    heads, d = model.config.num_attention_heads, len(s)
    x = torch.zeros(1, heads * d)
    x[0, d * head : d * (head + 1)] = s
    with torch.no_grad():
        return (projection(x) - projection(torch.zeros_like(x)))[0]


def check_against_eager(model, batch, rows, top, weighted):
    scores = task_kv(model, batch, rows=rows, top=top, weighted=weighted)
    for row, prompt in enumerate(batch):
        expected, close = literal(model, prompt, rows, top, weighted)
        assert (~close).float().mean() > 0.8
        # norms of the weights make distances small in some families
        unit = expected.amax(1, keepdim=True).clamp(max=1)
        assert unit.min() > 1e-4
        torch.testing.assert_close(
            (scores.per_prompt[row] / unit)[~close], (expected / unit)[~close], atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_distances_equal_eager(tiny_model, name, weighted):
    check_against_eager(tiny_model(name), prompts((70, 90)), 9, 12, weighted)


@pytest.mark.parametrize(("top", "weighted"), [(256, False), (24, False), (24, True)])
def test_distances_equal_eager_on_the_demo_model(demo, top, weighted):
    model, tokenizer = demo
    check_against_eager(model, tasks.needle(tokenizer, lengths=(160,), n=1, seed=1), 16, top, weighted)


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
        parts = torch.einsum("nhd,hdm->nm", x.unflatten(1, (4, 16)), output_weights(module, 4, x))
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
    with pytest.raises(UsageError, match="rows=0, top=256 are too small; give at least one query and one key"):
        task_kv(model, batch, rows=0)
    scores = task_kv(model, batch)
    with pytest.raises(UsageError, match=r"b=0.25, m=5 are out of range; give a share in \(0, 1\] and 1 to 4 heads"):
        heterogeneous(scores, m=5)
    with pytest.raises(UsageError, match="'x' has heads without a score"):
        heterogeneous(HeadScores("x", torch.full((1, 2, 4), math.nan)), 0.5, 1)
