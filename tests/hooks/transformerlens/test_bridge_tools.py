"""The tools of TransformerLens give the same numbers on interp.bridge as on a bridge made by TransformerLens."""

import pytest
import tokenizers_tiny
import torch
from bridges import FAMILIES, close, padded, plain, rescaled, tokens
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.tools.analysis import attribution_patching
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

from interp.hooks.transformerlens.bridge import bridge
from interp.testing import families


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 9]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "patch",
    ["resid_pre", "attn_out", "attn_head_out_all_pos", "attn_head_q_all_pos", "attn_head_v_all_pos",
     "attn_head_k_all_pos", "attn_head_pattern_all_pos"],
)  # fmt: skip
@torch.no_grad()
def test_activation_patching(name, patch, capsys):
    sweep = getattr(patching, f"get_act_patch_{patch}")
    clean, corrupted = tokens(seed=1), tokens(seed=2)
    results = []
    with bridge(families.make(name)) as tl:
        for model in (tl, plain(name)):
            _, cache = model.run_with_cache(clean)
            results.append(sweep(model, corrupted, cache, metric))
    assert results[1].std() > 1e-5
    close(*results)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", ["node", "edge"])
def test_attribution_patching(name, granularity):
    config = attribution_patching.EdgeAttributionConfig(granularity=granularity)
    clean, corrupt = tokens(seed=1), tokens(seed=2)

    def scores(model):
        return attribution_patching.attribution_patch(model, clean, corrupt, metric, config)

    try:
        expected = scores(plain(name))
    except ValueError:
        assert granularity == "edge"
        with bridge(families.make(name)) as tl, pytest.raises(ValueError):
            scores(tl)
        return
    with bridge(families.make(name)) as tl:
        found = scores(tl)
    assert max(map(abs, expected.node_scores.values())) > 1e-4
    assert found.node_scores == pytest.approx(expected.node_scores, abs=1e-5)
    assert found.edge_scores == pytest.approx(expected.edge_scores, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_at_the_pattern_of_a_padded_batch(name):
    site, real, grads = "blocks.1.attn.hook_pattern", padded()["attention_mask"].bool(), []
    with bridge(families.make(name)) as tl:
        for model in (tl, plain(name)):
            with model.hooks(bwd_hooks=[(site, lambda grad, hook: grads.append(grad.clone()))]):
                model(**padded())[real].square().mean().backward()
    # gradients at padded keys do not concern the prompt, and differ
    ours, theirs = ((grad * real[:, None, None]).transpose(1, 2)[real] for grad in grads)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_detection_and_logit_attribution(name):
    theirs, tokenizer = plain(name), tokenizers_tiny.words()
    ids = tokens(length=20).repeat(1, 2)
    with bridge(families.make(name), tokenizer) as tl:
        pairs = [model.run_with_cache(ids) for model in (tl, theirs)]
        (_, cache), (_, expected) = pairs
        close(cache.stack_head_results(), expected.stack_head_results())
        answers = {"answer_tokens": torch.tensor([5]), "incorrect_tokens": torch.tensor([9]), "unit": "head"}
        try:
            wanted = direct_logit_attribution(theirs, cache=expected, **answers).attribution
        except (ValueError, NotImplementedError):
            with pytest.raises((ValueError, NotImplementedError)):
                direct_logit_attribution(tl, cache=cache, **answers)
        else:
            close(direct_logit_attribution(tl, cache=cache, **answers).attribution, wanted)
        text = "the cat sat the cat sat the cat"
        found = detect_head(tl, text, "induction_head")
        _, short = theirs.run_with_cache(tl.to_tokens(text), remove_batch_dim=True)
        # the bridge of TransformerLens has no tokenizer, so only its activations are used
        close(found, detect_head(tl, text, "induction_head", cache=short))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_results_and_forks_of_each_head(name):
    theirs, ids = plain(name), tokens(2, 40)
    with bridge(families.make(name)) as tl:
        for flag, site in (("attn_result", "result"), ("split_qkv_input", "q_input"), ("attn_in", "attn_in")):
            edit = [(f"blocks.1.attn.hook_{site}", rescaled)]
            values = []
            for model in (tl, theirs):
                getattr(model, f"set_use_{flag}")(True)
                cached = model.run_with_cache(ids, names_filter=edit[0][0])[1]
                values.append((cached[edit[0][0]], model.run_with_hooks(ids, fwd_hooks=edit)))
                getattr(model, f"set_use_{flag}")(False)
            close(*values)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_folded_weights(name):
    theirs = plain.__wrapped__(name)
    theirs.enable_compatibility_mode(disable_warnings=True)
    model = families.make(name)
    before, weights = model(tokens()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    with bridge(model) as tl:
        tl.enable_compatibility_mode(disable_warnings=True)
        close(tl(tokens()), theirs(tokens()))
    assert torch.equal(model(tokens()).logits, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
