"""Concept induction: against eager attention weighed by values, on planted heads, with its task and errors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from detectors import prompts as planted_prompts
from eager_calls import calls
from tokenizers_tiny import byte_level

from interp.analyses import identify, tasks
from interp.analyses.tasks.haystack import paragraphs
from interp.errors import PromptError, SpanError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted


def repeated(lengths=(15, 22, 18), entity=(9, 13), seed=0):
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        first = torch.randint(3, 128, (n,), generator=rng).tolist()
        rows.append([1, *first, 2, *first[: entity[0] - 1]])
    return Prompts.from_ids(rows, spans=[{"entity": entity}] * len(rows))


def check_against_eager(model, prompts, target):
    """Both kinds of scores of every head against the formula on eager patterns and values."""
    weighed = identify.concept_induction(model, prompts, target=target, right_only=False, batch_size=2)
    plain = identify.concept_induction(model, prompts, target=target, by_value=False, right_only=False)
    for i, prompt in enumerate(prompts):
        ((start, stop),) = prompt.spans["entity"]
        key = stop - 1 if target == "last" else start
        eager = calls(model, prompt)
        p = eager.pattern[:, :, -1]
        w = p * eager.v.norm(dim=-1)
        torch.testing.assert_close(weighed.per_prompt[i], w[..., key] / w.sum(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(plain.per_prompt[i], p[..., key], atol=1e-4, rtol=0)
        assert w[..., key].max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("target", ["last", "next"])
def test_equals_eager_attention_weighed_by_values(tiny_model, name, target):
    check_against_eager(tiny_model(name), repeated(), target)


@pytest.mark.parametrize("target", ["last", "next"])
def test_equals_eager_attention_on_the_demo_model(demo, target):
    model, tokenizer = demo
    for random in (False, True):
        check_against_eager(model, tasks.entities(tokenizer, n=2, random=random, seed=1), target)


def test_a_control_stands_beside_it(tiny_model):
    model = tiny_model("llama")
    prompts, control = repeated(), repeated(seed=1)
    both = identify.concept_induction(model, prompts, control, right_only=False)
    alone = [identify.concept_induction(model, side, right_only=False) for side in (prompts, control)]
    assert torch.equal(both.per_prompt, alone[0].per_prompt)
    assert torch.equal(both.extras["control"], alone[1].per_prompt)
    assert both.name == "concept_induction"
    assert identify.concept_induction(model, prompts, target="next").name == "token_induction"


def goes_on_with(model, prompt):
    with torch.no_grad():
        return int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax())


def test_prompts_count_where_the_model_goes_on_with_the_word(tiny_model):
    model, prompts = tiny_model("llama"), repeated()
    # the second prompt gets the token at the start of its word that makes the model write it, where there is one
    start, stop = prompts[1].spans["entity"][0]
    for token in range(3, 128):
        ids = (*prompts[1].ids[:start], token, *prompts[1].ids[start + 1 :])
        if goes_on_with(model, replace(prompts[1], ids=ids)) == token:
            break
    else:
        pytest.fail("no token makes the model write it")
    made = replace(prompts, items=(prompts[0], replace(prompts[1], ids=ids), prompts[2]))
    counts = [goes_on_with(model, prompt) == prompt.ids[start] for prompt in made]
    assert counts == [False, True, False]
    for target in ("last", "next"):
        gated = identify.concept_induction(model, made, repeated(seed=1), target=target)
        every = identify.concept_induction(model, made, repeated(seed=1), target=target, right_only=False)
        assert gated.counted == 1
        assert torch.equal(gated.per_prompt[1], every.per_prompt[1])
        assert torch.equal(gated.extras["control"][1], every.extras["control"][1])
        assert gated.extras["control"][[0, 2]].isnan().all()
    assert stop - start == 4
    none = identify.concept_induction(model, prompts[:1])
    assert (none.counted, none.top(3)) == (0, [])


def test_words_count_where_the_demo_model_writes_them(demo):
    model, tokenizer = demo
    prompts = tasks.entities(tokenizer, n=6)
    counts = [goes_on_with(model, prompt) == prompt.ids[prompt.spans["entity"][0][0]] for prompt in prompts]
    scores = identify.concept_induction(model, prompts)
    assert (~scores.per_prompt.isnan()).flatten(1).all(1).tolist() == counts
    assert any(counts)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_the_head_that_copies_token_by_token_is_found_by_the_next_token_and_not_by_the_last(family):
    for seed in range(6):
        for shuffled in (False, True):
            truth = planted.make("retrieval", seed, family, shuffled=shuffled)
            made = planted_prompts("retrieval", seed)
            spans = [{"entity": prompt.spans["answer"]} for prompt in made]
            batch = Prompts.from_ids([prompt.ids for prompt in made], spans=spans, pad_id=planted.PAD)
            found = {
                kind: identify.concept_induction(truth.model, batch, target=kind, right_only=False)
                for kind in ("next", "last")
            }
            assert found["last"][truth.head] < 0.2, seed
            if shuffled:
                assert found["next"][truth.head] < 0.45, seed
            else:
                assert found["next"].top(1) == [truth.head], seed
                assert found["next"][truth.head] > 0.9, seed


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_the_head_that_looks_at_the_end_of_the_word_is_found_by_the_last_token(family):
    """A head that looks for its own token, where the last token of the prompt is that of the word's end."""
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        rows = []
        for n in (20, 26):
            ids = (torch.randperm(planted.VOCAB - planted.FIRST_WORD, generator=rng)[:n] + planted.FIRST_WORD).tolist()
            rows.append([planted.BOS, *ids, ids[11]])
        batch = Prompts.from_ids(rows, spans=[{"entity": (9, 13)}] * 2, pad_id=planted.PAD)
        truth = planted.make("duplicate_token", seed, family)
        found = {
            kind: identify.concept_induction(truth.model, batch, target=kind, right_only=False)
            for kind in ("next", "last")
        }
        assert found["last"].top(1) == [truth.head], seed
        assert found["last"][truth.head] > 0.9, seed
        assert found["next"][truth.head] < 0.1, seed
        control = planted.make("duplicate_token", seed, family, shuffled=True)
        assert identify.concept_induction(control.model, batch, right_only=False)[truth.head] < 0.45, seed


