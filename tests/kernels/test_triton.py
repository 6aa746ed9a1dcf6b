"""The Triton engine against the reference in float64: all features of a call, dead rows, padding, layouts, extremes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import causal_call
from engines import ENGINES_BY_NAME

from interp.kernels import naive
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, Result, Rows, TopKeys

pytestmark = pytest.mark.interpreter
TRITON = ENGINES_BY_NAME["triton"]


def padded(m: int, *left: int) -> torch.Tensor:
    """Return Bool [b m] with the given numbers of padded keys on the left."""
    return torch.arange(m)[None] >= torch.tensor(left)[:, None]


def requests_of(call: Call, rows: int | None = None) -> tuple[Request, ...]:
    """Return each reduction in the variants that different kernels serve."""
    b, _, _, n, m = call.sizes
    rng = torch.Generator().manual_seed(1)
    listed = torch.randint(-1, m + call.k_start + 2, (b, rows or n, 3), generator=rng)
    sets = torch.rand(b, 3, m, generator=rng)
    return (
        Lse(),
        Entropy(),
        TopKeys(1),
        Mass(sets),
        Mass(sets, by_value=True),
        At(listed),
        At(listed, by_value=True, total=True),
        Columns(),
        Columns("max"),
        Columns(weights=torch.rand(b, n, generator=rng), by_value=True),
        Rows(torch.tensor([0, n - 1])),
        Rows(torch.tensor([n // 2]), logits=True),
        Blocks(16, torch.full((b,), call.k_start)),
    )


def check(
    call: Call, requests: tuple[Request, ...] | None = None, queries: Any = None, atol: float | None = None
) -> Result:
    """Assert that the kernels give the results of the reference on the same numbers in float64."""
    given = TRITON.adapt(call)
    requests = requests_of(call, None if queries is None else len(queries)) if requests is None else requests
    exact = replace(given, q=given.q.double(), k=given.k.double(), v=given.v.double())
    judge, found = naive.attend(exact, requests, queries), TRITON.attend(given, requests, queries)
    TRITON.assert_close(judge.out, found.out, "out", atol)
    for request, one, other in zip(requests, judge.values, found.values, strict=True):
        TRITON.assert_close(one, other, repr(request)[:40], atol)
    return found


def equal(one: Any, other: Any) -> bool:
    """Return whether two values are bit-identical."""
    if isinstance(one, tuple):
        return all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other if isinstance(one, int) else torch.equal(one, other)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


LEFT: dict[str, Any] = {"live": padded(34, 0, 9), "row_live": padded(34, 0, 9)}
RIGHT: dict[str, Any] = {"live": ~padded(34, 34, 21), "row_live": ~padded(34, 34, 21)}
COEF: dict[str, Any] = {"row_coef": noise(2, 2, 34, 2), "key_group": torch.arange(34)[None].expand(2, -1) % 3}
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "offset": {"before": 21},
    "cache without its oldest keys": {"before": 21, "q_start": 24, "k_start": 3},
    "window": {"window": 10},
    "window of a tile": {"window": 16, "before": 30},
    "window, full": {"window": 10, "causal": False},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([3.0, 60.0])},
    "mha": {"g": 2},
    "groups of 4": {"g": 2, "h": 8, "n": 20},
    "groups of 8": {"h": 8, "n": 20},
    "left padding": LEFT,
    "ragged": RIGHT,
    "padding, full": LEFT | {"causal": False},
    "key bias": {"key_bias": noise(2, 2, 34)},
    "key bias of all prompts, columns of -inf": {
        "key_bias": noise(1, 2, 34).masked_fill(torch.arange(34) % 5 == 0, -torch.inf)
    },
    "key bias of 50": {"key_bias": 50.0 * (torch.arange(34) == 11)[None, None].expand(1, 2, 34)},
    "row coefficients": COEF,
    "row coefficients of -inf": COEF
    | {"row_coef": noise(1, 2, 34, 2).masked_fill(noise(1, 2, 34, 2) > 0.8, -torch.inf)},
    "logit scale": {"logit_scale": torch.tensor([0.0, 3.0])},
    "logit scale of each prompt": {"logit_scale": torch.rand(2, 2)},
    "heads of 40": {"d": 40},
    "heads of 64": {"d": 64, "n": 20},
    "heads of 80, wider values": {"d": 80, "e": 96, "n": 20},
    "narrower values": {"d": 32, "e": 16},
    "all of them": LEFT
    | COEF
    | {
        "window": 19,
        "softcap": 3.0,
        "sinks": torch.zeros(2),
        "key_bias": noise(2, 2, 34),
        "logit_scale": torch.rand(2),
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_output_of_every_call(tiny, name):
    check(causal_call(**FEATURES[name]))


@pytest.mark.parametrize(
    "name", ["full", "window of a tile", "left padding", "row coefficients of -inf", "all of them"]
)
def test_chosen_queries(tiny16, name):
    call = causal_call(**FEATURES[name])
    # enough rows for the pass over all keys, and few rows
    check(call, queries=torch.arange(0, 34, 2))
    check(call, queries=torch.tensor([3, 33]))


DEAD: dict[str, dict[str, Any]] = {
    "a prompt of length 0": {"live": padded(34, 3, 34), "row_live": padded(34, 3, 34)},
    "no live key, but live rows": {"live": padded(34, 5, 34)},
    "learned sinks": {"live": padded(34, 5, 34), "sinks": torch.zeros(2)},
    "queries before all keys": {"q_start": -20},
    "bias of -inf on a whole row": {
        "row_coef": torch.full((1, 2, 34, 1), -torch.inf).masked_fill(torch.arange(34)[:, None] != 20, 0.0),
        "key_group": torch.ones(1, 34, dtype=torch.int32),
    },
    "bias of -inf on all keys": {"key_bias": torch.full((2, 2, 34), -torch.inf)},
    "window of 0": {"window": 0},
}


@pytest.mark.parametrize("name", DEAD)
def test_rows_that_see_nothing(tiny16, name):
    call = causal_call(**DEAD[name])
    found = check(call)
    dead = ~call.visible().any(-1).expand(2, 2, 34)
    assert dead.any()
    assert (found.written[dead] == 0).all()
    assert (found.values[0][dead] == -torch.inf).all()


SIZES: dict[str, dict[str, Any]] = {
    "one query, one key": {"n": 1},
    "one query": {"n": 1, "before": 40},
    "few queries": {"n": 16, "before": 5},
    "a tile": {"n": 32, "h": 2},
    "window of 1": {"window": 1},
    "window beyond n": {"window": 99},
    "queries after all keys": {"q_start": 50},
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(tiny16, name):
    check(causal_call(**SIZES[name]))


@pytest.mark.parametrize("start", [0, -17, 20])
def test_more_queries_than_keys(tiny16, start):
    call = causal_call(n=34)
    check(replace(call, k=call.k[:, :, :20], v=call.v[:, :, :20], q_start=start))


PADDING: dict[str, dict[str, Any]] = {
    "left": LEFT,
    "ragged": RIGHT,
    "full": LEFT | {"causal": False},
    "window": LEFT | {"window": 12, "sinks": torch.zeros(2)},
    "biases": LEFT | COEF | {"key_bias": noise(2, 2, 34), "softcap": 2.0},
    "rows alone": {"row_live": padded(34, 0, 9)},
    "rows alone, full": {"row_live": padded(34, 0, 9), "causal": False},
}


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", PADDING)
def test_padding_may_hold_anything(tiny16, name, few):
    call = TRITON.adapt(causal_call(**PADDING[name]))
    rows, keys = call.row_live, call.live
    assert rows is not None

    def fill(one: float, other: float) -> Call:
        q = call.q.masked_fill(~rows[:, None, :, None], one)
        if keys is None:
            return replace(call, q=q)
        hidden = ~keys[:, None, :, None]
        return replace(call, q=q, k=call.k.masked_fill(hidden, other), v=call.v.masked_fill(hidden, one))

    queries = torch.tensor([2, 8, 30]) if few else None
    requests = requests_of(call, 3 if few else None)
    fillings = (0.0, 0.0), (torch.nan, torch.inf)
    clean, dirty = (TRITON.attend(fill(*values), requests, queries) for values in fillings)
    assert equal(clean.out, dirty.out)
    for request, one, other in zip(requests, clean.values, dirty.values, strict=True):
        assert equal(one, other), request


@pytest.mark.parametrize("name", ["causal", "all of them"])
def test_runs_are_bit_identical(tiny16, name):
    call = TRITON.adapt(causal_call(**FEATURES[name]))
    requests = (*requests_of(call), TopKeys(3))
    first = TRITON.attend(call, requests)
    again = TRITON.attend(call, requests)
    assert equal((first.out, *first.values), (again.out, *again.values))


@pytest.mark.parametrize("queries", [None, torch.tensor([1, 30])])
def test_a_prompt_alone_is_the_prompt_in_its_batch(tiny16, queries):
    call = TRITON.adapt(causal_call(**FEATURES["left padding"]))
    # spans in one prompt and scattered keys in the other, so that each alone would use another kernel
    sets = torch.zeros(2, 2, 34)
    sets[0, 0, 10:20] = 1
    sets[1] = torch.rand(2, 34)
    listed = torch.randint(0, 34, (2, 34 if queries is None else 2, 2))

    def ask(call: Call, part: slice) -> tuple[Any, ...]:
        requests = (Lse(), Entropy(), TopKeys(1), Mass(sets[part]), At(listed[part]), Columns(), Columns(by_value=True))
        result = TRITON.attend(call, requests, queries)
        return result.out, *result.values

    def only(x: torch.Tensor | None, i: int) -> torch.Tensor | None:
        return None if x is None else x[i : i + 1]

    whole = ask(call, slice(0, 2))
    for i in range(2):
        alone = replace(
            call,
            q=call.q[i : i + 1],
            k=call.k[i : i + 1],
            v=call.v[i : i + 1],
            live=only(call.live, i),
            row_live=only(call.row_live, i),
        )
        for j, (one, other) in enumerate(zip(ask(alone, slice(i, i + 1)), whole, strict=True)):
            own = tuple(x[i : i + 1] for x in other) if isinstance(other, tuple) else other[i : i + 1]
            # for few rows, torch sums the columns
            assert equal(one, own) or (queries is not None and j > 5), j


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps between rows": lambda x: torch.nn.functional.pad(x, (0, 5))[..., : x.shape[-1]],
    "not aligned": _misaligned,
    "last axis with gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "last axis outside": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("n", [24, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tiny16, name, n):
    call, lay = TRITON.adapt(causal_call(h=4, g=2, n=n, before=9, sinks=torch.zeros(4))), LAYOUTS[name]
    laid = replace(call, q=lay(call.q), k=lay(call.k), v=lay(call.v))
    requests = requests_of(call)
    one, other = TRITON.attend(call, requests), TRITON.attend(laid, requests)
    TRITON.assert_close(one.values, other.values, name, 1e-6)
    # torch sums the norms of values in the order of memory, unlike the kernels
    plain_ones = [i for i, request in enumerate(requests) if not getattr(request, "by_value", False)]
    assert equal(one.out, other.out)
    assert all(equal(one.values[i], other.values[i]) for i in plain_ones)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with NaN before and after them in memory."""
    room = torch.full((x.numel() + 128,), torch.nan, dtype=x.dtype)
    room[64:-64] = x.flatten()
    return room[64:-64].view(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 2])
