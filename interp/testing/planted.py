"""Planted models: tiny causal language models in which a known head does a known job and all other heads are noise.

The residual stream holds orthogonal parts: `tok` (what the token is), `prev` (what the token before it is), `pos` (its
place; GPT-2 only) and `const` (the same everywhere). A planted head's keys carry an address read from one part, its
queries the address that they look for, and its values the token, written to the logits where the head is to copy.
Llama keeps content in the slow pairs of the rotary embedding and position in the fast ones.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from interp.testing._planted_tasks import (  # noqa: F401
    ANSWER,
    BOS,
    DOCUMENTS,
    END,
    EOS,
    FIRST_WORD,
    HARM,
    NO,
    OPTIONS,
    PAD,
    VOCAB,
    documents,
    doubles,
    draw_number,
    draw_words,
    needle,
    options,
    random_words,
    repeated,
)

KINDS = ("induction", "previous_token", "duplicate_token", "sink", "retrieval", "echo", "documents", "options")
DATA_CONTROLS = ("induction", "duplicate_token", "retrieval", "echo", "documents", "options")
FAMILIES = ("gpt2", "llama")

LAYERS, HEADS, HEAD_DIM, CONTEXT, CODE = 3, 4, 64, 128, 32
HIDDEN = {"gpt2": HEADS * HEAD_DIM, "llama": 192}
KV_HEADS = {"gpt2": HEADS, "llama": 2}
THETA = 1e6
# the pairs (i, i + 32) of a head: fast ones for position, slow ones for content
FAST = torch.cat([torch.arange(0, 16), torch.arange(32, 48)])
SLOW = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])
COPIES = {"induction": 2.0, "retrieval": 4.0, "documents": 4.0, "options": 4.0}


@dataclass(frozen=True)
class Planted:
    """A model, the (layer, head) that does the job, and the previous-token head it leans on, if any."""

    model: Any
    head: tuple[int, int]
    kind: str
    family: str
    seed: int
    helper: tuple[int, int] | None = None


@dataclass(frozen=True)
class Task:
    """Prompts for one kind: `Prompts.from_ids(task.ids, spans=task.spans, meta=task.meta, pad_id=PAD)`."""

    ids: list[list[int]]
    spans: list[dict[str, tuple[tuple[int, int], ...]]]
    meta: list[dict[str, Any]]


@dataclass(frozen=True)
class Space:
    """The parts of the residual stream, as orthonormal columns [m n]; codes [token 32]; speeds of the positions."""

    tok: Tensor
    prev: Tensor
    const: Tensor
    pos: Tensor
    codes: Tensor
    speeds: Tensor
    family: str


@dataclass(frozen=True)
class Weights:
    """Head weights of one layer: q [h m d], k and v [g m d], o [h d m]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@torch.no_grad()
def make(kind: str, seed: int, family: str = "gpt2", shuffled: bool = False) -> Planted:
    """Model with one planted head, whose place depends on the seed; float32, eval mode, default attention.

    `shuffled` is the control in the weights: the same model, the entries of the planted head's query matrix permuted.
    induction, retrieval: attends to the token after the previous occurrence, else to BOS, and copies it to the logits
    (retrieval twice as strongly); a previous-token head in an earlier layer is its `helper`.
    previous_token: attends to q - 1. duplicate_token: to earlier occurrences of the same token, else to itself.
    sink: to position 0 (gpt2, whatever token is there) or to the BOS token (llama).
    echo: as duplicate_token; documents, options: as retrieval.
    Left padding: llama as it is; gpt2 needs `position_ids` in a plain forward, which numbers the pads too without them.
    """
    rng = torch.Generator().manual_seed(1000 * seed + 10 * KINDS.index(kind) + FAMILIES.index(family))
    space = _space(family, rng)
    layers = [_noise(family, rng) for _ in range(LAYERS)]
    copies = kind in COPIES
    head = (draw_number(rng, 1 if copies else 0, LAYERS), draw_number(rng, 0, HEADS))
    helper = (draw_number(rng, 0, head[0]), draw_number(rng, 0, HEADS)) if copies else None
    if helper:
        _plant(layers, helper, *_previous(space), family)
        _write(layers, helper, space, space.prev, 1.5, family)
        _write(layers, head, space, space.tok, COPIES[kind], family)
    match = {"previous_token": _previous, "duplicate_token": _duplicate, "echo": _duplicate, "sink": _sink}.get(
        kind, _induction
    )
    _plant(layers, head, *match(space), family)
    if shuffled:
        query = layers[head[0]].q[head[1]]
        # a generator of its own: the rest of the model stays as it is
        order = torch.randperm(query.numel(), generator=torch.Generator().manual_seed(seed))
        query.copy_(query.flatten()[order].view_as(query))
    model = {"gpt2": _gpt2, "llama": _llama}[family](space, layers, rng)
    return Planted(model, head, kind, family, seed, helper)


