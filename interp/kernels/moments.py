"""Mean and covariance of keys, and what they say of a sum of exponentials over them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.kernels.contract import Call


def log_bulk(q: Tensor, mean: Tensor, covariance: Tensor, count: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(log of the sum of exp(scale q . k) over `count` keys that are Gaussian, the variance v of those logits).

    q [... q d], mean [... d], covariance [... d d], count [... q] -> [... q] each;
    log count + m + v / 2, m = scale q . mean, v = scale^2 q covariance q; good for v below about log count. Past
    v = 2 log count the largest of so many keys is all of the sum: m + sqrt(2 v log count), which meets it there.
    """
    m = scale * (q @ mean[..., None])[..., 0]
    v = scale**2 * ((q @ covariance) * q).sum(-1).clamp(min=0)
    size = count.log()
    return m + torch.where(v < 2 * size, size + v / 2, (2 * v * size).sqrt()), v


@dataclass(eq=False)
class Moments:
    """Sums over a range of keys that moves on, in float64, since a covariance is a difference of large numbers."""

    k: Tensor
    """[b g k d]"""
    k_start: int
    take: Tensor
    """Bool [b k] keys that count at all"""
    count: Tensor
    """[b]"""
    total: Tensor
    """[b g d]"""
    product: Tensor
    """[b g d d]"""
    low: int
    high: int

    @classmethod
    def of(cls, call: Call, begin: Tensor) -> "Moments":
        """Of no key yet; keys before column `begin` [b] never count."""
        b, _, g, _, m = call.sizes
        column = torch.arange(call.k_start, call.k_start + m, device=call.k.device)
        zeros = call.k.new_zeros(b, g, call.k.shape[-1], dtype=torch.float64)
        product = zeros[..., None].repeat(1, 1, 1, zeros.shape[-1])
        take = column >= begin[:, None]
        return cls(call.k, call.k_start, take, zeros[:, 0, 0].clone(), zeros, product, call.k_start, call.k_start)

    def move(self, high: int, low: int | None) -> None:
        """Let the range end before column `high`, and begin at `low` where that is given; neither moves back."""
        if high > self.high:
            self._add(self.high, high, 1)
            self.high = high
        if low is not None and low > self.low:
            self._add(self.low, min(low, self.high), -1)
            self.low = max(self.low, min(low, self.high))

    def _add(self, start: int, stop: int, sign: int) -> None:
        part = slice(start - self.k_start, stop - self.k_start)
        take = self.take[:, part].double()
        k = self.k[:, :, part].double() * take[:, None, :, None]
        self.count += sign * take.sum(1)
        self.total += sign * k.sum(2)
        self.product += sign * (k.mT @ k)

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(mean [b g d], covariance [b g d d])"""
        count = self.count.clamp(min=1)[:, None, None]
        mean = self.total / count
        covariance = self.product / count[..., None] - mean[..., None] * mean[..., None, :]
        return mean.to(dtype), covariance.to(dtype)


def far_bulk(
    call: Call, first: Tensor, sink: int, window: int, refresh: int, least: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the keys of each query beyond the first `sink` and the last `window` sum to, by their moments.

    (log_bulk, its variance v, keys [b h q] each, at least 1, and Bool, the queries whose moments hold `least` keys).
    Moments are renewed every `refresh` queries and end before the window of the first of these. first: Int [b] column
    of each prompt's first token. A native window of the call ends them on the other side; soft-caps are left out.
    """
    b, h, g, n, _ = call.sizes
    begin = first + sink
    moments, parts = Moments.of(call, begin), []
    # counted from the end, where the prompts of a batch padded on the left are level
    starts = [0, *range(n % refresh or refresh, n, refresh)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        row = call.q_start + torch.arange(start, stop, device=call.q.device)
        # one past the last key beyond the window of the block's first query
        high = call.q_start + start - window + 1
        low = None if call.window is None else call.q_start + start - call.window + 1
        moments.move(high, low)
        lowest = begin[:, None] if call.window is None else torch.maximum(begin[:, None], row - call.window + 1)
        keys = (row - window + 1 - lowest).clamp(min=0)
        counts = (moments.count >= least)[:, None] & (keys > 0)
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
