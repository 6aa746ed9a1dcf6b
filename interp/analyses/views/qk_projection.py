"""Queries and keys of a head in one plane, over many prompts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.views.logit_lens import labels_of, short, token_text
from interp.errors import HeadError, PromptError, ScoreError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import k, q

Method = Literal["pca", "tsne"]
Pair = tuple[float, float]
FEWEST = 3
"""tokens that make a plane, and keys that have an order"""


@dataclass(frozen=True, repr=False)
class Cloud:
    """The queries and keys of one head in the plane; entry i of both is token i of the `Joint`."""

    head: str
    queries: tuple[Pair, ...]
    keys: tuple[Pair, ...]
    explained: Pair | None
    """share of the variance along each axis; None for t-SNE"""
    faithful: float | None
    """Spearman correlation of nearness in the plane with q.k, mean over queries: how far the picture can be trusted;
    None where no query has three keys that differ"""
    possible: float | None
    """the same with distances in all dimensions, before anything was flattened"""
    nearest: float | None
    """share of queries whose nearest key in the plane is the one with the largest q.k"""
    chance: float | None
    """of that, with one of the query's keys taken at random"""
    scale: float
    """what queries were multiplied and keys divided by"""


@dataclass(frozen=True, repr=False)
class QKProjection:
    """Heads whose queries and keys share a plane, on the same tokens of some prompts: see `joint`."""

    method: str
    clouds: tuple[Cloud, ...]
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    prompts: tuple[int, ...]
    """number of the prompt of each token"""
    labels: tuple[str, ...]
    """one per prompt"""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    provenance: Provenance | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(cloud.head for cloud in self.clouds)

    def __getitem__(self, head: Any) -> Cloud:
        """The cloud of one head. Raises HeadError."""
        name = str(Head.parse(head))
        if name not in self.heads:
            raise HeadError(f"{name} is not in this view, which has {', '.join(self.heads)}: name one of these.")
        return self.clouds[self.heads.index(name)]

    def to_frame(self, head: Any = None) -> Any:
        """A pandas DataFrame of one head, by default the first, two rows a token: x, y, kind, token, position, ..."""
        import pandas as pd

        cloud = self.clouds[0] if head is None else self[head]
        about = {"token": self.tokens, "position": self.positions, "prompt": self.prompts}
        about["label"] = tuple(self.labels[number] for number in self.prompts)
        return pd.concat(
            [
                pd.DataFrame(
                    {"x": [x for x, _ in dots], "y": [y for _, y in dots], "kind": kind, **about, "head": cloud.head}
                )
                for kind, dots in (("query", cloud.queries), ("key", cloud.keys))
            ],
            ignore_index=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it, see from_dict."""
        made = None if self.provenance is None else self.provenance.to_dict()
        names = ("method", "tokens", "positions", "prompts", "labels", "seed", "settings")
        clouds = [dict(vars(cloud)) for cloud in self.clouds]
        return {name: getattr(self, name) for name in names} | {"clouds": clouds, "provenance": made}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "QKProjection":
        """The inverse of to_dict, through JSON too. Raises ScoreError."""
        try:
            made = content.get("provenance")
            view = cls(
                str(content["method"]),
                tuple(map(_cloud, content["clouds"])),
                tuple(map(str, content["tokens"])),
                tuple(map(int, content["positions"])),
                tuple(map(int, content["prompts"])),
                tuple(map(str, content["labels"])),
                int(content["seed"]),
                dict(content["settings"]),
                None if made is None else Provenance.from_dict(made),
            )
            counts = {len(part) for cloud in view.clouds for part in (cloud.queries, cloud.keys)}
            counts |= {len(view.tokens), len(view.positions), len(view.prompts)}
            if len(counts) != 1 or not view.clouds or not all(0 <= n < len(view.labels) for n in view.prompts):
                raise ValueError("its tokens, coordinates and prompts do not fit together")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScoreError(f"this joint view is broken ({error}): make it again.") from error
        return view

    def __repr__(self) -> str:
        return f"Joint({self.method}, {', '.join(self.heads)}; {len(self.tokens)} tokens of {len(self.labels)} prompts)"


def qk_projection(
    model: nn.Module,
    prompts: Prompts,
    heads: Any,
    *,
    method: Method = "pca",
    points: int = 2000,
    drop_first: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> QKProjection:
    """Queries and keys of a head as points of one plane, over many prompts: a query lies near the keys it looks for.

    q[b h q d] and k[b h k d] are those that attention multiplies, after norm and RoPE, a query head with the keys of
    its group. Before they are put together (see `together`) q is multiplied and k divided by c, which leaves q.k as it
    is and gives both clouds the same spread, and keys are moved by t to the centre of the queries: q.(k + t) adds the
    same to every key of a row, so that the softmax does not change (with a learned sink, or a soft-cap, only the order
    of a row's keys is kept). The plane: two components of PCA, or t-SNE (perplexity 30, begun from PCA); scikit-learn.
    heads: anything HeadSet.parse takes, in its order. points: dots of a head at most, two a token, its query and its
    key; tokens are drawn evenly over prompts.
    drop_first: leave the first token of each prompt out, where attention sinks rest. Kept, it has no say in centre,
    scale and PCA's axes, which it might turn toward itself. In units of the scaled queries; t-SNE's have no meaning.
    `Cloud.faithful` says how well nearness in the plane ranks q.k over the keys that a query may look at (those of its
    prompt that were drawn; a sliding window is not regarded): Spearman, mean over queries. `Cloud.nearest`: how often
    the nearest of them is the one with the largest q.k, which t-SNE keeps better than the order of the rest.
    Raises HeadError, UsageError (method, points), PromptError (fewer than three tokens).
    Source: Yeh et al. 2305.03210 (AttentionViz). Differs: c is the one that makes the spreads equal; PCA by default,
    whose distances can be read; the picture says how faithful it is.
    Cannot show: attention itself, which compares keys within a row and lets long keys win from afar; two dimensions of
    `d` hide most of what a head can tell apart, so read `faithful` before the picture. RoPE turns q and k by their
    positions: clusters may be places rather than meanings.
    """
    if method not in get_args(Method):
        raise UsageError(f"method={method!r}: take 'pca' or 'tsne'.")
    if points < 2 * FEWEST:
        raise UsageError(f"points={points}: a plane takes at least {2 * FEWEST}.")
    layout = HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    if not len(chosen):
        raise HeadError('no heads given: name at least one, as in "L5H3".')
    drawn = _draw(prompts.lengths, points // 2, int(drop_first), seed)
    where = [(number, position) for number, kept in enumerate(drawn) for position in kept]
    if len(where) < FEWEST:
        raise PromptError(f"{len(where)} tokens make no plane: give prompts of {FEWEST} tokens or more.")
    parts: list[tuple[Tensor, Tensor]] = []
    title = "queries and keys" if progress else None
    for batch, cap in read(model, prompts, [q(), k()], batch_size=batch_size, progress=title, heads=chosen):
        ours, theirs = cap[q()].float(), cap[k()].float()
        for row in range(len(batch)):
            kept = drawn[len(parts)]
            parts.append((ours[row][:, kept], theirs[row][:, kept]))
    queries, keys = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
    number, position = torch.tensor(where).unbind(1)
    clouds = tuple(
        flatten(str(head), queries[i], keys[i], number, position, method, seed) for i, head in enumerate(chosen)
    )
    name = cache(partial(token_text, prompts.tokenizer))
    return QKProjection(
        method,
        clouds,
        tuple(name(prompts[n].ids[p]) for n, p in where),
        tuple(p for _, p in where),
        tuple(n for n, _ in where),
        labels_of(prompts),
        seed,
        {"points": points, "drop_first": drop_first},
        Provenance.of(model, prompts.tokenizer, seed=seed),
    )


def together(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], of: tuple[Any, Any] = (slice(None), slice(None))
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], float]:
    """Queries and keys over each other, c q and k / c + t, and c: one centre, one mean distance from it.

    c = sqrt(spread of k / spread of q), spread the mean distance from the centre; t = c centre(q) - centre(k) / c.
    Every (c q).(k / c + t) is q.k and a number of its query's own. of: which ones centre and spread are taken of.
    """
    middle = [part[which].mean(0) for part, which in zip((q, k), of, strict=True)]
    spread = [
        float((part[which] - centre).norm(dim=-1).mean())
        for part, which, centre in zip((q, k), of, middle, strict=True)
    ]
    c = math.sqrt(spread[1] / spread[0]) if min(spread) > 0 else 1.0
    return c * q, k / c + (c * middle[0] - middle[1] / c), c


def _draw(lengths: tuple[int, ...], count: int, start: int, seed: int) -> list[list[int]]:
    """Positions of each prompt: as many of each as it has, or as an even share of `count` gives it; the first is in."""
    room = [max(length - start, 0) for length in lengths]
    share = [0] * len(room)
    left = min(count, sum(room))
    while left:
        open_ = [number for number, size in enumerate(room) if share[number] < size]
        each, rest = divmod(left, len(open_))
        for place, number in enumerate(open_):
            more = min(each + (place < rest), room[number] - share[number])
            share[number] += more
            left -= more
    drawn = []
    for number, (size, some) in enumerate(zip(room, share, strict=True)):
        rng = torch.Generator().manual_seed(1_000_003 * seed + number)
        # with the first token in, the rest is drawn from those after it
        fixed = [0] if some and not start else []
        others = torch.randperm(size - len(fixed), generator=rng)[: some - len(fixed)] + 1
        drawn.append(sorted([*fixed, *others.tolist()]))
    return drawn


def flatten(
    head: str,
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    number: Int[Tensor, "n"],
    position: Int[Tensor, "n"],
    method: Method,
    seed: int,
) -> Cloud:
    """One head's queries and keys in a plane; number and position say where each token stands."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    inner = position > 0
    inner = inner if int(inner.sum()) >= FEWEST else torch.ones_like(inner)
    ours, theirs, scale = together(q.double(), k.double(), (inner, inner))
    both = torch.cat([ours, theirs]).numpy()
    flat = PCA(2, svd_solver="full").fit(torch.cat([ours[inner], theirs[inner]]).numpy())
    explained = None
    if method == "pca":
        dots = flat.transform(both)
        explained = _pair(np.nan_to_num(flat.explained_variance_ratio_))
    else:
        perplexity = min(30.0, (len(both) - 1) / 3)
        start = flat.transform(both)
        # as small as t-SNE wants its beginning
        start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
        dots = TSNE(2, init=start, perplexity=perplexity, random_state=seed).fit_transform(both)
    dots = torch.from_numpy(np.asarray(dots, dtype=np.float64))
    seen = (number[:, None] == number) & (position <= position[:, None])
    products = q.double() @ k.double().T
    one, other = dots.chunk(2)
    flat_near, near = -torch.cdist(one, other), -torch.cdist(ours, theirs)
    # a query with one key or two has no order to speak of
    rows = (seen.sum(1) >= FEWEST).nonzero()[:, 0].tolist()
    hits = [float(products[row, seen[row]].argmax() == flat_near[row, seen[row]].argmax()) for row in rows]
    queries, keys = (tuple(map(_pair, part.tolist())) for part in (one, other))
    return Cloud(
        head,
        queries,
        keys,
        explained,
        _mean([_spearman(products[row, seen[row]], flat_near[row, seen[row]]) for row in rows]),
        _mean([_spearman(products[row, seen[row]], near[row, seen[row]]) for row in rows]),
        _mean(hits),
        _mean([1 / int(seen[row].sum()) for row in rows]),
        short(scale),
    )


def _spearman(one: Float[Tensor, "k"], other: Float[Tensor, "k"]) -> float:
    """NaN where a row is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(row.numpy()) for row in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(rank.std() for rank in ranks) > 0 else math.nan


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if value == value]
    return short(sum(known) / len(known)) if known else None


def _pair(values: Any) -> Pair:
    one, other = values
    return short(float(one)), short(float(other))


def _cloud(stored: Mapping[str, Any]) -> Cloud:
    explained, *measured = (stored[name] for name in ("explained", "faithful", "possible", "nearest", "chance"))
    return Cloud(
        str(Head.parse(stored["head"])),
        tuple(map(_pair, stored["queries"])),
        tuple(map(_pair, stored["keys"])),
        None if explained is None else _pair(explained),
        *(None if number is None else float(number) for number in measured),
        scale=float(stored["scale"]),
    )
