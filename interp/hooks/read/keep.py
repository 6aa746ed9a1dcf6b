"""Reductions of attention that a capture can keep: masses on spans, top keys, entropy, column sums, rows, and others.

Each function makes a small frozen object that prints as it is written, hashes and compares, so that it is also the key
to its result: `cap[keep.mass("needle")]`. Positions count in the unpadded prompt.
"""

from typing import Any, Literal

from torch import Tensor

from interp.hooks.read.reductions import (
    At,
    Blocks,
    Columns,
    Entropy,
    K,
    Keep,
    Lse,
    Mass,
    Pattern,
    Q,
    RankedKeys,
    Rows,
    TopKeys,
    V,
    Z,
)

__all__ = [
    "At",
    "Blocks",
    "Columns",
    "Entropy",
    "K",
    "Keep",
    "Lse",
    "Mass",
    "Pattern",
    "Q",
    "RankedKeys",
    "Rows",
    "TopKeys",
    "V",
    "Z",
    "at",
    "blocks",
    "columns",
    "entropy",
    "k",
    "lse",
    "mass",
    "pattern",
    "q",
    "rows",
    "top_keys",
    "v",
    "z",
]


def mass(*spans: Any, by_value: bool = False) -> Mass:
    """Keep the share of each query's attention on each span.

    `mass[b l h q s] = sum over k in span s of pattern[b l h q k]`. Spans may overlap. A learned sink is part of the
    denominator and of no span.

    Args:
        *spans: Names of the prompts' spans, positions, or ranges of positions (start, stop).
        by_value: Weight each key by the norm of its value vector, and divide by the sum of the weighted attention.

    Returns:
        Mass: The reduction, whose result is Float `[b l h q s]`.

    Raises:
        SpanError: If an argument is not a span, or, during the run, if no prompt has the span.
        UsageError: If no span is given.

    Examples:
        >>> share = interp.keep.mass("first", 0)
        >>> with torch.no_grad(), interp.capture(model, share, prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[share].shape
        torch.Size([2, 2, 4, 17, 2])
    """
    return Mass(spans, by_value)


def at(*offsets: int, keys: Tensor | None = None, by_value: bool = False, total: bool = False) -> At:
    """Keep the attention of each query to chosen keys; it is 0 where the key does not exist.

    `at(-1)` is `pattern[b l h q q-1]`, the attention to the token before. Several offsets give several numbers.

    Args:
        *offsets: Positions of the keys relative to the query.
        keys: Int `[b q n]`, the positions of the keys for every query position, -1 for none. Give offsets or keys.
        by_value: Weight each key by the norm of its value vector, as in `mass`.
        total: Sum over the chosen keys.

    Returns:
        At: The reduction, whose result is Float `[b l h q n]`, or `[b l h q]` with `total`.

    Raises:
        UsageError: If both offsets and keys are given, or neither, or if keys has another shape.

    Examples:
        >>> before = interp.keep.at(-1)
        >>> with torch.no_grad(), interp.capture(model, before, prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[before].shape
        torch.Size([2, 2, 4, 17, 1])
    """
    return At(offsets, keys, by_value, total)


def top_keys(k: int = 1) -> TopKeys:
    """Keep the k most attended keys of each query and their probabilities; ties go to the earlier key.

    Args:
        k: Number of keys, 1 to 64.

    Returns:
        TopKeys: The reduction, whose result is `RankedKeys(keys, probs)`: Int64 and Float, `[b l h q k]` each. Where a
            query sees fewer keys, the others are -1 with probability 0.

    Raises:
        UsageError: If k is out of range.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.top_keys(3), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.top_keys(3)].keys[0, 0, 0, 1].sort().values
        tensor([-1,  0,  1])
    """
    return TopKeys(k)


def entropy() -> Entropy:
    """Keep the entropy of each query's attention over keys, in nats; the share of a learned sink is left out.

    Returns:
        Entropy: The reduction, whose result is Float `[b l h q]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.entropy(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.entropy()].shape
        torch.Size([2, 2, 4, 17])
    """
    return Entropy()


