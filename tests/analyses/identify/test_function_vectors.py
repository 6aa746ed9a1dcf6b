"""Function vectors: against plain hooks, one head at a time, on a planted head, with their task and errors."""

from collections import Counter
from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
import torch
from eager_calls import attending, calls

from interp.analyses import identify, tasks
from interp.analyses.tasks.relations import deranged
from interp.analyses.tasks.task import data
from interp.errors import HeadError, PromptError, UsageError
from interp.hooks.model.layers import attention_layers, projection_name
from interp.hooks.prompts.prompts import Prompts
from interp.testing import planted

RELATIONS = ("antonym", "capital", "plural", "past", "comparative")


def few_shot(seed, lengths, relation="r", vocab=128):
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (n,), generator=rng).tolist() for n in lengths]
    meta = [{"relation": relation, "right": [[5 + i, 6]], "wrong": [[90]]} for i in range(len(rows))]
    return Prompts.from_ids(rows, meta=meta)


def answers_with(model, prompt, answer, layer, z):
    """The probability of an answer [h], in row h with z[h] [d] in place of what head h gathers at the last token."""

    def put(own, module, *args, **settings):
        out, pattern = own(module, *args, **settings)
        if module.layer_idx == layer:
            out = out.clone()
            for head, value in enumerate(z):
                out[head, -1, head] = value
        return out, pattern

    with torch.no_grad(), attending(model, put):
        logits = model(torch.tensor([prompt.ids] * len(z)), logits_to_keep=1).logits[:, -1]
    return logits.softmax(-1)[:, answer]


def mean_at_last(model, clean, relation):
    """zbar [l h d]."""
    return torch.stack(
        [calls(model, prompt).z[:, :, -1] for prompt in clean if prompt.meta["relation"] == relation]
    ).mean(0)


def literal_effects(model, clean, prompt, answer):
    """The probability of the answer's token [l h] with each head patched, by the formula; and as it is."""
    mean = mean_at_last(model, clean, prompt.meta["relation"])
    with torch.no_grad(), attending(model, lambda own, *args, **settings: own(*args, **settings)):
        base = model(torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)[answer]
    return torch.stack([answers_with(model, prompt, answer, layer, z) for layer, z in enumerate(mean)]), base


def check_against_eager(model, clean, shuffled, answers, atol):
    """Effects of every head on every prompt; answers: the token that each is about."""
    scores = identify.function_vectors(model, clean, shuffled, right_only=False, batch_size=2)
    for i, (prompt, answer) in enumerate(zip(shuffled, answers, strict=True)):
        patched, base = literal_effects(model, clean, prompt, answer)
        torch.testing.assert_close(scores.per_prompt[i], patched - base, atol=atol, rtol=0)
        torch.testing.assert_close(scores.extras["patched"][i], patched, atol=atol, rtol=0)
    assert scores.per_prompt.abs().max() > 1e-3
    return scores


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_effects_equal_one_head_at_a_time(tiny_model, name):
    model = tiny_model(name)
    clean = few_shot(0, (12, 17), "one") + few_shot(1, (14,), "two")
    shuffled = few_shot(2, (15, 11), "one") + few_shot(3, (18,), "two")
    scores = check_against_eager(model, clean, shuffled, (5, 6, 5), 1e-5)
    parts = [identify.function_vectors(model, clean, shuffled[i : i + 1], right_only=False, rows=3) for i in range(3)]
    torch.testing.assert_close(type(scores).concat(parts).per_prompt, scores.per_prompt, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_effects_equal_one_head_at_a_time_on_the_demo_model(demo):
    model, tokenizer = demo
    clean = tasks.relations(tokenizer, "capital", n=2, shots=2, seed=1)
    shuffled = tasks.relations(tokenizer, "capital", n=1, shots=2, shuffled=True, seed=1)
    answers = []
    for prompt in shuffled:
        whole = tokenizer(prompt.text + prompt.meta["right"][0])["input_ids"]
        assert tuple(whole[: len(prompt)]) == prompt.ids
        answers.append(whole[len(prompt)])
    check_against_eager(model, clean, shuffled, answers, 1e-4)


def best_token(model, prompt):
    with torch.no_grad():
        return int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax())


