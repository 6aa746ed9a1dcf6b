"""Attention Tracker: against eager attention, on a planted head, with its task and its errors."""

import pytest
import run_cases
import tiny_chat_model
import torch

from interp.analyses import identify, tasks
from interp.analyses.identify.attention_tracker import detect, focus, focus_by_head
from interp.analyses.tasks import standard
from interp.errors import HeadError, PromptError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.runs.run import Run
from interp.testing import planted


def pairs(seed, count=6):
    """A word that the planted head looks for in the instruction, and beside it many times in the data, or not."""
    rng = torch.Generator().manual_seed(seed)
    sides = ([], [])
    spans = []
    for i in range(count):
        words = torch.randint(planted.FIRST_WORD, planted.HARM, (20 + i,), generator=rng).tolist()
        words[2] = planted.HARM
        attacked = list(words)
        attacked[10::2] = [planted.HARM] * len(attacked[10::2])
        for side, ids in zip(sides, (words, attacked), strict=True):
            side.append([planted.BOS, *ids])
        spans.append({"instruction": (1, 8), "data": (8, 20 + i)})
    return [Prompts.from_ids(side, spans=spans, pad_id=planted.PAD) for side in sides]


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_the_planted_head_is_the_candidate_and_not_when_its_weights_are_shuffled(family):
    for seed in range(8):
        normal, attacked = pairs(seed)
        truth = planted.refusing(seed, family)
        scores = identify.attention_tracker(truth.model, normal, attacked)
        assert scores.top(1) == [truth.head], seed
        assert scores[truth.head] > 0.5, seed
        assert truth.head in scores.heads(), seed
        found = detect(truth.model, [truth.head], normal, attacked)
        assert (found.auroc, found.caught, found.false_alarms) == (1.0, 1.0, 0.0)
        # what a head reads is in its query and key; `shuffled` of this kind changes what it writes
        blind = _blind(planted.refusing(seed, family))
        control = identify.attention_tracker(blind.model, normal, attacked)
        assert control[truth.head] < 0.1, seed


def _blind(truth):
    """The planted head with the entries of its query matrix permuted."""
    layer, head = truth.head
    order = torch.randperm(planted.HEAD_DIM, generator=torch.Generator().manual_seed(truth.seed))
    cut = slice(head * planted.HEAD_DIM, (head + 1) * planted.HEAD_DIM)
    with torch.no_grad():
        if truth.family == "gpt2":
            weight = truth.model.transformer.h[layer].attn.c_attn.weight
            weight[:, cut] = weight[:, cut][:, order]
        else:
            weight = truth.model.model.layers[layer].self_attn.q_proj.weight
            weight[cut] = weight[cut][order]
    return truth


def literal_focus(patterns, prompts):
    """f [n l h] by the formula, NaN where both spans have next to nothing; and where that is on the edge."""
    found = []
    for p, prompt in zip(patterns, prompts, strict=True):
        on = {}
        for name in ("instruction", "data"):
            ((start, stop),) = prompt.spans[name]
            on[name] = p[:, :, len(prompt) - 1, start:stop].sum(-1)
        total = on["instruction"] + on["data"]
        share = torch.where(total < 1e-3, torch.nan, on["instruction"] / total)
        found.append((share, (total - 1e-3).abs() < 1e-6))
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


def literal_candidates(normal, attacked, k):
    """score [n l h] by the formula from f [n l h] of both sides, one head at a time."""
    scores = torch.full_like(normal, torch.nan)
    for layer in range(normal.shape[1]):
        for head in range(normal.shape[2]):
            one, other = normal[:, layer, head], attacked[:, layer, head]
            both = ~one.isnan() & ~other.isnan()
            if both.sum() < len(both) / 2:
                continue
            spread = one[both].std(correction=0) + other[both].std(correction=0)
            scores[:, layer, head] = one - other - k * spread
    return scores


