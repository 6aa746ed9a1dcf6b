"""Which queries of a head are local: the first and last keys hold enough, by the moments of the rest and in truth."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from interp.errors import UsageError
from interp.kernels.contract import Call, Lse
from interp.kernels.moments import far_bulk
from interp.kernels.select import select
from interp.kernels.streaming import beyond, stream

Broken = Literal["clamp", "long"]


@dataclass(frozen=True)
class Settings:
    """What is near, and from which share on that is enough; see identify.qada."""

    tau: float
    sink: int
    window: int
    refresh: int
    least: int
    taus: tuple[float, ...]
    broken: Broken

    def __post_init__(self) -> None:
        if not all(0 < tau < 1 for tau in (self.tau, *self.taus)):
            raise UsageError(f"tau={self.tau}, taus={self.taus}: a share of attention lies between 0 and 1.")
        if self.broken not in get_args(Broken):
            raise UsageError(f"broken={self.broken!r}: say 'clamp' or 'long'.")
        if self.sink < 0 or min(self.window, self.refresh, self.least) < 1:
            raise UsageError(
                f"sink={self.sink}, window={self.window}, refresh={self.refresh}, least={self.least}: give at least 1, "
                "and a sink of 0 or more."
            )


def shares(call: Call, first: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Shares of the queries of a layer that are long, are called so, and what tells the two apart; [b h ...] each.

    first: Int [b] column of each prompt's first token. NaN where no query counts. Names as in identify.qada, "long" its
    score.
    """
    b, h = call.sizes[:2]
    if call.window is not None and call.window <= settings.window:
        none = call.q.new_zeros(b, h, dtype=call.dtype)
        local = none[..., None].expand(-1, -1, len(settings.taus)) + 1
        same = {"long": none, "oracle": none, "missed": none, "broken": none, "agreement": none + 1}
        return same | {"log_error": none * torch.nan, "sparsity": local, "oracle_sparsity": local}
    near = stream(call, settings.sink, settings.window, first)[1]
    rest = beyond(call, settings.sink, settings.window, first)
    bulk = select(rest, (Lse(),)).engine(rest, (Lse(),), out=False).values[0]
    estimate, v, keys, counts = far_bulk(call, first, settings.sink, settings.window, settings.refresh, settings.least)
    broken = v > keys.log()
    tau = torch.tensor([settings.tau, *settings.taus], dtype=call.dtype, device=near.device)
    truth = (near - bulk)[..., None] < tau.logit()
    told = (near - estimate)[..., None] < tau.logit()
    if settings.broken == "long":
        told = told | broken[..., None]

    def share(x: Tensor, among: Tensor = counts) -> Tensor:
        """Mean over the queries that count."""
        weight = among if x.dim() == 3 else among[..., None]
        return torch.where(weight, x.to(call.dtype), 0.0).sum(2) / weight.sum(2).to(call.dtype)

    return {
        "long": share(told[..., 0]),
        "oracle": share(truth[..., 0]),
        "agreement": share(told[..., 0] == truth[..., 0]),
        "missed": share(truth[..., 0] & ~told[..., 0]),
        "broken": share(broken),
        "log_error": share((estimate - bulk).abs(), counts & ~broken),
        "sparsity": share(~told[..., 1:]),
        "oracle_sparsity": share(~truth[..., 1:]),
    }