def with_answers(prompts, answers, ids):
    meta = [
        {"relation": "r", "right": [[answer]], "wrong": [[90]], "id": name}
        for answer, name in zip(answers, ids, strict=True)
    ]
    return replace(prompts, items=tuple(replace(p, meta=m) for p, m in zip(prompts, meta, strict=True)))


def test_means_and_effects_are_those_of_prompts_that_the_model_answers(tiny_model):
    model = tiny_model("llama")
    rows, mixed = few_shot(0, (12, 17, 14)), few_shot(2, (15, 11, 18, 13))
    right = [best_token(model, prompt) for prompt in rows]
    # of three clean prompts the second is answered wrong
    clean = with_answers(rows, (right[0], right[1] + 1, right[2]), "abc")
    # twins of the first and the second, a prompt without a twin, and a twin of the third
    shuffled = with_answers(mixed, (right[0], right[1] + 1, 9, right[2]), "abxc")
    scores = identify.function_vectors(model, clean, shuffled, batch_size=2)
    counts = [True, False, True, True]
    assert (~scores.per_prompt.isnan()).flatten(1).all(1).tolist() == counts
    assert scores.counted == 3
    used = replace(clean, items=(clean[0], clean[2]))
    for number in (0, 2, 3):
        prompt = shuffled[number]
        patched, base = literal_effects(model, used, prompt, prompt.meta["right"][0][0])
        torch.testing.assert_close(scores.per_prompt[number], patched - base, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.extras["patched"][number], patched, atol=1e-5, rtol=0)
    assert scores.extras["patched"][1].isnan().all()
    every = identify.function_vectors(model, clean, shuffled, right_only=False)
    assert every.counted == 4


def test_where_the_model_does_no_task_no_head_has_a_score(tiny_model):
    model, clean = tiny_model("llama"), few_shot(0, (12, 17))
    wrong = with_answers(clean, [best_token(model, prompt) + 1 for prompt in clean], "ab")
    scores = identify.function_vectors(model, wrong, wrong)
    assert scores.per_prompt.isnan().all()
    assert scores.top(3) == []
    assert scores.counted == scores.n_scored == 0


@pytest.mark.slow
def test_relations_count_where_the_demo_model_answers_them(demo):
    model, tokenizer = demo
    clean, mixed = (tasks.relations(tokenizer, "capital", n=4, shuffled=s) for s in (False, True))
    right = [tokenizer.decode([best_token(model, p)]) == _first(tokenizer, p) for p in clean]
    scores = identify.function_vectors(model, clean, mixed)
    assert (~scores.per_prompt.isnan()).flatten(1).all(1).tolist() == right
    assert any(right)


def _first(tokenizer, prompt):
    """The first token of the answer, as it comes after the prompt."""
    return tokenizer.decode([tokenizer(prompt.text + prompt.meta["right"][0])["input_ids"][len(prompt)]])


def literal_vector(model, clean, relation, heads):
    """By the formula, with the model's own output projections."""
    mean = mean_at_last(model, clean, relation)
    total = 0
    for layer, z in enumerate(mean):
        module = attention_layers(model)[layer]
        project = getattr(module, str(projection_name(module)))
        kept = torch.zeros_like(z)
        for head in (head for where, head in heads if where == layer):
            kept[head] = z[head]
        with torch.no_grad():
            total = total + project(kept.view(1, -1))[0] - project(torch.zeros(1, z.numel()))[0]
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_vector_of_all_heads_is_what_attention_writes(tiny_model, name):
    model = tiny_model(name)
    clean = few_shot(0, (12, 17, 14))
    every = identify.function_vector(model, clean, "all")
    parts = [identify.function_vector(model, clean, heads) for heads in ("L0H0, L1H2", "L0H1-L0H3, L1H0, L1H1, L1H3")]
    torch.testing.assert_close(every, literal_vector(model, clean, "r", [(i, j) for i in range(2) for j in range(4)]))
    torch.testing.assert_close(parts[0], literal_vector(model, clean, "r", [(0, 0), (1, 2)]), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[0] + parts[1], every, atol=1e-5, rtol=0)
    assert parts[0].shape == (64,)


