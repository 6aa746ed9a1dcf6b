"""Attention on one long prompt, from all heads down to tokens, kept as reductions: what `plots.explorer` shows."""

import json
import math
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.results import files as storage
from interp.errors import CostError, HeadError, PromptError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import CaptureCost, capture, run
from interp.hooks.read.keep import RankedKeys, at, blocks, entropy, mass, top_keys

FORMAT = "interp.explored/1"
MOST_BLOCKS, CHOSEN, END, NEAR = 96, 12, 512, 16
STEPS = 255
"""codes of a weight beside 0: its square root in steps of 1 / 255"""
SUMMARIES = {
    "first": ("attention on the first token", "share of attention"),
    "previous": ("attention on the token before", "share of attention"),
    "near": ("attention on the two nearest blocks", "share of attention"),
    "distance": ("mean distance of the keys", "tokens"),
    "entropy": ("entropy of the attention", "nats"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Explored:
    """What `explore` read of one prompt: summaries of all heads, block maps, and the top keys of chosen heads."""

    title: str
    tokens: tuple[str, ...]
    """text of each token, as it came"""
    layout: HeadLayout
    summaries: dict[str, Float[Tensor, "l h"]]
    """by the names of SUMMARIES, each a mean over queries"""
    block: int
    """tokens in a block; the last block may have fewer"""
    mapped: HeadSet
    maps: Float[Tensor, "i n n"]
    """of each mapped head: mean over the queries of a block of their attention on a block of keys"""
    heads: HeadSet
    keys: Int[Tensor, "j q k"]
    """of each of `heads`: the most attended keys of each query, strongest first; -1 where fewer are seen"""
    probs: Float[Tensor, "j q k"]
    marks: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """named ranges of tokens"""
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None

    def map(self, head: Any) -> Float[Tensor, "n n"]:
        """Attention of each block of queries on each block of keys. Raises HeadError for a head without a map."""
        return self.maps[_place(head, self.mapped, "block map")]

    def top(self, head: Any, query: int) -> list[tuple[int, float]]:
        """The top keys of one query, (position, weight), strongest first. Raises HeadError for a head without them."""
        row = _place(head, self.heads, "top keys")
        pairs = zip(self.keys[row, query].tolist(), self.probs[row, query].tolist(), strict=True)
        return [(key, weight) for key, weight in pairs if key >= 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can say, small enough for a page.

        A weight w of a map or a top key is one byte, round(255 sqrt(w)): it comes back within 0.004, small ones within
        4e-6 + sqrt(w) / 255, and none above 4e-6 as 0. Summaries are float32 and positions exact. Maps are stored
        without the keys after the query. Arrays are base64 of zlib, bytes of equal rank together.
        """
        n = self.maps.shape[-1]
        below = self.maps[:, *torch.tril_indices(n, n)]
        back = torch.where(self.keys < 0, 0, torch.arange(len(self.tokens))[:, None] - self.keys + 1)
        return {
            "format": FORMAT,
            "title": self.title,
            "tokens": list(self.tokens),
            "layers": self.layout.layers,
            "heads": self.layout.heads,
            "kv_heads": self.layout.kv_heads,
            "head_dim": self.layout.head_dim,
            "block": self.block,
            "k": self.keys.shape[-1],
            "mapped": [str(head) for head in self.mapped],
            "chosen": [str(head) for head in self.heads],
            "marks": {name: [list(ends) for ends in ranges] for name, ranges in self.marks.items()},
            "summaries": {name: _pack(table, "<f4") for name, table in self.summaries.items()},
            "maps": _pack(_coded(below), "u1"),
            "back": _pack(back.movedim(-1, 1), _width(len(self.tokens))),
            "probs": _pack(_coded(self.probs).movedim(-1, 1), "u1"),
            "settings": storage.plain(self.settings, "settings"),
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Explored":
        """The inverse of to_dict, but for the rounding of weights. Raises ScoreError for data that are broken."""
        if not isinstance(stored, Mapping) or stored.get("format") != FORMAT:
            raise ScoreError(f"these data are not of the format {FORMAT!r}; give what Explored.to_dict made.")
        try:
            return _read(stored)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScoreError(f"the explored prompt is broken ({error}); make it again.") from error

    def save(self, path: str | Path) -> Path:
        """Write to_dict as JSON, whole or not at all; returns the path. Raises ScoreError."""
        path = Path(path)
        path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
        storage.write_atomic(path, json.dumps(self.to_dict(), allow_nan=False).encode())
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "Explored":
        """Read what save wrote; with `model`, a result of another model raises ScoreError."""
        path = Path(path)
        path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
        try:
            stored = json.loads(storage.read_text(path))
        except (ValueError, RecursionError) as error:
            raise ScoreError(f"{path} is not JSON ({error}); the file is broken, make it again.") from error
        found = cls.from_dict(stored)
        if model is not None:
            if found.provenance is None:
                raise ScoreError(f"{path} does not say which model it belongs to; load it without a model to check.")
            found.provenance.check_model(model)
        return found

    def __repr__(self) -> str:
        named = f"{self.title!r}, " if self.title else ""
        return (
            f"Explored({named}{len(self.tokens):,} tokens in blocks of {self.block}, {len(self.mapped)} of "
            f"{self.layout.size} heads mapped, top {self.keys.shape[-1]} keys of {len(self.heads)})"
        )


def explore(
    model: nn.Module,
    prompts: Prompts,
    *,
    heads: Any = None,
    maps: Any = "all",
    block: int | None = None,
    k: int = 4,
    title: str = "",
    marks: Sequence[str] = (),
    seed: int = 0,
) -> Explored:
    """Where every head looks in one prompt: a few numbers a head, block maps, and top keys of chosen heads.

    maps[i n m] = mean over q in block n of sum over k in block m of pattern[q k]. summaries[l h], means over queries:
    "first" pattern[q 0] and "previous" pattern[q q-1] for q >= 1; "entropy" of the row in nats; from the maps "near",
    the share on the own block and the one before, and "distance", sum over m of maps[n m] (n - m) block / sum of
    maps[n m], in tokens, right to within a block. One forward pass; what is kept grows with the length: see `cost`.

    prompts: one prompt; `title` is its heading. Its spans become marks: those that `marks` names, or all that cover at
      most half of the tokens.
    heads: whose top k keys of each query are kept (HeadSet.parse takes it; HeadScores.top(12) fits). None reads those
      of all heads, which takes more time and memory, and keeps 12 heads: those whose last 512 queries look hardest at
      one key far back, by the mean of the squared weight of a top key that is not the first token and lies at least 16
      tokens back.
    maps: the heads with a block map, all by default. block: tokens in one; by default the smallest of 1, 2, 3, 4, 6, 8,
      12 ... that makes at most 96 blocks. seed: for the provenance; nothing is drawn.
    Raises PromptError for several prompts or fewer than 2 tokens, HeadError, SpanError, UsageError, and CostError
    before anything is computed.
    Source: ours. Cannot show: that a head matters (see `ablation_test`), nor what it writes.
    """
    prompt, layout, size = _plan(model, prompts, block)
    if unknown := [name for name in marks if name not in prompt.spans]:
        known = ", ".join(prompt.spans) or "none"
        raise SpanError(f"marks={list(marks)!r}: the prompt has no span {unknown[0]!r} (it has {known}).")
    mapped = HeadSet.parse(maps, layout)
    chosen = None if heads is None else HeadSet.parse(heads, layout)
    needed = cost(model, prompts, heads=chosen, block=size, k=k)
    if not needed.fits:
        told = str(needed).splitlines()[-1].split(maxsplit=2)[-1]
        raise CostError(
            f"exploring {len(prompt):,} tokens takes {told}: name the heads whose top keys are kept, or fewer."
        )
    first, before, tiles, best = mass(0), at(-1), blocks(size), top_keys(k)
    with ExitStack() as stack:
        wanted = [first, before, entropy(), tiles, *([best] if chosen is None else [])]
        every = stack.enter_context(capture(model, wanted, prompts))
        # the second capture computes no more than its own heads
        some = stack.enter_context(capture(model, best, prompts, heads=chosen)) if chosen else None
        run(model, prompts, logits_to_keep=1)
    if chosen is None:
        every_top = RankedKeys(*(part[0] for part in every[best]))
        chosen = _looking_back(every_top)
        top = RankedKeys(*(part[_index(chosen)] for part in every_top))
    elif some is not None:
        top = RankedKeys(*(part[0] for part in some[best]))
    else:
        top = RankedKeys(torch.zeros(0, len(prompt), k, dtype=torch.int64), torch.zeros(0, len(prompt), k))
    whole = every[tiles][0]
    summaries = {
        "first": every[first][0, :, :, 1:, 0].mean(-1),
        "previous": every[before][0, :, :, 1:, 0].mean(-1),
        **_from_maps(whole, len(prompt), size),
        "entropy": every[entropy()][0].mean(-1),
    }
    tokenizer = prompts.tokenizer
    return Explored(
        title=title,
        tokens=tuple(tokenizer.decode([token]) if tokenizer is not None else str(token) for token in prompt.ids),
        layout=layout,
        summaries={name: table.float() for name, table in summaries.items()},
        block=size,
        mapped=mapped,
        maps=whole[_index(mapped)].float(),
        heads=chosen,
        keys=top.keys,
        probs=top.probs.float(),
        marks={name: ranges for name, ranges in prompt.spans.items() if name in (marks or _marked(prompt))},
        settings={"block": size, "k": k, "heads": "looking back" if heads is None else "given"},
        provenance=Provenance.of(model, tokenizer, seed=seed),
    )


def cost(model: nn.Module, prompts: Prompts, *, heads: Any = None, block: int | None = None, k: int = 4) -> CaptureCost:
    """Host memory that `explore` would take with these settings, in bytes by what is kept; nothing is run.

    Twice what is kept, since joining layers copies. Raises as `explore`.
    """
    prompt, layout, size = _plan(model, prompts, block)
    every = capture(model, [mass(0), at(-1), entropy(), blocks(size)], prompts).cost(1, len(prompt))
    best = top_keys(k)
    count = layout.size if heads is None else len(HeadSet.parse(heads, layout))
    part = (f"{best!r} of {count} heads", 8 * count * best.width(len(prompt), len(prompt)))
    return CaptureCost((*every.parts, part), every.free)


def _plan(model: nn.Module, prompts: Prompts, block: int | None) -> tuple[Prompt, HeadLayout, int]:
    """The prompt, the layout of the model, and the tokens of a block."""
    if len(prompts) != 1:
        raise PromptError(f"{len(prompts)} prompts to explore: give one, such as prompts[:1].")
    prompt = prompts[0]
    if len(prompt) < 2:
        raise PromptError("a prompt of one token has nothing to explore: give at least two tokens.")
    if block is not None and (type(block) is not int or block < 1):
        raise UsageError(f"block={block!r} is no size: give the tokens of a block, a whole number of at least 1.")
    return prompt, HeadLayout.of(model), _usual_block(len(prompt)) if block is None else block


def _usual_block(tokens: int) -> int:
    """The smallest power of two, or three times one, that makes no more blocks than a map can show."""
    least = tokens / MOST_BLOCKS
    power = 1 << max(0, math.ceil(math.log2(least)))
    return power * 3 // 4 if power >= 4 and power * 3 / 4 >= least else power


def _marked(prompt: Prompt) -> list[str]:
    """The spans that say where: not those that cover most of the prompt."""
    sizes = {name: sum(b - a for a, b in ranges) for name, ranges in prompt.spans.items()}
    return [name for name, size in sizes.items() if 2 * size <= len(prompt)]


def _looking_back(top: RankedKeys) -> HeadSet:
    """The heads whose queries at the end look hardest at one key far back, by their top keys [l h q k]."""
    keys, probs = (part[..., -END:, 0] for part in top)
    n = top.keys.shape[2]
    back = torch.arange(n)[-END:] - keys
    score = torch.where((keys > 0) & (back >= NEAR), probs, 0.0).square().mean(-1)
    order = score.flatten().sort(descending=True, stable=True).indices[:CHOSEN].tolist()
    return HeadSet(tuple(Head(*divmod(i, score.shape[1])) for i in order))


def _index(heads: HeadSet) -> tuple[Tensor, Tensor]:
    """To pick heads from a table [l h ...]."""
    layer, head = torch.tensor([*heads], dtype=torch.int64).view(-1, 2).T
    return layer, head


def _from_maps(maps: Float[Tensor, "l h n n"], length: int, size: int) -> dict[str, Float[Tensor, "l h"]]:
    """What the block maps say of a head's reach; each query weighs the same."""
    n = maps.shape[-1]
    queries = torch.full((n,), float(size))
    queries[-1] = length - size * (n - 1)
    share = maps * queries[:, None] / length
    apart = torch.arange(n)[:, None] - torch.arange(n)
    return {
        "near": share[..., (apart == 0) | (apart == 1)].sum(-1),
        "distance": (share * apart * size).sum((-1, -2)) / share.sum((-1, -2)).clamp(min=1e-12),
    }


def _place(head: Any, heads: HeadSet, what: str) -> int:
    found = Head.parse(head)
    if found not in heads:
        raise HeadError(f"{found} has no {what} here: explore it with the others, or take one of {heads!r}.")
    return heads.heads.index(found)


def _width(tokens: int) -> str:
    return "<u2" if tokens < 1 << 16 else "<u4"


def _coded(weights: Tensor) -> Tensor:
    return (weights.clamp(0, 1).sqrt() * STEPS).round()


def _pack(values: Tensor, kind: str) -> str:
    """Bytes of equal rank together, which zlib makes smaller."""
    flat = np.ascontiguousarray(values.numpy().astype(kind)).reshape(-1)
    planes = flat.view(np.uint8).reshape(-1, flat.itemsize).T
    return b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _unpack(packed: str, kind: str, *shape: int) -> Tensor:
    """The inverse of _pack; never more bytes than the shape has, whatever the data say."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    unzip = zlib.decompressobj()
    try:
        planes = unzip.decompress(b64decode(packed, validate=True), size + 1)
    except zlib.error as error:
        raise ValueError(f"its arrays: {error}") from error
    if len(planes) != size or not unzip.eof:
        raise ValueError(f"an array does not have the {size} bytes of its shape {list(shape)}")
    flat = np.frombuffer(planes, np.uint8).reshape(np.dtype(kind).itemsize, -1).T
    values = np.ascontiguousarray(flat).reshape(-1).view(kind).reshape(shape)
    return torch.from_numpy(values.astype({"<f4": np.float32}.get(kind, np.int64)))


def _read(stored: Mapping[str, Any]) -> Explored:
    tokens = tuple(stored["tokens"])
    if len(tokens) < 2 or not all(isinstance(token, str) for token in tokens):
        raise ValueError("its tokens are not texts")
    names = ("layers", "heads", "kv_heads", "head_dim", "block", "k")
    *sizes, block, k = (stored[name] for name in names)
    if any(type(stored[name]) is not int or stored[name] < (name != "head_dim") for name in names):
        raise ValueError(f"{', '.join(names)} are {[stored[name] for name in names]}")
    layout = HeadLayout(*sizes)
    mapped, heads = (HeadSet.parse(stored[name], layout) for name in ("mapped", "chosen"))
    marks = {str(name): tuple((int(a), int(b)) for a, b in ranges) for name, ranges in stored["marks"].items()}
    if any(not 0 <= a < b <= len(tokens) for ranges in marks.values() for a, b in ranges):
        raise ValueError(f"a mark lies outside of its {len(tokens)} tokens")
    n = -(-len(tokens) // block)
    below = _unpack(stored["maps"], "u1", len(mapped), n * (n + 1) // 2)
    maps = torch.zeros(len(mapped), n, n)
    maps[:, *torch.tril_indices(n, n)] = (below / STEPS).square()
    shape = len(heads), k, len(tokens)
    back = _unpack(stored["back"], _width(len(tokens)), *shape).movedim(1, -1)
    keys = torch.where(back > 0, torch.arange(len(tokens))[:, None] - back + 1, -1)
    if bool((keys < -1).any()):
        raise ValueError("a top key lies before the first token")
    probs = (_unpack(stored["probs"], "u1", *shape) / STEPS).square().movedim(1, -1)
    summaries = {name: _unpack(stored["summaries"][name], "<f4", *sizes[:2]) for name in SUMMARIES}
    provenance = None if stored["provenance"] is None else Provenance.from_dict(stored["provenance"])
    return Explored(
        str(stored["title"]), tokens, layout, summaries, block, mapped, maps, heads, keys, probs.contiguous(), marks,
        dict(stored["settings"]), provenance,
    )  # fmt: skip
