"""Which queries of a head are local, by the moments of the far keys and by their true sum."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from interp.errors import PromptError, UsageError
from interp.hooks.prompts.prompts import Prompts
from interp.kernels.contract import Call, Lse
from interp.kernels.moments import far_bulk
from interp.kernels.select import select
from interp.kernels.streaming import beyond, stream

Broken = Literal["clamp", "long"]


@dataclass(frozen=True)
class Settings:
    """Which keys are near, and from which share of attention on they are enough; see `identify.qada`."""

    tau: float
    sink: int
    window: int
    refresh: int
    min_keys: int
    taus: tuple[float, ...]
    broken: Broken

    def __post_init__(self) -> None:
        if not all(0 < tau < 1 for tau in (self.tau, *self.taus)):
            raise UsageError(
                f"tau={self.tau}, taus={self.taus} are not all shares of attention; give numbers between 0 and 1."
            )
        if self.broken not in get_args(Broken):
            raise UsageError(f"unknown broken {self.broken!r}; choose from 'clamp', 'long'.")
        if self.sink < 0 or min(self.window, self.refresh, self.min_keys) < 1:
            raise UsageError(
                f"sink={self.sink}, window={self.window}, refresh={self.refresh}, min_keys={self.min_keys} are out "
                "of range; give a sink of at least 0, and at least 1 for the others."
            )


def check_lengths(prompts: Prompts, sink: int, window: int, refresh: int, min_keys: int) -> None:
    """Raise PromptError for a prompt in which no query counts, wherever blocks of queries begin."""
    need = sink + window + min_keys + refresh - 1
    for number, length in enumerate(prompts.lengths):
        if length < need:
            raise PromptError(
                f"prompt {number} has {length} tokens, and {need} are needed before a query has {min_keys} keys beyond "
                f"the first {sink} and the last {window}; give longer prompts, or a smaller window."
            )


def shares(call: Call, first: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Shares of the queries of a layer that are long, that are called long, and how the two differ; [b h ...] each.

    NaN where no query counts. The names are those of the extras of `identify.qada`; "long" is its score.

    Args:
        call: The attention call of a layer.
        first: Int [b], the column of each prompt's first token.
        settings: Settings of the analysis.
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
    estimate, v, keys, counts = far_bulk(
        call, first, settings.sink, settings.window, settings.refresh, settings.min_keys
    )
    broken = v > keys.log()
    tau = torch.tensor([settings.tau, *settings.taus], dtype=call.dtype, device=near.device)
    truth = (near - bulk)[..., None] < tau.logit()
    called = (near - estimate)[..., None] < tau.logit()
    if settings.broken == "long":
        called = called | broken[..., None]

    def share(x: Tensor, among: Tensor = counts) -> Tensor:
        """Mean over the queries that count."""
        weight = among if x.dim() == 3 else among[..., None]
        return torch.where(weight, x.to(call.dtype), 0.0).sum(2) / weight.sum(2).to(call.dtype)

    return {
        "long": share(called[..., 0]),
        "oracle": share(truth[..., 0]),
        "agreement": share(called[..., 0] == truth[..., 0]),
        "missed": share(truth[..., 0] & ~called[..., 0]),
        "broken": share(broken),
        "log_error": share((estimate - bulk).abs(), counts & ~broken),
        "sparsity": share(~called[..., 1:]),
        "oracle_sparsity": share(~truth[..., 1:]),
    }