def test_the_vector_equals_eager_on_the_demo_model(demo):
    model, tokenizer = demo
    clean = tasks.relations(tokenizer, "antonym", n=2, seed=1)
    heads = [(3, 1), (11, 0), (11, 7), (20, 4), (29, 8)]
    found = identify.function_vector(model, clean, ", ".join(f"L{layer}H{head}" for layer, head in heads))
    torch.testing.assert_close(found, literal_vector(model, clean, "antonym", heads), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_the_planted_head_carries_the_answer_and_not_when_it_writes_something_else(family):
    for seed in range(8):
        meta = [{"right": [[planted.NO]], "wrong": [[planted.FIRST_WORD]]}] * 6
        clean, mixed = (
            Prompts.from_ids(planted.requests(seed, harmful, 6), meta=meta, pad_id=planted.PAD)
            for harmful in (True, False)
        )
        truth = planted.refusing(seed, family)
        scores = identify.function_vectors(truth.model, clean, mixed)
        assert scores.top(1) == [truth.head], seed
        assert scores[truth.head] > 0.5, seed
        control = planted.refusing(seed, family, shuffled=True)
        # the control refuses nothing, so there is no task and no head with a score
        assert identify.function_vectors(control.model, clean, mixed).n_scored == 0, seed
        assert identify.function_vectors(control.model, clean, mixed, right_only=False)[truth.head] < 0.1, seed
        vector = identify.function_vector(truth.model, clean, [truth.head])
        output = truth.model.get_output_embeddings().weight
        assert int((output @ vector).argmax()) == planted.NO, seed


def test_errors_say_what_to_do(tiny_model):
    model, clean = tiny_model("llama"), few_shot(0, (12, 17))
    with pytest.raises(PromptError, match="0 clean and 2 shuffled prompts"):
        identify.function_vectors(model, clean[:0], clean)
    with pytest.raises(PromptError, match="no clean prompt has the relation 'other'"):
        identify.function_vectors(model, clean, few_shot(0, (12,), "other"))
    bare = replace(clean, items=tuple(replace(prompt, meta={}) for prompt in clean))
    with pytest.raises(PromptError, match='prompt 0 has no "right" continuations'):
        identify.function_vectors(model, clean, bare)
    with pytest.raises(HeadError, match="layer 7 of a 2-layer model"):
        identify.function_vector(model, clean, "L7H0")
    with pytest.raises(UsageError, match="no heads are given"):
        identify.function_vector(model, clean, [])


def test_relations_and_their_mixed_up_twins(demo):
    _, tokenizer = demo
    for name in RELATIONS:
        clean = tasks.relations(tokenizer, name, n=12)
        mixed = tasks.relations(tokenizer, name, n=12, shuffled=True)
        known = dict(data("relations.json")[name])
        assert len(known) >= 30
        for one, other in zip(clean, mixed, strict=True):
            shown, twisted = _examples(one.text), _examples(other.text)
            assert all(known[word] == answer for word, answer in shown)
            assert all(known[word] != answer for word, answer in twisted)
            assert sorted(answer for _, answer in shown) == sorted(answer for _, answer in twisted)
            assert [word for word, _ in shown] == [word for word, _ in twisted]
            assert len(one) == len(other)
            start, stop = one.spans["question"][0]
            word = tokenizer.decode(one.ids[start:stop]).strip()
            assert one.text.endswith(f"Q: {word}\nA:")
            assert one.meta["right"] == other.meta["right"] == [f" {known[word]}"]
            assert word not in dict(shown)
    assert tasks.relations(tokenizer, n=3).items == tasks.relations(tokenizer, n=12).items[:3]
    assert tasks.relations(tokenizer, n=3, seed=1) != tasks.relations(tokenizer, n=3)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_answers_are_permuted_in_every_way_that_leaves_none_in_its_place(n):
    possible = [order for order in permutations(range(n)) if all(i != place for i, place in enumerate(order))]
    drawn = Counter(tuple(deranged(n, Random(seed))) for seed in range(200 * len(possible)))
    assert set(drawn) == set(possible)
    # each is expected 200 times
    assert max(abs(count - 200) for count in drawn.values()) < 70


def _examples(text):
    lines = [part.removeprefix("Q: ").split("\nA: ") for part in text.split("\n\n")[:-1]]
    return [(word, answer) for word, answer in lines]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"relation": "odd"}, "choose from antonym, capital, plural, past, comparative"),
        ({"n": 0}, "n=0, shots=5 are out of range; ask for at least one prompt"),
        ({"shots": 1, "shuffled": True}, "with 2 to 47 examples"),
    ],
)
def test_relations_refuse(demo, given, said):
    with pytest.raises(UsageError, match=said):
        tasks.relations(demo[1], **given)
