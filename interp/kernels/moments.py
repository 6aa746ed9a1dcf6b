"""Mean and covariance of keys, and the estimate of a sum of exponentials that follows from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.kernels.contract import Call


def log_bulk(q: Tensor, mean: Tensor, covariance: Tensor, count: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Estimate the log of the sum of `exp(scale q . k)` over `count` keys that are Gaussian.

    The estimate is `log count + m + v / 2` with `m = scale q . mean` and `v = scale^2 q covariance q`. It is accurate
    for v below about log count. From `v = 2 log count` on, the largest key dominates the sum, and the estimate is
    `m + sqrt(2 v log count)`. The two formulas agree at that point.

    Args:
        q: [... q d], the queries.
        mean: [... d], mean of the keys.
        covariance: [... d d], covariance of the keys.
        count: [... q], number of keys of each query.
        scale: Factor of the product of q and k.

    Returns:
        tuple: The estimate [... q], and the variance v of the logits [... q].
    """
    m = scale * (q @ mean[..., None])[..., 0]
    v = scale**2 * ((q @ covariance) * q).sum(-1).clamp(min=0)
    size = count.log()
    return m + torch.where(v < 2 * size, size + v / 2, (2 * v * size).sqrt()), v


@dataclass(eq=False)
class Moments:
    """Sums over a moving range of keys. They are float64, because a covariance is a difference of large numbers."""

    k: Tensor
    """[b g k d], the keys."""
    k_start: int
    """Column of the first key."""
    counted: Tensor
    """Bool [b k], keys that the sums may include."""
    count: Tensor
    """[b], number of keys in the range."""
    total: Tensor
    """[b g d], sum of the keys in the range."""
    product: Tensor
    """[b g d d], sum of the outer products of the keys in the range."""
    low: int
    """First column of the range."""
    high: int
    """Column after the last of the range."""

    @classmethod
    def of(cls, call: Call, begin: Tensor) -> "Moments":
        """Create sums over an empty range.

        Args:
            call: The attention call.
            begin: Int [b], first column whose key the sums may include.

        Returns:
            Moments: Sums of 0.
        """
        b, _, g, _, m = call.sizes
        column = torch.arange(call.k_start, call.k_start + m, device=call.k.device)
        zeros = call.k.new_zeros(b, g, call.k.shape[-1], dtype=torch.float64)
        product = zeros[..., None].repeat(1, 1, 1, zeros.shape[-1])
        counted = column >= begin[:, None]
        return cls(call.k, call.k_start, counted, zeros[:, 0, 0].clone(), zeros, product, call.k_start, call.k_start)

    def move(self, high: int, low: int | None) -> None:
        """Move the range forward. An end that would move back stays in place.

        Args:
            high: Column after the last of the range.
            low: First column of the range; None to keep it.
        """
        if high > self.high:
            self._add(self.high, high, 1)
            self.high = high
        if low is not None and low > self.low:
            self._add(self.low, min(low, self.high), -1)
            self.low = max(self.low, min(low, self.high))

    def _add(self, start: int, stop: int, sign: int) -> None:
        part = slice(start - self.k_start, stop - self.k_start)
        counted = self.counted[:, part]
        # padding may hold any values
        k = self.k[:, :, part].double().masked_fill(~counted[:, None, :, None], 0.0)
        self.count += sign * counted.sum(1)
        self.total += sign * k.sum(2)
        self.product += sign * (k.mT @ k)

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute the mean and the covariance of the keys in the range.

        Args:
            dtype: The dtype of the results.

        Returns:
            tuple: Mean [b g d] and covariance [b g d d].
        """
        count = self.count.clamp(min=1)[:, None, None]
        mean = self.total / count
        covariance = self.product / count[..., None] - mean[..., None] * mean[..., None, :]
        return mean.to(dtype), covariance.to(dtype)


def far_bulk(
    call: Call, first: Tensor, sink: int, window: int, refresh: int, min_keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimate the log-sum-exp over the keys beyond the first `sink` and the last `window`, from their moments.

    The moments are renewed every `refresh` queries, and their range ends before the window of the first of these
    queries. A sliding window of the call limits the range on the other side. Soft-caps are ignored.

    Args:
        call: The attention call.
        first: Int [b], column of the first token of each prompt.
        sink: Number of first keys that are left out.
        window: Number of last keys that are left out.
        refresh: Number of queries that share the same moments.
        min_keys: Smallest number of keys from which moments are used.

    Returns:
        tuple: The estimate of `log_bulk`, its variance v, and the number of keys, at least 1, all [b h q]; and Bool
            [b h q], the queries that have such keys and whose moments include at least `min_keys` keys.
    """
    b, h, g, n, _ = call.sizes
    begin = first + sink
    moments, parts = Moments.of(call, begin), []
    # counted from the end, where the prompts of a left-padded batch are aligned
    starts = [0, *range(n % refresh or refresh, n, refresh)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        row = call.q_start + torch.arange(start, stop, device=call.q.device)
        # one past the last key beyond the window of the block's first query
        high = call.q_start + start - window + 1
        low = None if call.window is None else call.q_start + start - call.window + 1
        moments.move(high, low)
        lowest = begin[:, None] if call.window is None else torch.maximum(begin[:, None], row - call.window + 1)
        keys = (row - window + 1 - lowest).clamp(min=0)
        counts = (moments.count >= min_keys)[:, None] & (keys > 0)
        if call.row_live is not None:
            counts = counts & call.row_live[:, start:stop]
        mean, covariance = moments.values(call.dtype)
        q = call.q[:, :, start:stop].to(call.dtype).reshape(b, g, -1, call.q.shape[-1])
        many = keys.clamp(min=1).to(call.dtype)
        estimate, v = log_bulk(q, mean, covariance, many.repeat(1, h // g)[:, None], call.scale)
        wide = (x[:, None].expand(-1, h, -1) for x in (many, counts))
        parts.append((estimate.view(b, h, -1), v.view(b, h, -1), *wide))
    estimate, v, many, counts = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return estimate, v, many, counts