def check_against_eager(eager, model, normal, attacked, k):
    """Focus and scores of every head against the formulas on eager patterns."""
    scores = identify.attention_tracker(model, normal, attacked, k=k, batch_size=3)
    sides, clear = {}, torch.tensor(True)
    for name, prompts in (("normal", normal), ("attacked", attacked)):
        expected, edge = literal_focus([eager(model, prompt) for prompt in prompts], prompts)
        found = scores.extras[name]
        torch.testing.assert_close(found[~edge], expected[~edge], atol=1e-4, rtol=0, equal_nan=True)
        sides[name] = expected
        clear = clear & ~edge.any(0)
    assert clear.float().mean() > 0.98
    expected = literal_candidates(sides["normal"], sides["attacked"], k)
    torch.testing.assert_close(scores.per_prompt[:, clear], expected[:, clear], atol=1e-4, rtol=0, equal_nan=True)
    assert (~expected.isnan()).float().mean() > 0.8


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_equals_eager_attention(tiny_model, eager, name):
    model = tiny_model(name)
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (n,), generator=rng).tolist() for n in (21, 30, 26, 24)]
    prompts = Prompts.from_ids(rows, spans=[{"instruction": (1, 6), "data": (8, 15)}] * 4)
    for k in (2.0, 0):
        check_against_eager(eager, model, prompts[:2], prompts[2:], k)
    found = focus_by_head(model, prompts)
    mean = focus(model, prompts, "L0H0, L1H2")
    torch.testing.assert_close(mean, torch.stack([found[:, 0, 0], found[:, 1, 2]]).nanmean(0))


def test_equals_eager_attention_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    normal, attacked = (tasks.injection(tokenizer, kind, n=3, seed=1) for kind in ("normal", "attacked"))
    check_against_eager(eager, model, normal, attacked, 4.0)


def test_next_to_no_attention_on_the_spans_is_no_score(tiny_model):
    model = tiny_model("mistral")
    # both spans are outside of the windows of all layers
    ids = torch.randint(3, 128, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = Prompts.from_ids([ids, ids], spans=[{"instruction": (1, 6), "data": (8, 15)}] * 2)
    assert focus_by_head(model, prompts).isnan().all()
    with pytest.raises(PromptError, match="none of the heads attends to a span of normal prompt 0"):
        detect(model, "L0H0", prompts, prompts)
    assert identify.attention_tracker(model, prompts, prompts).top(3) == []


def test_a_curve_runs_from_none_to_all(tiny_model):
    model = tiny_model("llama")
    rng = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 128, (12, 20), generator=rng).tolist()
    prompts = Prompts.from_ids(rows, spans=[{"instruction": (1, 9), "data": (9, 19)}] * 12)
    found = detect(model, "all", prompts[:6], prompts[6:], threshold=0.4)
    low = [(float(a < n) + 0.5 * float(a == n)) for a in found.attacked for n in found.normal]
    assert found.auroc == pytest.approx(sum(low) / len(low))
    assert found.curve[0][:2] == (0.0, 0.0)
    assert found.curve[-1][:2] == (1.0, 1.0)
    assert found.caught == float((found.attacked <= 0.4).float().mean())


def test_errors_say_what_to_do(tiny_model):
    model = tiny_model("llama")
    prompts = Prompts.from_ids([list(range(5, 25))] * 2, spans=[{"instruction": (1, 6), "data": (8, 15)}] * 2)
    with pytest.raises(PromptError, match="2 normal and 1 attacked prompts"):
        identify.attention_tracker(model, prompts, prompts[:1])
    with pytest.raises(PromptError, match="2 normal and 2 attacked and 1 longer prompts do not form pairs"):
        identify.attention_tracker(model, prompts, prompts, prompts[:1])
    with pytest.raises(UsageError, match=r"k=-1 is negative; give the number of standard deviations"):
        identify.attention_tracker(model, prompts, prompts, k=-1)
    bare = Prompts.from_ids([list(range(5, 25))], spans=[{"instruction": (1, 6)}])
    with pytest.raises(SpanError, match='prompt 0 has no span "data"'):
        identify.attention_tracker(model, bare, bare)
    with pytest.raises(HeadError, match="layer 7 of a 2-layer model"):
        focus(model, prompts, "L7H0")
    with pytest.raises(UsageError, match="no heads are given"):
        focus(model, prompts, [])