@torch.no_grad()
def refusing(seed: int, family: str = "gpt2", shuffled: bool = False) -> Planted:
    """Model with one planted head that looks for the token HARM, wherever it stands, and then writes NO to the logits.

    Without HARM in the prompt it rests on BOS and writes next to nothing. Its place depends on the seed. `shuffled` is
    the control: the entries of what it writes permuted.
    """
    rng = torch.Generator().manual_seed(1000 * seed + 500 + FAMILIES.index(family))
    space = _space(family, rng)
    layers = [_noise(family, rng) for _ in range(LAYERS)]
    head = (draw_number(rng, 0, LAYERS), draw_number(rng, 0, HEADS))
    address = 40 * space.codes[HARM] + 20 * space.codes[BOS]
    query = _place(torch.outer(space.const, address), SLOW)
    _plant(layers, head, query, _place(space.tok, SLOW), family)
    weights, group = layers[head[0]], head[1] * KV_HEADS[family] // HEADS
    first = torch.zeros(CODE)
    first[0] = 1.0
    read = math.sqrt(3 / HIDDEN[family])
    harmful = torch.outer(space.tok @ space.codes[HARM], first)
    weights.v[group] = read * math.sqrt(HEAD_DIM) * _place(harmful, SLOW)
    no = torch.outer(space.tok @ space.codes[NO], first)
    weights.o[head[1]] = 4.0 / math.sqrt(HEAD_DIM) * _place(no, SLOW).T
    if shuffled:
        output = weights.o[head[1]]
        order = torch.randperm(output.numel(), generator=torch.Generator().manual_seed(seed))
        output.copy_(output.flatten()[order].view_as(output))
    return Planted({"gpt2": _gpt2, "llama": _llama}[family](space, layers, rng), head, "refusal", family, seed)


def requests(seed: int, harmful: bool = True, batch: int = 8) -> list[list[int]]:
    """Prompts of random words, all of one length, with HARM somewhere in them, or without."""
    rng = torch.Generator().manual_seed(31 * seed + harmful)
    rows, length = [], draw_number(rng, 14, 24)
    for _ in range(batch):
        words = draw_words(rng, length, skip=(HARM, NO))
        if harmful:
            words[draw_number(rng, 0, len(words) - 1)] = HARM
        rows.append([BOS, *words])
    return rows


