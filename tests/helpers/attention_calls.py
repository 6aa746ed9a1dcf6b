"""Attention calls for tests: random calls with any fields of the contract, and plain calls with chosen fields."""

import random
from dataclasses import replace
from typing import Any

import torch

from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, Rows, TopKeys


def draw(
    seed: int, dtype: torch.dtype = torch.float64, small: bool = False
) -> tuple[Call, tuple[Request, ...], torch.Tensor | None]:
    """Return a random call, all requests on it, and the queries they read; `small` for engines slow on a CPU."""
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch_rng, dtype=torch.float64).to(dtype)

    b, g = rng.choice([1, 2, 3]), rng.choice([1, 2])
    h, n = g * rng.choice([1, 4, 8]), rng.choice([1, 2, 7, 63, 100])
    h, n = (min(h, 2 * g), min(n, 44)) if small else (h, n)
    before, k_start = rng.choice([0, 0, 5, 40]), rng.choice([0, 0, 3])
    m, d = n + before, 16
    more: dict[str, Any] = {"q_start": before + k_start, "k_start": k_start}
    if rng.random() < 0.3:
        more["window"] = rng.choice([1, 5, 17, 500])
    if rng.random() < 0.3:
        more["softcap"] = 3.0
    if rng.random() < 0.3:
        more["sinks"] = normal(h) * rng.choice([1, 100])
    if rng.random() < 0.4:
        live = torch.ones(b, m, dtype=torch.bool)
        for row in live:
            row[: rng.randrange(m)] = False
        more["live"] = live
        more["row_live"] = live[:, before:]
    if rng.random() < 0.3:
        more["key_bias"] = normal(b, h, m)
        more["key_bias"][:, :, rng.randrange(m)] = -torch.inf
    if rng.random() < 0.2:
        more["row_coef"] = normal(b, h, n, 2)
        shape = (b, m) if rng.random() < 0.5 else (b, h, m)
        more["key_group"] = torch.randint(0, 3, shape, generator=torch_rng)
    if rng.random() < 0.3:
        more["logit_scale"] = torch.rand(h, generator=torch_rng)
    if rng.random() < 0.2:
        seen = torch.rand(b, 1, n, m, generator=torch_rng) < 0.7
        more["mask"] = seen if rng.random() < 0.5 else normal(b, h, n, m)
    call = Call(normal(b, h, n, d) * 2, normal(b, g, m, d), normal(b, g, m, d), d**-0.5, **more)
    queries = None if rng.random() < 0.6 else torch.tensor(sorted(rng.sample(range(n), rng.randrange(1, n + 1))))
    rows = n if queries is None else len(queries)
    return call, every_request(call, rows, torch_rng), queries


def causal_call(
    b: int = 2, h: int = 2, g: int = 1, n: int = 34, before: int = 0, d: int = 32, e: int | None = None, **more: Any
) -> Call:
    """Return a causal float64 call of n queries and before + n keys, with heads of width d and values of width e.

    `more` holds other fields of Call.
    """
    rng = torch.Generator().manual_seed(b * h * n + d)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    m = before + n
    q, k, v = normal(b, h, n, d) * 1.5, normal(b, g, m, d), normal(b, g, m, e or d)
    settings: dict[str, Any] = {"q_start": before} | more
    return Call(q, k, v, d**-0.5, **settings)


def in_dtype(call: Call, dtype: torch.dtype, device: str | torch.device = "cpu") -> Call:
    """Return the same call with q, k and v in another dtype, and all tensors on a device."""
    on = {
        name: value.to(device)
        for name, value in vars(call).items()
        if isinstance(value, torch.Tensor) and name not in ("q", "k", "v")
    }
    return replace(call, q=call.q.to(device, dtype), k=call.k.to(device, dtype), v=call.v.to(device, dtype), **on)


def every_request(call: Call, rows: int, torch_rng: torch.Generator) -> tuple[Request, ...]:
    """Return all requests, for `rows` queries of a call."""
    b, _, _, n, m = call.sizes
    sets, weights = torch.rand(b, 4, m, generator=torch_rng), torch.rand(b, n, generator=torch_rng)
    by_head = torch.rand(b, call.sizes[1], 2, m, generator=torch.Generator().manual_seed(m)) < 0.5
    keys = torch.randint(-1, m + call.k_start + 3, (b, rows, 3), generator=torch_rng)
    return (
        Lse(),
        Entropy(),
        TopKeys(1),
        TopKeys(5),
        Mass(sets),
        Mass(sets, by_value=True),
        Mass(by_head),
        Mass(by_head, by_value=True),
        At(keys),
        At(keys, by_value=True),
        At(keys, total=True),
        Columns(),
        Columns("max"),
        Columns(weights=weights),
        Columns(by_value=True),
        Rows(torch.tensor([0, n - 1])),
        Rows(torch.tensor([n - 1]), logits=True),
        Blocks(8, torch.randint(0, 4, (b,), generator=torch_rng)),
    )