def lse() -> Lse:
    """Keep the natural logarithm of each query's softmax denominator (log-sum-exp).

    Returns:
        Lse: The reduction, whose result is Float `[b l h q]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.lse(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.lse()].shape
        torch.Size([2, 2, 4, 17])
    """
    return Lse()


def columns(
    stat: Literal["mean", "sum", "max"] = "mean", weights: Tensor | None = None, by_value: bool = False
) -> Columns:
    """Keep the attention that each key receives over the queries that are read.

    With query weights w, "sum" is the sum over q of `w[b q] pattern[b l h q k]`, "mean" divides it by the total weight
    of the queries that see the key, and "max" is the largest `w[b q] pattern[b l h q k]`.

    Args:
        stat: "mean", "sum" or "max".
        weights: Float `[b q]`, the weight of each query position; 1 by default.
        by_value: Weight each key by the norm of its value vector, as in `mass`.

    Returns:
        Columns: The reduction, whose result is Float `[b l h k]`.

    Raises:
        UsageError: If the statistic is unknown, or weights has another shape.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.columns("sum"), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> round(float(cap[interp.keep.columns("sum")][0, 0, 0].sum()), 4)
        17.0
    """
    return Columns(stat, weights, by_value)


def rows(logits: bool = False) -> Rows:
    """Keep whole rows of the pattern for the queries that are read.

    Give `queries=` to the capture; without it the result is n x n, as with `pattern`.

    Args:
        logits: Keep the logits before the softmax, -inf where the query cannot see the key.

    Returns:
        Rows: The reduction, whose result is Float `[b l h q k]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.rows(), prompts, queries=[16]) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.rows()].shape
        torch.Size([2, 2, 4, 1, 17])
    """
    return Rows(logits)


def pattern(logits: bool = False) -> Pattern:
    """Keep the whole n x n pattern, for short prompts; a pattern that does not fit in memory raises CostError.

    Args:
        logits: Keep the logits before the softmax, -inf where the query cannot see the key.

    Returns:
        Pattern: The reduction, whose result is Float `[b l h q k]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.pattern(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.pattern()].shape
        torch.Size([2, 2, 4, 17, 17])
    """
    return Pattern(logits)


def blocks(size: int = 64) -> Blocks:
    """Keep the attention between blocks of positions: a coarse map of a long prompt.

    `blocks[b l h n m]` is the mean over the queries of block n of their attention to the keys of block m. A row of
    blocks sums to one less the share of a learned sink.

    Args:
        size: Number of positions per block.

    Returns:
        Blocks: The reduction, whose result is Float `[b l h n m]`.

    Raises:
        UsageError: If the size is less than 1.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.blocks(4), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.blocks(4)].shape
        torch.Size([2, 2, 4, 5, 5])
    """
    return Blocks(size)


def z() -> Z:
    """Keep the output of each head, at the input of the output projection, in the model's dtype.

    Returns:
        Z: The reduction, whose result is Float `[b l h q d]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.z(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.z()].shape[:4]
        torch.Size([2, 2, 4, 17])
    """
    return Z()


def q() -> Q:
    """Keep the queries after norm and RoPE.

    Returns:
        Q: The reduction, whose result is Float `[b l h q d]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.q(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.q()].shape[:4]
        torch.Size([2, 2, 4, 17])
    """
    return Q()


def k() -> K:
    """Keep the keys after norm and RoPE, one vector per kv head.

    Returns:
        K: The reduction, whose result is Float `[b l g q d]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.k(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.k()].shape[:4]
        torch.Size([2, 2, 2, 17])
    """
    return K()


def v() -> V:
    """Keep the values, one vector per kv head.

    Returns:
        V: The reduction, whose result is Float `[b l g q d]`.

    Examples:
        >>> with torch.no_grad(), interp.capture(model, interp.keep.v(), prompts) as cap:
        ...     out = model(**prompts.tensors())
        >>> cap[interp.keep.v()].shape[:4]
        torch.Size([2, 2, 2, 17])
    """
    return V()