def test_errors_say_what_to_do(tiny_model):
    model, prompts = tiny_model("llama"), repeated()
    with pytest.raises(UsageError, match="unknown target 'first'; choose from 'last'"):
        identify.concept_induction(model, prompts, target="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="1 controls and 3 prompts do not match; give one control"):
        identify.concept_induction(model, prompts, prompts[:1])
    with pytest.raises(SpanError, match='prompt 0 has no span "entity"'):
        identify.concept_induction(model, Prompts.from_ids([[5, 6, 7]]))
    for spans, said in (({"entity": (1, 3)}, "up to token 3 of 3"), ({"entity": [(0, 1), (1, 2)]}, "in 2 places")):
        with pytest.raises(SpanError, match=said):
            identify.concept_induction(model, Prompts.from_ids([[5, 6, 7]], spans=[spans]))


@pytest.mark.parametrize("context", ["shuffled", "text"])
def test_entities_come_again_up_to_the_word(demo, context):
    _, tokenizer = demo
    entities = partial(tasks.entities, tokenizer, context=context)
    prompts, mixed = entities(n=12), entities(n=12, random=True)
    assert len({prompt.meta["entity"] for prompt in prompts}) > 5
    sizes = {stop - start for prompt in prompts for start, stop in prompt.spans["entity"]}
    assert len(sizes) > 1
    assert sizes <= {2, 3, 4, 5}
    for real, random in zip(prompts, mixed, strict=True):
        start, stop = real.spans["entity"][0]
        assert tokenizer.decode(real.ids[start:stop]).strip() == real.meta["entity"]
        assert real.ids[-start:] == real.ids[:start]
        assert tokenizer.decode(real.ids[-start - 1]) == "\n"
        assert random.spans == real.spans
        assert random.ids[:start] + random.ids[stop:] == real.ids[:start] + real.ids[stop:]
        assert random.ids[start:stop] != real.ids[start:stop]
    assert entities(n=3, random=True).items == mixed.items[:3]
    assert entities(n=3, seed=1) != entities(n=3)


def test_a_shuffled_context_has_the_length_of_the_paper_and_no_order(demo):
    _, tokenizer = demo
    orders = set()
    for prompt in tasks.entities(tokenizer, n=12):
        start, stop = prompt.spans["entity"][0]
        assert 15 <= start <= 30 - (stop - start)
        assert len(prompt) == 30 + 1 + start
        text = tokenizer(" ".join(next(paragraphs(f"{prompt.meta['id']}/0"))), add_special_tokens=False)["input_ids"]
        assert sorted(prompt.ids[:start]) == sorted(text[:start])
        orders.add(prompt.ids[:start] == tuple(text[:start]))
    assert orders == {False}


def test_a_shuffled_context_begins_as_the_tokenizer_begins_a_text():
    for bos in (False, True):
        tokenizer = byte_level(bos=bos, chat=False)
        (prompt,) = tasks.entities(tokenizer, n=1)
        start, stop = prompt.spans["entity"][0]
        assert (prompt.ids[0] == tokenizer.bos_token_id) is bos
        assert len(prompt) == bos + 30 + 1 + start - bos
        assert str(tokenizer.decode(list(prompt.ids[start:stop]))).strip() == prompt.meta["entity"]


@pytest.mark.parametrize("given", [{"n": 0}, {"min_tokens": 1}, {"min_tokens": 6}, {"context": "none"}])
def test_entities_refuse(demo, given):
    with pytest.raises(UsageError, match="ask for one prompt or more, with words of 2 to 5 tokens"):
        tasks.entities(demo[1], **given)
    with pytest.raises(PromptError, match="words have the same number of tokens from 5 to 5 for this tokenizer"):
        tasks.entities(demo[1], min_tokens=5)


def test_the_control_changes_nothing_in_the_originals(demo):
    prompts = tasks.entities(demo[1], n=2)
    tasks.entities(demo[1], n=2, random=True)
    assert prompts == tasks.entities(demo[1], n=2)
    assert replace(prompts, items=prompts.items[:1]) == tasks.entities(demo[1], n=1)