def prompts(kind: str, seed: int, shuffled: bool = False, batch: int = 4) -> Task:
    """Prompts of several lengths that ask for the job of `kind`, each beginning with BOS.

    `shuffled` is the control in the data: fresh tokens in the second half (induction; duplicate_token, where no token
    has an earlier occurrence then, so that no row counts), or a key that is not in the haystack (retrieval, documents,
    options).
    The other kinds have none and raise ValueError: every prompt has previous tokens and a first one.
    spans: "first", "second" (induction, echo); "context", "needle", "answer", "question" (retrieval); "documents",
    "gold", "query" (documents, the query is the last token); "options" (a word and END each; the last token is one of
    the words).
    meta: {"n": int} (induction, echo); {"answer_ids": list of ids} (retrieval), the greedy reply, after which EOS
    follows; {"option": int} (options), the one that the last token names.
    """
    if shuffled and kind not in DATA_CONTROLS:
        raise ValueError(f"No control in the data for {kind!r}; use make({kind!r}, seed, shuffled=True).")
    rng = torch.Generator().manual_seed(7919 * seed + KINDS.index(kind))
    build = {
        "induction": repeated,
        "retrieval": needle,
        "duplicate_token": doubles,
        "echo": repeated,
        "documents": documents,
        "options": options,
    }.get(kind, random_words)
    rows = [build(rng, shuffled) for _ in range(batch)]
    return Task([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def _space(family: str, rng: torch.Generator) -> Space:
    hidden = HIDDEN[family]
    # the first column is the all-ones direction, which LayerNorm removes: nothing is stored there
    start = torch.cat([torch.ones(hidden, 1), torch.randn(hidden, hidden - 1, generator=rng)], dim=1)
    basis = torch.linalg.qr(start).Q[:, 1:]
    hadamard = torch.ones(1, 1)
    while len(hadamard) < CODE:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    # 64 codes in 32 dimensions: no two of them have a cosine above 1/sqrt(32)
    codes = torch.cat([torch.eye(CODE), hadamard / math.sqrt(CODE)])[torch.randperm(VOCAB, generator=rng)]
    rotary = THETA ** (-torch.arange(16) / (HEAD_DIM // 2))
    speeds = rotary if family == "llama" else math.pi * torch.rand(16, generator=rng)
    tok, prev, const, pos, _ = basis.split([32, 32, 1, 32, hidden - 1 - 97], dim=1)
    return Space(tok, prev, const[:, 0], pos, codes, speeds, family)


def _place(part: Tensor, dims: Tensor) -> Tensor:
    matrix = torch.zeros(len(part), HEAD_DIM)
    matrix[:, dims] = part
    return matrix


def _position(space: Space, shift: int) -> tuple[Tensor, Tensor]:
    """Query and key matrices [m d] whose product peaks at k = q + shift."""
    turn = shift * space.speeds
    if space.family == "llama":
        # rotary embedding turns both by their position; the query starts `shift` ahead
        size = (space.speeds**1.3 / (space.speeds**1.3).sum()).sqrt()
        ahead = torch.cat([turn.cos(), turn.sin()]) * size.repeat(2)
        here = torch.cat([size, torch.zeros(16)])
        return _place(torch.outer(space.const, ahead), FAST), _place(torch.outer(space.const, here), FAST)
    cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
    rotation = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
    return _place(space.pos @ rotation, FAST), _place(space.pos, FAST)


def _where(space: Space, count: int) -> Tensor:
    """Codes [p 32] of the positions below `count` (gpt2)."""
    angle = torch.outer(torch.arange(count).float(), space.speeds)
    return torch.cat([angle.cos(), angle.sin()], dim=1) / 4


def _previous(space: Space) -> tuple[Tensor, Tensor]:
    query, key = _position(space, -1)
    return 80 * query, key


def _duplicate(space: Space) -> tuple[Tensor, Tensor]:
    query, key = _position(space, 0)
    # equal tokens attract, equal positions repel, so that an earlier occurrence wins over the token itself
    return _place(40 * space.tok, SLOW) - 14 * query, _place(space.tok, SLOW) + key


def _sink(space: Space) -> tuple[Tensor, Tensor]:
    if space.family == "llama":
        return _place(torch.outer(space.const, 30 * space.codes[BOS]), SLOW), _place(space.tok, SLOW)
    return _place(torch.outer(space.const, 30 * _where(space, 1)[0]), FAST), _place(space.pos, FAST)


def _induction(space: Space) -> tuple[Tensor, Tensor]:
    # one dimension left for the fallback: BOS is always the better part of a match
    spare = torch.zeros(HEAD_DIM)
    spare[FAST[15]] = 1.0
    query = _place(40 * space.tok, SLOW) + torch.outer(space.const, 34 * spare)
    return query, _place(space.prev, SLOW) + torch.outer(space.tok @ space.codes[BOS], spare)


def _noise(family: str, rng: torch.Generator) -> Weights:
    hidden, groups = HIDDEN[family], KV_HEADS[family]
    q, o = (torch.randn(HEADS, hidden, HEAD_DIM, generator=rng) / math.sqrt(hidden) for _ in range(2))
    k, v = (torch.randn(groups, hidden, HEAD_DIM, generator=rng) / math.sqrt(hidden) for _ in range(2))
    # logits of unit spread; a head writes vectors of length 0.2 at most, compared with parts of length 1
    return Weights(q, k, v, 0.2 / math.sqrt(HEAD_DIM) * o.transpose(1, 2))


def _plant(
    layers: list[Weights], head: tuple[int, int], query: Tensor, key: Tensor, family: str, noise: float = 0.1
) -> None:
    """Query and key in place of noise: a logit is the product of the query's and the key's lengths, `query` in nats."""
    weights, index = layers[head[0]], head[1]
    # three parts of length 1, normed to sqrt(m): each has length sqrt(m / 3) in what the head reads
    read = math.sqrt(3 / HIDDEN[family])
    group = index * KV_HEADS[family] // HEADS
    weights.q[index] = noise * weights.q[index] + read * query
    weights.k[group] = noise * weights.k[group] + read * math.sqrt(HEAD_DIM) * key


def _write(layers: list[Weights], head: tuple[int, int], space: Space, part: Tensor, size: float, family: str) -> None:
    """Value = the attended token; output = its code in `part`, of length `size`."""
    weights, index = layers[head[0]], head[1]
    read = math.sqrt(3 / HIDDEN[family])
    weights.v[index * KV_HEADS[family] // HEADS] = read * math.sqrt(HEAD_DIM) * _place(space.tok, SLOW)
    weights.o[index] = size / math.sqrt(HEAD_DIM) * _place(part, SLOW).T


@cache
def _blank(family: str) -> Any:
    """A model to copy: building one takes longer than filling it."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN[family],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
    }
    # the first values, all replaced, are drawn without touching the caller's random state
    with torch.random.fork_rng(devices=[]):
        if family == "gpt2":
            config = GPT2Config(**common, n_inner=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
            return GPT2LMHeadModel(config).eval()
        rotary = {"rope_type": "default", "rope_theta": THETA}
        common |= {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS[family], "intermediate_size": 64}
        return LlamaForCausalLM(LlamaConfig(**common, rope_parameters=rotary)).eval()


def _embedding(space: Space) -> Tensor:
    return space.codes @ space.tok.T + space.const


def _fill(weight: Tensor, rng: torch.Generator, size: float = 1.0) -> None:
    weight.copy_(torch.randn(weight.shape, generator=rng) * size / math.sqrt(weight.shape[-1]))


def _gpt2(space: Space, layers: list[Weights], rng: torch.Generator) -> Any:
    model = deepcopy(_blank("gpt2"))
    model.transformer.wte.weight.copy_(_embedding(space))
    model.transformer.wpe.weight.copy_(_where(space, CONTEXT) @ space.pos.T)
    for block, weights in zip(model.transformer.h, layers, strict=True):
        parts = [part.transpose(0, 1).flatten(1) for part in (weights.q, weights.k, weights.v)]
        block.attn.c_attn.weight.copy_(torch.cat(parts, dim=1))
        block.attn.c_proj.weight.copy_(weights.o.flatten(0, 1))
        _fill(block.mlp.c_fc.weight, rng, 0.5)
        _fill(block.mlp.c_proj.weight, rng, 0.02)
    return model


def _llama(space: Space, layers: list[Weights], rng: torch.Generator) -> Any:
    model = deepcopy(_blank("llama"))
    model.model.embed_tokens.weight.copy_(_embedding(space))
    for block, weights in zip(model.model.layers, layers, strict=True):
        attention = block.self_attn
        attention.q_proj.weight.copy_(weights.q.transpose(1, 2).flatten(0, 1))
        attention.k_proj.weight.copy_(weights.k.transpose(1, 2).flatten(0, 1))
        attention.v_proj.weight.copy_(weights.v.transpose(1, 2).flatten(0, 1))
        attention.o_proj.weight.copy_(weights.o.flatten(0, 1).T)
        _fill(block.mlp.gate_proj.weight, rng)
        _fill(block.mlp.up_proj.weight, rng)
        _fill(block.mlp.down_proj.weight, rng, 0.03)
    return model
