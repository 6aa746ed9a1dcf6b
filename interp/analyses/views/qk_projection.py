"""Queries and keys of a head in one plane, over many prompts."""

import math
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.analyses.views._tokens import chosen_heads, labels_of, place_of_head, short, token_text
from interp.errors import PromptError, ScoreError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import k, q

Method = Literal["pca", "tsne"]
Pair = tuple[float, float]
MIN_TOKENS = 3
"""tokens that make a plane, and keys that have an order"""
N_DRAWN, N_POINTS = 4, 1200
"""heads that a run draws, and points of each"""


@result
@dataclass(frozen=True, eq=False)
class Cloud:
    """The queries and keys of one head in the plane; row i of both is token i of the `QKProjection`."""

    head: str
    queries: Float[Tensor, "n 2"] = field(repr=False)
    keys: Float[Tensor, "n 2"] = field(repr=False)
    explained: Pair | None
    """share of the variance along each axis; None for t-SNE"""
    faithful: float | None
    """Spearman correlation of nearness in the plane with q.k, mean over queries: how far the picture can be trusted;
    None where no query has three keys that differ"""
    possible: float | None
    """the same with distances in all dimensions, before the projection"""
    nearest: float | None
    """share of queries whose nearest key in the plane is the one with the largest q.k"""
    chance: float | None
    """the same share for a key that is drawn at random"""
    scale: float
    """factor by which queries were multiplied and keys divided"""


