"""All detectors: the planted head comes first and its control does not; batches, padding and order change nothing."""

import pytest
import torch
from detectors import BY_NAME, METHODS, prompts, random_prompts

from interp.analyses import identify
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families, planted

NAMES = list(BY_NAME)


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_planted_head_is_first_in_every_seed(name, family):
    method = BY_NAME[name]
    for seed in range(20):
        truth = planted.make(method.kind, seed, family)
        scores = method.run(truth.model, prompts(method.kind, seed), batch_size=4)
        assert scores.counted == 4, f"seed {seed}"
        assert scores.top(1) == [truth.head], f"seed {seed}: {scores}"
        assert scores[truth.head] > 0.9, f"seed {seed}: {scores}"


# those that write replies take their time
DECODING = ("retrieval", "semantic_retrieval", "retrieval_reasoning")


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in DECODING else name for name in NAMES]
)
def test_the_planted_head_is_not_singled_out_in_a_control(name, family):
    method = BY_NAME[name]
    for seed in range(20):
        for control in method.controls:
            truth = planted.make(method.kind, seed, family, shuffled=control == "weights")
            batch = prompts(method.kind, seed, shuffled=control == "data")
            scores = method.run(truth.model, batch, batch_size=4)
            # a prompt that does not count is no evidence for the head
            value = scores.per_prompt.nan_to_num(0.0).mean(0)[truth.head]
            assert value < method.low, f"seed {seed}, control in the {control}: {scores}"


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_batch_is_one_by_one_padded_or_not(tiny_model, name, method):
    model = tiny_model(name)
    batch = random_prompts(method.kind, families.VOCAB, (24, 40, 30))
    settings = {"recall": -1.0} if method.kind == "retrieval" else {}
    together = method.run(model, batch, batch_size=3, **settings)
    alone = HeadScores.concat([method.run(model, batch[i : i + 1], batch_size=1, **settings) for i in range(3)])
    turned = method.run(model, batch[::-1], batch_size=3, **settings)
    # what a random model writes is in its prompt by chance only; the planted models below do answer
    assert method.name == "retrieval" or (together.per_prompt > 0).any(), "nothing to compare"
    assert not together.per_prompt.isnan().all()
    torch.testing.assert_close(together.per_prompt, alone.per_prompt, atol=1e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(together.per_prompt, turned.per_prompt.flip(0), atol=1e-4, rtol=0, equal_nan=True)
    for key, extra in together.extras.items():
        torch.testing.assert_close(extra, alone.extras[key], atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_decoding_with_the_cache_scores_as_one_forward_does(family):
    """On planted models greedy decoding gives the answer itself, so both forms of retrieval read the same rows."""
    for seed in range(5):
        truth = planted.make("retrieval", seed, family)
        batch = prompts("retrieval", seed)
        cached = BY_NAME["retrieval"].run(truth.model, batch)
        alone = [BY_NAME["retrieval"].run(truth.model, batch[i : i + 1]) for i in range(len(batch))]
        torch.testing.assert_close(cached.per_prompt, HeadScores.concat(alone).per_prompt, atol=1e-4, rtol=0)
        forced = BY_NAME["retrieval_forced"].run(truth.model, batch)
        torch.testing.assert_close(cached.per_prompt, forced.per_prompt, atol=1e-4, rtol=0)
        assert (cached.per_prompt > 0).sum() > 4


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_scores_carry_their_birth_certificate(tiny_model, method):
    model = tiny_model("llama")
    batch = random_prompts(method.kind, families.VOCAB, (24, 40))
    settings = {"recall": -1.0, "max_new_tokens": 4} if method.kind == "retrieval" else {}
    scores = method.run(model, batch, **settings)
    assert scores.name == method.name
    assert scores.provenance is not None
    scores.provenance.check_model(model)
    assert (scores.layers, scores.n_heads, scores.kv_heads) == (2, 4, 2)
    assert len(scores.labels) == 2
    assert scores.unit
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["previous_token", "task_kv", "qada"])
def test_a_batch_of_no_prompts_is_refused(tiny_model, name):
    with pytest.raises(PromptError, match="give a batch size of at least 1"):
        getattr(identify, name)(tiny_model("llama"), Prompts.from_ids([[5] * 300]), batch_size=0)
