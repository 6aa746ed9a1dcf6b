"""Teacher-forced scores of many head sets at once, against each set alone on each prompt alone."""

from dataclasses import replace

import pytest
import torch

from interp import steer
from interp.analyses.measures.continuations import ContinuationScorer, Options, entropies, margins
from interp.errors import HeadError, PromptError, UsageError
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs
from interp.testing.families import VOCAB, make

SETS = [HeadSet.parse(text) if text else HeadSet(()) for text in ("L0H1", "L1H2 L1H3", "", "L2H0", "L0H0 L2H3", "L1H2")]
EDITS = {
    "pasta": steer.Pasta("mark", 0.05),
    "zerotuning": steer.ZeroTuning(4.0),
    "act": steer.Act(0.3, 0.06),
    "spotlight": steer.SpotLight("mark", 0.4),
    "temperature": steer.Temperature(0.4),
    "sum": steer.Boost("mark", 6.0) + steer.ZeroTuning(0.2),
}


def prompts(lengths=(17, 23, 9)):
    rng = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, VOCAB, (n,), generator=rng).tolist()

    meta = [
        {"right": [ids(1)], "wrong": [ids(3), ids(2)]},
        {"right": [ids(4), ids(2)], "wrong": [ids(1)]},
        {"right": [ids(2)], "wrong": [ids(2)]},
    ]
    rows = [ids(n) for n in lengths]
    return Prompts.from_ids(rows, spans=[{"mark": (2 + i, 6 + i)} for i in range(len(rows))], meta=meta[: len(rows)])


def alone(model, prompt, edits, heads, option):
    """Mean log-probability of one continuation, token by token, as generate() would run it."""
    chosen = Edits(tuple(replace(edit, heads=str(heads)) for edit in Edits(()) + edits))
    given, scores, cache = model_inputs(model, prompt), [], None
    with torch.no_grad(), steering(model, chosen, prompt):
        for step, token in enumerate(option):
            out = model(**given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scores.append(out.logits[0, -1].log_softmax(-1)[token])
            n = len(prompt[0]) + step
            given = {"input_ids": torch.tensor([[token]]), "attention_mask": torch.ones(1, n + 1, dtype=torch.int64)}
            given["position_ids"] = torch.tensor([[n]])
    return torch.stack(scores).mean()


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "phi3")]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", *SLOW])
@pytest.mark.parametrize("name", EDITS)
def test_rows_are_what_they_are_alone(family, name):
    model, batch = make(family, layers=3).eval(), prompts()
    made = ContinuationScorer(model, batch, EDITS[name])
    found = made.under(SETS, rows=7)
    for p in range(len(batch)):
        for i, heads in enumerate(SETS):
            for o, option in enumerate(made.options.ids[p]):
                torch.testing.assert_close(
                    found[p, i, o], alone(model, batch[p : p + 1], EDITS[name], heads, option), atol=2e-5, rtol=1e-5
                )
            assert (found[p, i, len(made.options.ids[p]) :] == -torch.inf).all()
    assert torch.equal(found[:, 2], made.base)
    # heads that differ do something
    assert (found[:, 0, 0] - made.base[:, 0]).abs().max() > 1e-4


def test_a_forward_begins_where_something_changes():
    model, batch = make("llama", layers=3).eval(), prompts()
    made = ContinuationScorer(model, batch, EDITS["zerotuning"])
    made.under([HeadSet.parse("L2H0"), HeadSet.parse("L2H1")])
    assert made.cost.prompts == 6
    assert made.cost.layers == pytest.approx(2)
    made.under([HeadSet.parse("L0H0")])
    assert made.cost.layers == pytest.approx(5)


def test_rows_before_a_span_are_read_once():
    model = make("llama", layers=2).eval()
    batch = Prompts.from_ids(
        [[*range(5, 25)], [*range(30, 46)]],
        spans=[{"mark": (10, 13)}, {"mark": (8, 11)}],
        meta=[{"right": [[7]], "wrong": [[8]]}] * 2,
    )
    sets = [HeadSet.parse("L0H0")]
    # the second prompt has four columns of padding
    near = ContinuationScorer(model, batch, EDITS["pasta"])
    near.under(sets)
    assert near.cost.layers == pytest.approx(2 * (1 - 10 / 20))
    whole = ContinuationScorer(model, batch, EDITS["zerotuning"])
    whole.under(sets)
    assert whole.cost.layers == pytest.approx(2)
    last = ContinuationScorer(model, batch, steer.Pasta("mark", 0.05, protect_first=True))
    last.under(sets)
    assert last.cost.layers == pytest.approx(2)