@result
@dataclass(frozen=True, eq=False, repr=False)
class QKProjection(Result):
    """Heads whose queries and keys share a plane, on the same tokens of some prompts."""

    method: str
    clouds: tuple[Cloud, ...]
    """one for each head"""
    tokens: tuple[str, ...]
    positions: Int[Tensor, "n"]
    prompts: Int[Tensor, "n"]
    """number of the prompt of each token"""
    labels: tuple[str, ...]
    """one for each prompt"""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        counts = {len(part) for cloud in self.clouds for part in (cloud.queries, cloud.keys)}
        counts |= {len(self.tokens), len(self.positions), len(self.prompts)}
        if len(counts) != 1 or not self.clouds or int(self.prompts.max()) >= len(self.labels):
            raise ScoreError(
                f"a projection has {len(self.tokens)} tokens, {len(self.positions)} positions and {len(self.clouds)} "
                "heads with other numbers of points; give one point of each head for each token."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads."""
        return tuple(cloud.head for cloud in self.clouds)

    def __getitem__(self, head: Any) -> Cloud:
        return self.clouds[place_of_head(head, self.heads)]

    def to_frame(self, head: Any = None) -> Any:
        """A pandas DataFrame with two rows for each token: x, y, kind, token, position, prompt, label, head.

        Args:
            head: One of `heads`, by default the first.

        Raises:
            HeadError: For a head that is not in this view.
        """
        import pandas as pd

        cloud = self.clouds[0] if head is None else self[head]
        numbers = self.prompts.tolist()
        about = {"token": self.tokens, "position": self.positions.tolist(), "prompt": numbers}
        about["label"] = tuple(self.labels[number] for number in numbers)
        return pd.concat(
            [
                pd.DataFrame({"x": dots[:, 0], "y": dots[:, 1], "kind": kind, **about, "head": cloud.head})
                for kind, dots in (("query", cloud.queries.tolist()), ("key", cloud.keys.tolist()))
                for dots in (np.array(dots),)
            ],
            ignore_index=True,
        )

    def summary(self, top: int = 10) -> str:
        """One line for each head: how well nearness in the plane ranks q.k.

        Args:
            top: Number of heads to list.
        """
        lines = [f"{self.method} of queries and keys, {len(self.tokens)} tokens of {len(self.labels)} prompts"]
        for cloud in self.clouds[:top]:
            if cloud.faithful is None or cloud.possible is None:
                lines.append(f"  {cloud.head:8s} too few keys to rank")
            else:
                lines.append(
                    f"  {cloud.head:8s} Spearman {cloud.faithful:.2f} in the plane, {cloud.possible:.2f} in all "
                    "dimensions"
                )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"QKProjection({self.method}, {', '.join(self.heads)}; {len(self.tokens)} tokens of {len(self.labels)} "
            "prompts)"
        )


@analysis(
    title="Queries and keys", group="views", order=32, prompts=standard.passages, joint=True, in_all=False,
    needs=("heads",), inputs=lambda run: {"heads": HeadSet(tuple(run.leading[:N_DRAWN]))},
    run_settings={"points": N_POINTS},
)  # fmt: skip
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
    """Project the queries and keys of a head to one plane, where a query lies near the keys that it attends to.

    `q[b h q d]` and `k[b h k d]` are those that attention multiplies, after norm and RoPE; a query head uses the keys
    of its group. Before the projection (see `together`), q is multiplied and k divided by c, which leaves q.k as it is
    and gives both clouds the same spread. Keys are moved by t to the centre of the queries: `q.(k + t)` adds the same
    number to every key of a row, so that the softmax does not change. With a learned sink or a soft-cap, only the order
    of a row's keys is kept.

    The plane is spanned by two components of PCA, or made by t-SNE (perplexity 30, initialised with PCA), both from
    scikit-learn. Coordinates are in units of the scaled queries; those of t-SNE have no meaning.

    `Cloud.faithful` is the mean over queries of the Spearman correlation between nearness in the plane and q.k, over
    the keys of the query's prompt that were drawn and that it may attend to (a sliding window is ignored).
    `Cloud.nearest` is the share of queries whose nearest key has the largest q.k; t-SNE keeps it better than the order
    of the other keys.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Any prompts.
        heads: Heads, as `HeadSet.parse` takes them.
        method: "pca" or "tsne".
        points: Largest number of points of a head. A token has two, its query and its key; tokens are drawn evenly over
            prompts.
        drop_first: Leave out the first token of each prompt, which attention sinks attend to. Where it is kept, it has
            no influence on centre, scale and the axes of PCA.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the drawn tokens and of t-SNE.
        progress: Show a progress bar.

    Returns:
        QKProjection: float32 `queries` and `keys [n 2]` of each head.

    Raises:
        HeadError: For no heads, or heads that the model does not have.
        UsageError: For an unknown method, or too few points.
        PromptError: For prompts with fewer than three tokens together.

    Examples:
        >>> from interp.analyses.views.qk_projection import qk_projection
        >>> view = qk_projection(model, prompts, "L1H2")
        >>> view["L1H2"].queries.shape
        torch.Size([34, 2])

    Source:
        Yeh et al. 2305.03210 (AttentionViz).

    Differs:
        c is chosen so that the spreads are equal. PCA is the default, since its distances can be read. The result
        states how faithful the plane is.

    Limits:
        Does not show attention itself, which compares keys within a row and lets long keys win from afar. Two
        dimensions hide most of what `d` dimensions separate, so read `faithful` before the picture. RoPE rotates q and
        k by their positions, so that clusters may be positions rather than meanings.
    """
    if method not in get_args(Method):
        raise UsageError(f"unknown method {method!r}; choose from 'pca', 'tsne'.")
    if points < 2 * MIN_TOKENS:
        raise UsageError(f"points={points} are too few for a plane; give at least {2 * MIN_TOKENS}.")
    layout = HeadLayout.of(model)
    chosen = chosen_heads(heads, layout)
    drawn = _draw(prompts.lengths, points // 2, int(drop_first), seed)
    where = [(number, position) for number, kept in enumerate(drawn) for position in kept]
    if len(where) < MIN_TOKENS:
        raise PromptError(f"{len(where)} tokens are too few for a plane; give prompts of {MIN_TOKENS} tokens or more.")
    parts: list[tuple[Tensor, Tensor]] = []
    title = "queries and keys" if progress else None
    for batch, cap in read(model, prompts, [q(), k()], batch_size=batch_size, progress=title, heads=chosen):
        queries_of, keys_of = cap[q()].float(), cap[k()].float()
        for row in range(len(batch)):
            kept = drawn[len(parts)]
            parts.append((queries_of[row][:, kept], keys_of[row][:, kept]))
    queries, keys = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
    number, position = torch.tensor(where).unbind(1)
    clouds = tuple(
        flatten(str(head), queries[i], keys[i], number, position, method, seed) for i, head in enumerate(chosen)
    )
    name = cache(partial(token_text, prompts.tokenizer))
    return QKProjection(
        method=method,
        clouds=clouds,
        tokens=tuple(name(prompts[n].ids[p]) for n, p in where),
        positions=position.contiguous(),
        prompts=number.contiguous(),
        labels=labels_of(prompts),
        seed=seed,
        settings={"points": points, "drop_first": drop_first},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
    )


def together(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], of: tuple[Any, Any] = (slice(None), slice(None))
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], float]:
    """Scale and move queries and keys so that they share one centre and one spread.

    Queries become `c q` and keys `k / c + t`, with `c = sqrt(spread of k / spread of q)`, where the spread is the mean
    distance from the centre, and `t = c centre(q) - centre(k) / c`. Every `(c q).(k / c + t)` is q.k plus a number that
    depends on the query alone.

    Args:
        q: Queries.
        k: Keys.
        of: Indices of the queries and of the keys from which centre and spread are computed.

    Returns:
        The queries, the keys, and c.
    """
    middle = [part[which].mean(0) for part, which in zip((q, k), of, strict=True)]
    spread = [
        float((part[which] - centre).norm(dim=-1).mean())
        for part, which, centre in zip((q, k), of, middle, strict=True)
    ]
    c = math.sqrt(spread[1] / spread[0]) if min(spread) > 0 else 1.0
    return c * q, k / c + (c * middle[0] - middle[1] / c), c


def _draw(lengths: tuple[int, ...], count: int, start: int, seed: int) -> list[list[int]]:
    """Positions of each prompt: an even share of `count`, or all that it has; the first position is always drawn."""
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
    """Project one head's queries and keys to a plane.

    Args:
        head: Name of the head.
        q: Queries.
        k: Keys of the same tokens.
        number: Number of the prompt of each token.
        position: Position of each token.
        method: "pca" or "tsne".
        seed: Seed of t-SNE.

    Returns:
        Cloud: The points and how faithful they are.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    inner = position > 0
    inner = inner if int(inner.sum()) >= MIN_TOKENS else torch.ones_like(inner)
    scaled_q, scaled_k, scale = together(q.double(), k.double(), (inner, inner))
    both = torch.cat([scaled_q, scaled_k]).numpy()
    flat = PCA(2, svd_solver="full").fit(torch.cat([scaled_q[inner], scaled_k[inner]]).numpy())
    explained = None
    if method == "pca":
        dots = flat.transform(both)
        explained = _pair(np.nan_to_num(flat.explained_variance_ratio_))
    else:
        perplexity = min(30.0, (len(both) - 1) / 3)
        start = flat.transform(both)
        # t-SNE begins with small numbers
        start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
        dots = TSNE(2, init=start, perplexity=perplexity, random_state=seed).fit_transform(both)
    dots = torch.from_numpy(np.asarray(dots, dtype=np.float64))
    seen = (number[:, None] == number) & (position <= position[:, None])
    products = q.double() @ k.double().T
    one, other = dots.chunk(2)
    flat_near, near = -torch.cdist(one, other), -torch.cdist(scaled_q, scaled_k)
    # one key or two have no order
    rows = (seen.sum(1) >= MIN_TOKENS).nonzero()[:, 0].tolist()
    hits = [float(products[row, seen[row]].argmax() == flat_near[row, seen[row]].argmax()) for row in rows]
    return Cloud(
        head,
        one.float().contiguous(),
        other.float().contiguous(),
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
