"""RazorAttention's induction and echo heads against their definition on eager attention, groups, and errors."""

import math

import pytest
import torch
from capture_oracle import content

from interp.analyses import identify, tasks
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, ScoreError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted
from interp.testing.families import VOCAB

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gpt_oss")


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_content(model, prompt):
    """softmax of q . k before rotation [l h q k], over earlier keys; tiny and demo heads scale by 1 / sqrt(d)."""
    q, k = content(model, prompt)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def assert_razor_is_the_mean_over_rows_and_copies(model, patterns, prompts, n, copies, **settings):
    for score, after in ((identify.razor_induction, 1), (identify.razor_echo, 0)):
        found = score(model, prompts, **settings).per_prompt
        for i, prompt in enumerate(prompts):
            p = patterns(model, prompt)
            pairs = [(1 + c * n + j, d) for c in range(1, copies) for j in range(n) for d in range(1, c + 1)]
            assert len(pairs) == n * copies * (copies - 1) // 2
            expected = torch.stack([p[:, :, q, q - d * n + after] for q, d in pairs]).mean(0)
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_razor_is_the_mean_over_rows_and_copies(tiny_model, eager, name):
    prompts = tasks.repeated(VOCAB, n=9, copies=4, batch=2, bos=1)
    assert_razor_is_the_mean_over_rows_and_copies(tiny_model(name), eager, prompts, 9, 4)


def test_razor_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    prompts = tasks.repeated(tokenizer, n=20, copies=4, batch=2, bos=True, seed=2)
    assert_razor_is_the_mean_over_rows_and_copies(model, eager, prompts, 20, 4)
    assert_razor_is_the_mean_over_rows_and_copies(model, by_content, prompts, 20, 4, rope=False)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_four_copies_bound_razor_by_a_half(family):
    for seed in range(4):
        for kind, score in (("induction", identify.razor_induction), ("echo", identify.razor_echo)):
            made = planted.make(kind, seed, family)
            prompts = tasks.repeated(planted.VOCAB - 3, n=20, copies=4, batch=3, bos=planted.BOS, seed=seed)
            scores = score(made.model, prompts)
            assert scores.top(1) == [made.head]
            assert 0.4 < scores[made.head] <= 0.5
            assert float(scores.per_prompt.max()) <= 0.5
            control = score(made.model, tasks.repeated(60, n=14, copies=4, batch=3, bos=1, seed=seed, shuffled=True))
            assert control[made.head] < 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_razor_without_rope_is_softmax_of_content(tiny_model, name):
    model = tiny_model(name)
    prompts = tasks.repeated(VOCAB, n=7, copies=3, batch=1, bos=1)
    assert_razor_is_the_mean_over_rows_and_copies(model, by_content, prompts, 7, 3, rope=False)
    found = identify.razor_echo(model, prompts, rope=False)
    assert found.settings == {"rope": False}
    assert (found.per_prompt - identify.razor_echo(model, prompts).per_prompt).abs().max() > 1e-3


def table(values, name="razor", kv_heads=2):
    return HeadScores(name, torch.tensor(values)[None], kv_heads=kv_heads)


def test_protected_heads_are_whole_groups():
    induction = table([[0.1, 0.4, 0.0, 0.0], [0.3, 0.0, 0.2, 0.0]])
    echo = table([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3]])
    assert str(identify.razor_protected(induction, echo)) == "L0H0, L0H1, L1H2, L1H3"
    # half of four kv heads by induction; a share of nothing still protects one
    both = identify.razor_protected(induction, echo, share=(0.5, 0.0))
    assert str(both) == "L0H0, L0H1, L1H0, L1H1, L1H2, L1H3"
    # equal scores never take more than the share
    flat = table([[0.2] * 4] * 2)
    assert str(identify.razor_protected(flat, flat)) == "L0H0, L0H1"
    own = identify.razor_protected(induction, echo, HeadLayout(2, 4, 4))
    assert str(own) == "L0H1, L1H3"


def test_errors_of_razor(tiny_model):
    with pytest.raises(PromptError, match="'razor_echo' has no query with a target"):
        identify.razor_echo(tiny_model("llama"), Prompts.from_ids([tokens(12)]))
    one, other = table([[0.1, 0.2]]), table([[0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(ScoreError, match="2x2 heads and the layout 1x2; give both scores of one model"):
        identify.razor_protected(one, other)
    with pytest.raises(UsageError, match=r"share=\(2, 0\.1\) is out of range; give the shares"):
        identify.razor_protected(one, one, share=(2, 0.1))
