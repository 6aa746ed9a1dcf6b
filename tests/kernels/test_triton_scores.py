"""Scores by Triton: key sets, blocks, top keys, ties, and identities between different ways to the same number."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import causal_call
from engines import ENGINES_BY_NAME

from interp.errors import UsageError
from interp.kernels import naive
from interp.kernels.contract import Blocks, Call, Columns, Lse, Mass, Request, Rows, TopKeys
from interp.kernels.gpu.columns import columns
from interp.kernels.gpu.few_rows import attend_few_rows
from interp.kernels.gpu.forward import MAX_SETS_PER_PASS, forward
from interp.kernels.gpu.gather import at, winners

pytestmark = pytest.mark.interpreter
TRITON = ENGINES_BY_NAME["triton"]


def live(m: int, *left: int) -> dict[str, Any]:
    """Return left padding of keys and of the same number of queries."""
    real = torch.arange(m)[None] >= torch.tensor(left)[:, None]
    return {"live": real, "row_live": real}


def check(call: Call, *requests: Request, queries: torch.Tensor | None = None) -> tuple[Any, ...]:
    """Assert that the values of the requests equal those of the reference, and return them."""
    given = TRITON.adapt(call)
    exact = replace(given, q=given.q.double(), k=given.k.double(), v=given.v.double())
    judge, found = naive.attend(exact, requests, queries, out=False), TRITON.attend(given, requests, queries, out=False)
    for request, one, other in zip(requests, judge.values, found.values, strict=True):
        TRITON.assert_close(one, other, repr(request)[:40])
    return found.values


def ranges(b: int, m: int, *borders: tuple[int, int], soft: bool = False) -> torch.Tensor:
    """Return Float [b s k] with one set per range, shifted by one key for each prompt."""
    sets = torch.zeros(b, len(borders), m)
    for i in range(b):
        for s, (start, stop) in enumerate(borders):
            sets[i, s, start + i : stop + i] = 0.5 + s / 8 if soft else 1.0
    return sets


SPANS = (0, 1), (3, 9), (5, 30), (16, 32), (0, 34), (33, 34), (20, 20)
SETS = {
    "spans": ranges(2, 34, *SPANS),
    "soft spans": ranges(2, 34, *SPANS, soft=True),
    "scattered": (torch.rand(2, 5, 34, generator=torch.Generator().manual_seed(0)) < 0.4).float(),
    "soft": torch.rand(2, 17, 34, generator=torch.Generator().manual_seed(0)),
    "one": torch.ones(2, 1, 34),
    "more than one pass holds": torch.rand(2, 70, 34, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", SETS)
def test_masses(tiny, name):
    sets = SETS[name]
    spans = "spans" in name
    check(causal_call(), Mass(sets, spans=spans), Lse())
    check(causal_call(**live(34, 0, 11), window=20, sinks=torch.zeros(2)), Mass(sets, spans=spans), TopKeys(1))


def test_masses_of_several_requests(tiny16):
    call = causal_call(**live(34, 0, 11))
    one, other, soft = SETS["spans"], SETS["scattered"], SETS["soft"]
    wide = torch.rand(2, 60, 34)
    check(call, Mass(one), Mass(wide), Mass(other, by_value=True), Mass(soft), Mass(one, by_value=True))
    check(call, Mass(wide, by_value=True), Mass(wide), queries=torch.arange(0, 34, 2))


def test_a_partition_adds_up_in_any_order(tiny16):
    call = TRITON.adapt(causal_call())
    sets = torch.nn.functional.one_hot(torch.arange(34) % 5).T[None].float().expand(2, -1, -1)
    order = torch.tensor([3, 1, 4, 0, 2])
    (mass,) = TRITON.attend(call, (Mass(sets),), out=False).values
    (moved,) = TRITON.attend(call, (Mass(sets[:, order]),), out=False).values
    TRITON.assert_close(torch.ones(2, 2, 34), mass.sum(-1), "sum")
    assert torch.equal(mass[..., order], moved)


BLOCKS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "plain": ({}, (0, 0)),
    "left padding": (live(34, 0, 11), (0, 11)),
    "padding of more than a block": (live(75, 3, 40) | {"n": 75, "h": 1}, (3, 40)),
    "chunk of a prefill": ({"before": 25}, (0, 3)),
    "cache without its oldest keys": ({"before": 21, "q_start": 30, "k_start": 9}, (9, 4)),
    "window": ({"window": 9} | live(34, 0, 5), (0, 5)),
    "full, learned sinks": ({"causal": False, "sinks": torch.zeros(2)}, (0, 7)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(tiny, name):
    settings, first = BLOCKS[name]
    check(causal_call(**settings), *(Blocks(size, torch.tensor(first)) for size in (16, 32, 48, 64, 96, 100)))


def test_blocks_together_with_other_requests(tiny16):
    call = causal_call(**live(34, 0, 11))
    first = torch.tensor([0, 11])
    check(
        call, Blocks(16, first), Mass(SETS["soft"]), TopKeys(1), Columns(), Blocks(32, first), Rows(torch.tensor([5]))
    )


@pytest.mark.parametrize(
    "name", ["padding and window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("causal", "bias"))]
)
def test_top_keys(tiny16, name):
    bias = torch.zeros(2, 2, 34).masked_fill(torch.arange(34) % 2 == 0, -torch.inf)
    settings: dict[str, dict[str, Any]] = {
        "causal": {},
        "padding and window": live(34, 0, 11) | {"window": 3},
        "bias": {"key_bias": bias},
    }
    # more keys than a row sees, and more keys than exist
    check(causal_call(**settings[name]), TopKeys(1), TopKeys(4), TopKeys(40))


def test_ties_across_tiles(tiny16):
    # whole numbers, whose sums are exact
    k = torch.zeros(1, 1, 40, 16)
    k[:, :, [7, 20, 35]] = 1.0
    call = Call(torch.ones(1, 2, 40, 16), k, k, 1.0)
    best, most = check(call, TopKeys(1), TopKeys(4))
    assert best[0][0, 0, [5, 10, 25, 39], 0].tolist() == [0, 7, 7, 7]
    assert most[0][0, 1, 39].tolist() == [7, 20, 35, 0]
    turned, _ = check(replace(call, q=-call.q), TopKeys(1), Lse())
    assert (turned[0] == 0).all()


def test_columns_of_another_engines_lse(tiny16):
    call = TRITON.adapt(causal_call(**live(34, 0, 11), window=20, sinks=torch.zeros(2)))
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    lse, (received, seen) = naive.attend(exact, (Lse(), Columns()), out=False).values
    for dead in (-torch.inf, torch.inf):
        found = columns(call, lse.masked_fill(~lse.isfinite(), dead))
        TRITON.assert_close((received, seen), found, "columns")
    most, _ = naive.attend(exact, (Columns("max"),), out=False).values[0]
    TRITON.assert_close(most, columns(call, lse, "max")[0], "max")


@pytest.mark.parametrize("causal", [False, True])
def test_column_sums_are_the_lse_of_the_call_turned_round(tiny16, causal):
    call = TRITON.adapt(causal_call(g=2, causal=causal))
    lse, (received, _) = TRITON.attend(call, (Lse(), Columns()), out=False).values
    turned = Call(call.k, call.q, call.q, call.scale, causal=False, key_bias=-lse)
    if causal:
        sees = torch.ones(34, 34, dtype=torch.bool).triu()[None, None]
        log = naive.attend(replace(turned, mask=sees), (Lse(),), out=False).values[0]
    else:
        log = TRITON.attend(turned, (Lse(),), out=False).values[0]
    TRITON.assert_close(log.exp(), received, "columns", 5e-5)


DECODES: list[dict[str, Any]] = [{}, {"before": 60, "sinks": torch.zeros(2)}, live(34, 0, 11)]


@pytest.mark.parametrize("settings", DECODES)
def test_decode_rows_are_rows_of_the_pass(tiny16, settings):
    call = TRITON.adapt(causal_call(**settings))
    whole = forward(call)
    last = call.for_queries(torch.tensor([20, 33]))
    out, lse, pattern = attend_few_rows(last)
    TRITON.assert_close(whole.out[:, :, [20, 33]] if whole.out is not None else None, out, "out")
    TRITON.assert_close(whole.lse[:, :, [20, 33]], lse, "lse")
    assert pattern is not None
    # with any split of the keys
    for n_keys in (16, 32, 48, 64):
        for one, other in zip(attend_few_rows(last, keys_per_program=n_keys), (out, lse, pattern), strict=True):
            TRITON.assert_close(other, one, f"{n_keys} keys per program")


def test_many_programs_per_row(tiny16):
    call = TRITON.adapt(causal_call(1, 4, 2, 1, 1100, 16))
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    judge = naive.attend(exact, (Lse(), Rows(torch.tensor([0]))))
    out, lse, pattern = attend_few_rows(call, keys_per_program=16)
    TRITON.assert_close((judge.out, *judge.values), (out, lse, pattern), "rows")
    logits = attend_few_rows(call, out=False, scores="logits")[2]
    assert logits is not None
    TRITON.assert_close(naive.logits(exact), logits, "logits")


def test_single_keys_from_a_log_sum_exp(tiny16):
    call = TRITON.adapt(causal_call(before=9, softcap=3.0))
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    found = forward(call, top=True)
    assert found.tile is not None
    best, pattern = naive.logits(exact).argmax(-1), naive.pattern(exact)
    assert torch.equal(winners(call, found.tile, found.tiling).long(), best)
    listed, weight = torch.tensor([[[0, 5, 42, -1]]]).expand(2, 34, 4), torch.rand(2, 1, 43)
    expected = pattern[..., [0, 5, 42, 0]] * weight[:, :, None, [0, 5, 42, 0]]
    expected[..., 3] = 0
    TRITON.assert_close(expected, at(call, found.lse, listed, weight), "at")


def test_heads_and_constants_change_nothing(tiny16):
    call = causal_call(h=4, g=2)
    requests = (Lse(), TopKeys(1), Columns())
    whole = TRITON.attend(TRITON.adapt(call), requests)
    order = torch.tensor([2, 0, 3, 1])
    moved = TRITON.attend(TRITON.adapt(call.for_heads(order)), requests)
    assert whole.out is not None
    assert moved.out is not None
    assert torch.equal(whole.out[:, order], moved.out)
    assert torch.equal(whole.values[0][:, order], moved.values[0])
    # the same number added to every logit of a row
    shifted = TRITON.attend(TRITON.adapt(replace(call, key_bias=torch.full((1, 4, 34), 7.0))), requests)
    TRITON.assert_close(whole.out, shifted.out, "out")
    TRITON.assert_close(whole.values[0] + 7.0, shifted.values[0], "lse")
    TRITON.assert_close(whole.values[1:], shifted.values[1:], "top and columns")


def test_a_key_repeated_is_its_bias(tiny16):
    call = TRITON.adapt(causal_call(causal=False))
    again = torch.cat([torch.arange(34), torch.tensor([11, 11])])
    bias = torch.zeros(1, 2, 34)
    bias[..., 11] = torch.tensor(3.0).log()
    biased = TRITON.attend(replace(call, key_bias=bias), (Lse(),))
    repeated = TRITON.attend(replace(call, k=call.k[:, :, again], v=call.v[:, :, again]), (Lse(),))
    TRITON.assert_close((repeated.out, *repeated.values), (biased.out, *biased.values), "repeated")


def test_number_of_sets_of_one_pass_is_limited():
    call = TRITON.adapt(causal_call())
    message = f"{MAX_SETS_PER_PASS + 1} key sets exceed the limit of {MAX_SETS_PER_PASS} for one pass; split them"
    with pytest.raises(UsageError, match=message):
        forward(call, sets=torch.zeros(2, 1, 34, MAX_SETS_PER_PASS + 1))
