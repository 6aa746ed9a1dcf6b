"""The planted head does its job by the plain definition of the score, and the control does not."""

import pytest
import torch
from torch import Tensor

from interp.testing import planted
from interp.testing.planted import FAMILIES, HEADS, KINDS, LAYERS, PAD, Planted, Task

SEEDS = range(20)
EVERY = pytest.mark.parametrize(("kind", "family"), [(kind, family) for family in FAMILIES for kind in KINDS])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def patterns(model, rows: list[list[int]]) -> list[Tensor]:
    """Eager attention of each prompt, [l h q k] without the padding."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    whole = torch.stack(model(**padded(rows), output_attentions=True).attentions, dim=1)
    model.set_attn_implementation(before)
    return [pattern[:, :, -len(row) :, -len(row) :] for pattern, row in zip(whole, rows, strict=True)]


def replies(model, task: Task) -> list[list[int]]:
    inputs = padded(task.ids)
    del inputs["position_ids"]
    out = model.generate(**inputs, max_new_tokens=planted.ANSWER, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def diagonal(pattern: Tensor, rows: range, back: int) -> Tensor:
    return torch.stack([pattern[:, :, q, q - back] for q in rows]).mean(0)


def induction(pattern: Tensor, ids: list[int], n: int) -> Tensor:
    return diagonal(pattern, range(n + 1, 2 * n + 1), n - 1)


def previous(pattern: Tensor, ids: list[int]) -> Tensor:
    return diagonal(pattern, range(1, len(ids)), 1)


def duplicate(pattern: Tensor, ids: list[int]) -> Tensor:
    rows = [(q, [k for k in range(q) if ids[k] == token]) for q, token in enumerate(ids)]
    return torch.stack([pattern[:, :, q, keys].sum(-1) for q, keys in rows if keys]).mean(0)


def sink(pattern: Tensor, ids: list[int]) -> Tensor:
    return pattern[:, :, 1:, 0].mean(-1)


def retrieval(pattern: Tensor, ids: list[int], reply: list[int], answer: tuple[int, int]) -> Tensor:
    """`ids` and `pattern` end with the reply; the token at position q + 1 was written by row q."""
    start, stop = answer
    hits = torch.zeros(LAYERS, HEADS)
    for step, token in enumerate(reply):
        best = pattern[:, :, len(ids) - len(reply) + step - 1].argmax(-1)
        hits += (best >= start) & (best < stop) & (torch.tensor(ids)[best] == token)
    return hits / (stop - start)


def copied(pattern: Tensor, ids: list[int]) -> Tensor:
    """What the last token pays to the token after its earlier occurrence."""
    return pattern[:, :, -1, ids.index(ids[-1]) + 1]


def score(kind: str, model, task: Task) -> Tensor:
    """Mean score [l h] over the prompts."""
    if kind == "retrieval":
        written = replies(model, task)
        whole = [ids + reply for ids, reply in zip(task.ids, written, strict=True)]
        spans = [span["answer"][0] for span in task.spans]
        rows = zip(patterns(model, whole), whole, written, spans, strict=True)
        return torch.stack([retrieval(*row) for row in rows]).mean(0)
    pairs = list(zip(patterns(model, task.ids), task.ids, strict=True))
    if kind == "induction":
        return torch.stack([induction(*pair, n=meta["n"]) for pair, meta in zip(pairs, task.meta, strict=True)]).mean(0)
    if kind in ("documents", "options"):
        return torch.stack([copied(*pair) for pair in pairs]).mean(0)
    plain = {"previous_token": previous, "duplicate_token": duplicate, "sink": sink, "echo": duplicate}[kind]
    return torch.stack([plain(*pair) for pair in pairs]).mean(0)


def split(scores: Tensor, made: Planted) -> tuple[float, float]:
    """Score of the planted head, and the best of all others."""
    others = scores.clone()
    others[made.head] = -1
    return scores[made.head].item(), others.max().item()


@EVERY
def test_planted_head_is_first_by_far(kind, family):
    for seed in SEEDS:
        made = planted.make(kind, seed, family)
        head, other = split(score(kind, made.model, planted.prompts(kind, seed)), made)
        assert head > 0.95, (seed, head)
        assert other < 0.3, (seed, other)


@EVERY
def test_job_is_gone_when_the_query_weights_are_shuffled(kind, family):
    for seed in SEEDS:
        made = planted.make(kind, seed, family, shuffled=True)
        head, _ = split(score(kind, made.model, planted.prompts(kind, seed)), made)
        assert head < 0.45, (seed, head)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_changes_only_the_query_of_the_planted_head(family):
    made = planted.make("sink", 3, family).model.state_dict()
    control = planted.make("sink", 3, family, shuffled=True).model.state_dict()
    changed = [name for name in made if not torch.equal(made[name], control[name])]
    assert len(changed) == 1
    name = changed[0]
    assert (made[name] != control[name]).sum() <= planted.HIDDEN[family] * planted.HEAD_DIM
    torch.testing.assert_close(made[name].flatten().sort().values, control[name].flatten().sort().values)


@pytest.mark.parametrize("family", FAMILIES)
def test_data_controls_leave_no_score(family):
    for seed in range(5):
        for kind in ("induction", "retrieval"):
            made = planted.make(kind, seed, family)
            head, _ = split(score(kind, made.model, planted.prompts(kind, seed, shuffled=True)), made)
            assert head < 0.1, (kind, seed, head)
        made = planted.make("duplicate_token", seed, family)
        task = planted.prompts("duplicate_token", seed, shuffled=True)
        assert all(len(set(ids)) == len(ids) for ids in task.ids)
        on_itself = torch.stack([diagonal(p, range(p.shape[-1]), 0) for p in patterns(made.model, task.ids)]).mean(0)
        assert on_itself[made.head] > 0.9


def test_kinds_without_a_data_control_say_so():
    with pytest.raises(ValueError, match=r"No control in the data for 'sink'; use make\('sink', seed, shuffled=True\)"):
        planted.prompts("sink", 0, shuffled=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_sink_holds_every_query(family):
    for seed in SEEDS:
        made = planted.make("sink", seed, family)
        layer, head = made.head
        for pattern in patterns(made.model, planted.prompts("sink", seed).ids):
            assert pattern[layer, head, :, 0].min() > 0.8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["induction", "retrieval"])
def test_helper_is_the_previous_token_head(kind, family):
    for seed in range(5):
        made = planted.make(kind, seed, family)
        assert made.helper is not None
        assert made.helper[0] < made.head[0]
        scores = score("previous_token", made.model, planted.prompts(kind, seed))
        assert scores[made.helper] > 0.95
        scores[made.helper] = -1
        assert scores.max() < 0.3


def silence(made: Planted, head: tuple[int, int]) -> None:
    columns = slice(head[1] * planted.HEAD_DIM, (head[1] + 1) * planted.HEAD_DIM)
    if made.family == "gpt2":
        made.model.transformer.h[head[0]].attn.c_proj.weight[columns] = 0
    else:
        made.model.model.layers[head[0]].self_attn.o_proj.weight[:, columns] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_depends_on_the_retrieval_head(family):
    for seed in range(5):
        made, task = planted.make("retrieval", seed, family), planted.prompts("retrieval", seed)
        answers = [meta["answer_ids"] for meta in task.meta]
        spans = [ids[slice(*span["answer"][0])] for ids, span in zip(task.ids, task.spans, strict=True)]
        assert replies(made.model, task) == answers == spans
        noise = (made.head[0], (made.head[1] + 1) % HEADS)
        if noise != made.helper:
            silence(made, noise)
            assert replies(made.model, task) == answers
        silence(made, made.head)
        assert all(reply[0] != answer[0] for reply, answer in zip(replies(made.model, task), answers, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_heads_attend_like_heads(family):
    for kind in KINDS:
        made = planted.make(kind, 1, family)
        (pattern, *_) = patterns(made.model, planted.prompts(kind, 1).ids)
        last = pattern[:, :, -1]
        evenness = torch.special.entr(last).sum(-1) / torch.tensor(last.shape[-1]).log()
        for head in (made.head, made.helper):
            if head:
                evenness[head] = 0.8
        assert evenness.min() > 0.3, (kind, evenness)
        assert evenness.max() < 0.995, (kind, evenness)


@EVERY
def test_left_padding_changes_nothing(kind, family):
    made, task = planted.make(kind, 2, family), planted.prompts(kind, 2)
    assert len({len(ids) for ids in task.ids}) > 1
    inputs = padded(task.ids)
    if family == "llama":
        del inputs["position_ids"]
    for row, ids in zip(made.model(**inputs).logits, task.ids, strict=True):
        alone = made.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(row[-len(ids) :], alone, atol=2e-4, rtol=1e-4)


def test_gpt2_numbers_pads_unless_positions_are_given():
    made, task = planted.make("sink", 2), planted.prompts("sink", 2)
    inputs = padded(task.ids)
    del inputs["position_ids"]
    short = min(range(len(task.ids)), key=lambda i: len(task.ids[i]))
    alone = made.model(torch.tensor([task.ids[short]])).logits[0]
    assert (made.model(**inputs).logits[short, -len(alone) :] - alone).abs().max() > 0.1


@EVERY
def test_same_seed_same_model_and_places_vary(kind, family):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = planted.make(kind, 5, family), planted.make(kind, 5, family)
    assert torch.equal(state, torch.get_rng_state())
    assert one.head == two.head
    assert planted.prompts(kind, 5) == planted.prompts(kind, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not one.model.training
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
    assert one.model.config._attn_implementation == "sdpa"
    assert one.model.config.pad_token_id == PAD
    assert len({planted.make(kind, seed, family).head for seed in range(6)}) > 2