def test_the_model_is_as_it_was():
    model, batch = make("llama", layers=3).eval(), prompts()
    given = model_inputs(model, batch)
    with torch.no_grad():
        before = model(**given).logits
        ContinuationScorer(model, batch, EDITS["pasta"]).under(SETS)
        assert torch.equal(model(**given).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_wrapper_of_someone_else_stays():
    model, batch, calls = make("llama", layers=3).eval(), prompts(), []
    block = model.model.layers[0]
    real = block.forward

    def wrapper(*args, **kw):
        calls.append(1)
        return real(*args, **kw)

    block.forward = wrapper
    ContinuationScorer(model, batch, EDITS["zerotuning"]).under([HeadSet.parse("L2H0")])
    assert block.__dict__["forward"] is wrapper
    before = len(calls)
    with torch.no_grad():
        model(**model_inputs(model, batch))
    assert len(calls) == before + 1


def test_an_edit_that_does_next_to_nothing_gains_nothing_in_16_bits():
    model = make("llama", layers=3).eval().bfloat16()
    made = ContinuationScorer(model, prompts(), steer.Temperature(1 + 1e-6))
    found = made.under([HeadSet.parse(f"L{layer}H{head}") for layer in range(3) for head in range(4)])
    seen = made.base[:, None].expand_as(found) > -torch.inf
    gains = (found - made.base[:, None])[seen].abs()
    # a number that lay at the border of two may round the other way
    assert (gains > 0).float().mean() < 0.1
    assert gains.mean() < 2e-5


def test_margins_and_entropies():
    options = Options((((1,), (2,), (3,)), ((1,), (2,))), (1, 1))
    scores = torch.tensor([[[-1.0, -2.0, -1.5]], [[-3.0, -1.0, -torch.inf]]])
    assert margins(scores, options).tolist() == [[0.5], [-2.0]]
    low, high = entropies(torch.tensor([[[-50.0, 0.0, -torch.inf]], [[-1.0, -1.0, -torch.inf]]]))[:, 0].tolist()
    assert low < 1e-6
    assert high == pytest.approx(0.6931, abs=1e-3)


def test_batches_do_not_matter():
    model, batch = make("llama", layers=2).eval(), prompts()
    whole = ContinuationScorer(model, batch, EDITS["pasta"]).under(SETS[:2])
    parts = [ContinuationScorer(model, part, EDITS["pasta"]).under(SETS[:2], rows=1) for part in batch.batches(1)]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one[:, : other.shape[-1]], other[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "words"])
def test_continuations_are_tokenized_where_they_stand(kind):
    import tokenizers_tiny

    tokenizer = getattr(tokenizers_tiny, kind)()
    rows = [{"text": "say yes", "meta": {"right": [" or no"], "wrong": ["! and no"]}}]
    found = Options.of(Prompts.encode(tokenizer, rows)).ids[0]
    start = len(tokenizer("say yes", add_special_tokens=False)["input_ids"])
    for ids, text in zip(found, (" or no", "! and no"), strict=True):
        assert list(ids) == tokenizer("say yes" + text, add_special_tokens=False)["input_ids"][start:]


def test_bad_input():
    model, batch = make("llama", layers=2).eval(), prompts()
    with pytest.raises(UsageError, match="Gate is not a bias"):
        ContinuationScorer(model, batch, steer.Gate(0.5)).under(SETS[:1])
    with pytest.raises(HeadError, match="L2H0"):
        ContinuationScorer(model, batch, EDITS["pasta"]).under([HeadSet.parse("L2H0")])
    for wrong in ([5], [["a"]], [[1], "b"]):
        bad = Prompts.from_ids([[5, 6]], meta=[{"right": wrong, "wrong": [[4]]}])
        with pytest.raises(PromptError, match="neither texts nor ids"):
            ContinuationScorer(model, bad, EDITS["zerotuning"])
    with pytest.raises(PromptError, match='no "right"'):
        ContinuationScorer(model, Prompts.from_ids([[5, 6, 7]]), EDITS["zerotuning"])