def test_scores_of_other_prompts_join_only_without_a_spread(tiny_model):
    model = tiny_model("llama")
    rng = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 128, (8, 20), generator=rng).tolist()
    prompts = Prompts.from_ids(rows, spans=[{"instruction": (1, 9), "data": (9, 19)}] * 8)
    kind = type(identify.attention_tracker(model, prompts[:4], prompts[4:]))

    def parts(k):
        return [identify.attention_tracker(model, prompts[i : i + 2], prompts[i + 4 : i + 6], k=k) for i in (0, 2)]

    joined = kind.concat(parts(0))
    whole = identify.attention_tracker(model, prompts[:4], prompts[4:], k=0)
    torch.testing.assert_close(joined.per_prompt, whole.per_prompt, equal_nan=True, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="scores differ in settings"):
        kind.concat(parts(4.0))


def test_injection_prompts_are_pairs_with_splits_apart(demo):
    _, tokenizer = demo
    kinds = {kind: tasks.injection(tokenizer, kind) for kind in ("normal", "attacked", "longer")}
    assert [len(side) for side in kinds.values()] == [35, 35, 35]
    for normal, attacked, longer in zip(*kinds.values(), strict=True):
        text = {name: _said(tokenizer, prompt, "data") for name, prompt in (("n", normal), ("a", attacked))}
        assert text["a"].startswith(text["n"])
        assert attacked.meta["word"] in text["a"]
        assert attacked.meta["word"] not in text["n"]
        assert len({_said(tokenizer, prompt, "instruction") for prompt in (normal, attacked, longer)}) == 1
        assert abs(len(attacked) - len(longer)) <= 4
        assert normal.spans["instruction"][0][1] <= normal.spans["data"][0][0]
    sizes = [sum(kinds[kind].lengths) for kind in ("attacked", "longer")]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    test = tasks.injection(tokenizer, "attacked", split="test")
    seen = " ".join(prompt.text for kind in kinds.values() for prompt in kind)
    for prompt in test:
        sentence = _said(tokenizer, prompt, "data").split(".")[0]
        assert sentence not in seen
        assert f" {prompt.meta['word']}" not in seen
    assert tasks.injection(tokenizer, "attacked", n=3).items == kinds["attacked"].items[:3]
    assert tasks.injection(tokenizer, seed=1) != kinds["normal"]


def _said(tokenizer, prompt, span):
    start, stop = prompt.spans[span][0]
    return tokenizer.decode(prompt.ids[start:stop]).strip()


def test_injection_without_a_system_role_or_template(demo):
    import tokenizers_tiny

    _, tokenizer = demo
    one = tasks.injection(tokenizer, n=1, system=False)[0]
    assert one.text.count("<|im_start|>user") == 1
    assert one.meta["kind"] == "normal"
    bare = tasks.injection(tokenizers_tiny.byte_level(chat=False), "attacked", n=2)
    assert bare[0].text.endswith("\nAnswer:")
    assert set(bare[0].spans) == {"instruction", "data"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "odd"}, "kind is one of normal, attacked, longer"),
        ({"split": "dev"}, "split is 'train' or 'test'"),
        ({"n": 99}, "the train split has 35 sentences, so use 1 to 35"),
    ],
)
def test_injection_refuses(demo, given, said):
    with pytest.raises(UsageError, match=said):
        tasks.injection(demo[1], **given)


def test_a_run_scores_all_pairs_at_once_with_the_k_of_the_paper(tmp_path):
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    # batches of two pairs of three: a spread of each batch would be another one
    plan = run_cases.score_plan("attention_tracker", heads="")
    made = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    table = made.scores["attention_tracker"]
    normal, attacked, longer = standard.injection(plan.sizes, tokenizer)
    assert len(normal) == 3 > plan.batch_size
    sides = [focus_by_head(model, side) for side in (normal, attacked)]
    expected = literal_candidates(*sides, k=4.0)
    torch.testing.assert_close(table.per_prompt, expected, atol=1e-5, rtol=0, equal_nan=True)
    assert table.settings["k"] == 4.0
    assert not expected.isnan().all()
    # the control has data of the same length and no injection
    control = literal_candidates(sides[0], focus_by_head(model, longer), k=4.0)
    torch.testing.assert_close(table.extras["control"], control, atol=1e-5, rtol=0, equal_nan=True)
