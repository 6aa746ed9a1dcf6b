"""Function vectors: against plain hooks, one head at a time, on a planted head, with their task and errors."""

from dataclasses import replace

import planted
import pytest
import torch

from interp.analyses import identify, tasks
from interp.analyses.tasks.task import data
from interp.hooks.modules import attention_layers, projection_name
from interp.hooks.prompts import Prompts
from interp.kernels.errors import HeadError, PromptError, UsageError


def few_shot(seed, lengths, relation="r", vocab=128):
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (n,), generator=rng).tolist() for n in lengths]
    meta = [{"relation": relation, "right": [[5 + i, 6]], "wrong": [[90]]} for i in range(len(rows))]
    return Prompts.from_ids(rows, meta=meta)


def projection(model, layer):
    module = attention_layers(model)[layer]
    return getattr(module, str(projection_name(module)))


def z_at_last(model, prompt):
    """[l h d] by plain hooks."""
    seen = {}
    handles = [
        projection(model, layer).register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0]}))
        for layer in range(2)
    ]
    with torch.no_grad():
        model(torch.tensor([prompt.ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([seen[layer][0, -1].view(4, -1) for layer in range(2)])


def answer_with(model, prompt, layer=None, head=None, z=None):
    """The probability of the answer, one head's last z replaced."""

    def put(_, args):
        x = args[0].clone()
        x[0, -1].view(4, -1)[head] = z
        return (x,)

    handle = None if layer is None else projection(model, layer).register_forward_pre_hook(put)
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1]
    if handle is not None:
        handle.remove()
    return float(logits.softmax(-1)[prompt.meta["right"][0][0]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_effects_equal_plain_hooks(tiny_model, name):
    model = tiny_model(name)
    clean = few_shot(0, (12, 17), "one") + few_shot(1, (14,), "two")
    shuffled = few_shot(2, (15, 11), "one") + few_shot(3, (18,), "two")
    scores = identify.function_vectors(model, clean, shuffled, batch_size=2)
    z = torch.stack([z_at_last(model, prompt) for prompt in clean])
    means = [z[:2].mean(0), z[:2].mean(0), z[2]]
    for i, (prompt, mean) in enumerate(zip(shuffled, means, strict=True)):
        base = answer_with(model, prompt)
        for layer in range(2):
            for head in range(4):
                put = answer_with(model, prompt, layer, head, mean[layer, head])
                assert float(scores.per_prompt[i, layer, head]) == pytest.approx(put - base, abs=1e-5)
                assert float(scores.extras["patched"][i, layer, head]) == pytest.approx(put, abs=1e-5)
    assert scores.per_prompt.abs().max() > 1e-3
    parts = [identify.function_vectors(model, clean, shuffled[i : i + 1], rows=3) for i in range(3)]
    torch.testing.assert_close(type(scores).concat(parts).per_prompt, scores.per_prompt, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_vector_of_all_heads_is_what_attention_writes(tiny_model, name):
    model = tiny_model(name)
    clean = few_shot(0, (12, 17, 14))
    z = torch.stack([z_at_last(model, prompt) for prompt in clean]).mean(0)
    with torch.no_grad():
        wrote = [projection(model, layer)(z[layer].flatten()[None])[0] for layer in range(2)]
        bias = [projection(model, layer)(torch.zeros(1, 64))[0] for layer in range(2)]
    every = identify.function_vector(model, clean, "all")
    torch.testing.assert_close(every, sum(wrote) - sum(bias), atol=1e-5, rtol=0)
    parts = [identify.function_vector(model, clean, heads) for heads in ("L0H0, L1H2", "L0H1-L0H3, L1H0, L1H1, L1H3")]
    torch.testing.assert_close(parts[0] + parts[1], every, atol=1e-5, rtol=0)
    assert parts[0].shape == (64,)


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
        assert identify.function_vectors(control.model, clean, mixed)[truth.head] < 0.1, seed
        vector = identify.function_vector(truth.model, clean, [truth.head])
        output = truth.model.get_output_embeddings().weight
        assert int((output @ vector).argmax()) == planted.NO, seed


def test_errors_say_what_to_do(tiny_model):
    model, clean = tiny_model("llama"), few_shot(0, (12, 17))
    with pytest.raises(PromptError, match="0 clean and 2 shuffled prompts"):
        identify.function_vectors(model, clean[:0], clean)
    with pytest.raises(PromptError, match="no clean prompt shows 'other'"):
        identify.function_vectors(model, clean, few_shot(0, (12,), "other"))
    bare = replace(clean, items=tuple(replace(prompt, meta={}) for prompt in clean))
    with pytest.raises(PromptError, match='prompt 0 has no "right" continuations'):
        identify.function_vectors(model, clean, bare)
    with pytest.raises(HeadError, match="layer 7 of a 2-layer model"):
        identify.function_vector(model, clean, "L7H0")
    with pytest.raises(UsageError, match="no heads given"):
        identify.function_vector(model, clean, [])


def test_relations_and_their_mixed_up_twins(demo):
    _, tokenizer = demo
    for name in ("antonym", "capital", "plural"):
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


def _examples(text):
    lines = [part.removeprefix("Q: ").split("\nA: ") for part in text.split("\n\n")[:-1]]
    return [(word, answer) for word, answer in lines]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"relation": "odd"}, "use one of antonym, capital, plural"),
        ({"n": 0}, "n=0, shots=5: ask for a prompt or more"),
        ({"shots": 1, "shuffled": True}, "with 2 to 47 examples"),
    ],
)
def test_relations_refuse(demo, given, said):
    with pytest.raises(UsageError, match=said):
        tasks.relations(demo[1], **given)