@pytest.mark.parametrize("name", ["offset", "heads of 40", "key bias", "row coefficients", "all of them"])
def test_memory_outside_of_a_call_is_not_read(tiny16, name, n):
    whole = TRITON.adapt(causal_call(**FEATURES[name]))
    call = whole.for_queries(torch.arange(whole.sizes[3])[-n:])
    floats = {x: getattr(call, x) for x in ("q", "k", "v", "key_bias", "row_coef", "logit_scale", "sinks")}
    inside = replace(call, **{x: guarded(value) for x, value in floats.items() if value is not None})
    requests = requests_of(call)
    one, other = TRITON.attend(call, requests), TRITON.attend(inside, requests)
    assert equal(one.out, other.out)
    assert all(equal(a, b) for a, b in zip(one.values, other.values, strict=True))


@pytest.mark.parametrize("n", [24, 2])
def test_expanded_keys(tiny16, n):
    call = causal_call(b=3, h=4, g=2, n=n, before=5)
    shared = replace(call, k=call.k[:1].expand(3, -1, -1, -1), v=call.v[:1, :1].expand(3, 2, -1, -1))
    check(shared)


@pytest.mark.parametrize("layout", ["expanded", "other dtype", "transposed"])
def test_small_operands_may_have_any_layout(tiny16, layout):
    call = causal_call(
        live=padded(34, 3).expand(2, -1), row_live=padded(34, 3).expand(2, -1), sinks=torch.zeros(1).expand(2), **COEF
    )
    bias = noise(2, 34, 2).transpose(1, 2) if layout == "transposed" else noise(1, 1, 34).expand(2, 2, 34)
    bias = bias.to(torch.float16) if layout == "other dtype" else bias
    check(replace(call, key_bias=bias, key_group=torch.arange(34)[None] % 3, logit_scale=torch.rand(1).expand(2)))


@pytest.mark.parametrize("n", [20, 3])
def test_extremes(tiny16, n):
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(1, 2, n, 16, generator=rng)
    # whole numbers, whose sums are exact
    equal_keys = torch.arange(16.0).expand(1, 1, n, 16) % 5
    check(Call(q.round(), equal_keys, torch.randn(1, 1, n, 16, generator=rng), 0.25))
    # one-hot rows, where each query finds its own key
    eye = torch.nn.functional.one_hot(torch.arange(n), 32)[None, None].float() * 16
    found = check(Call(eye.expand(1, 2, -1, -1), eye, eye, 1.0, causal=False))
    assert (found.values[1] < 1e-6).all()
    assert (found.values[2][0][..., 0] == torch.arange(n)).all()
    # logits of +-1e4, which float32 resolves to 1e-3
    big = torch.where(torch.randn(1, 2, n, 16, generator=rng) > 0, 25.0, -25.0)
    check(Call(big, big[:, :1].clone(), big[:, :1].clone(), 1.0), atol=4e-3)
