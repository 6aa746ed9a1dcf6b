"""Every engine against naive in float64, and what must hold of any attention."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import draw

from interp.kernels import chunked, naive
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Rows, TopKeys
from interp.kernels.errors import UsageError
from interp.kernels.select import ENGINES, select

OTHERS = [name for name in ENGINES if name != "naive"]


def close(one: Any, other: Any, atol: float, what: str) -> None:
    if isinstance(one, tuple):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, atol, f"{what}[{i}]")
    elif isinstance(one, int):
        assert one == other, what
    else:
        assert one.shape == other.shape, what
        assert not other.isnan().any(), f"{what} has nan"
        torch.testing.assert_close(other.double(), one.double(), atol=atol, rtol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("seed", range(60))
def test_engine_equals_naive(engine, seed):
    call, requests, queries = draw(seed)
    judge = naive.attend(call, requests, queries)
    # a block of one row, of a few, and of everything
    sizes: list[dict[str, int]] = [{"block": size} for size in (1, 1000, 1 << 20)] if engine == "chunked" else [{}]
    size = sizes[seed % len(sizes)]
    # without gradients memory is used again and masses ride on the product with v
    with torch.set_grad_enabled(bool(seed % 2)):
        found = ENGINES[engine](call, requests, queries, **size)
    close(judge.out, found.out, 1e-9, "out")
    for request, one, other in zip(requests, judge.values, found.values, strict=True):
        close(one, other, 1e-9, repr(request)[:40])


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near_float64(engine, dtype, atol):
    call, _, _ = draw(1, dtype)
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    requests = (Lse(), Mass(torch.ones(call.sizes[0], 1, call.sizes[4])))
    judge, found = naive.attend(exact, requests), ENGINES[engine](call, requests)
    assert found.out is not None
    assert found.out.dtype == dtype
    assert found.values[0].dtype == torch.float32
    close(judge.out, found.out, atol, "out")
    close(judge.values[1], found.values[1], 2e-5, "mass")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_dead_rows_are_zero_not_nan(engine):
    q = torch.randn(1, 2, 4, 8)
    live = torch.tensor([[False, False, True, True]])
    call = Call(q, q, q, 1.0, live=live, row_live=live, sinks=torch.zeros(2))
    requests = (Lse(), TopKeys(2), Mass(torch.ones(1, 1, 4)), Entropy(), Rows(torch.arange(4), logits=True))
    result = ENGINES[engine](call, requests)
    lse, (keys, probs), mass, entropy, logits = result.values
    assert result.out is not None
    assert (result.out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert (keys[:, :, :2] == -1).all()
    assert (probs[:, :, :2] == 0).all()
    assert (mass[:, :, :2] == 0).all()
    assert (entropy[:, :, :2] == 0).all()
    assert (logits[:, :, :2] == -torch.inf).all()
    assert (keys[:, :, 2] == torch.tensor([2, -1])).all()


@pytest.mark.parametrize("engine", list(ENGINES))
def test_conservation(engine):
    call = replace(draw(0)[0], sinks=None)
    b, _, _, n, m = call.sizes
    halves = torch.zeros(b, 2, m)
    halves[:, 0, ::2] = 1
    halves[:, 1, 1::2] = 1
    first = torch.zeros(b, dtype=torch.int64)
    requests = (Mass(halves), Columns(), Entropy(), Lse(), Blocks(8, first), Rows(torch.arange(n), logits=True))
    mass, (received, _), entropy, lse, (_, sums, rows), logits = ENGINES[engine](call, requests).values
    live = call.visible().any(-1).expand(b, call.sizes[1], n)
    torch.testing.assert_close(mass.sum(-1), live.double())
    torch.testing.assert_close(received.sum(-1), live.double().sum(-1))
    torch.testing.assert_close(sums.sum((2, 3)), live.double().sum(-1))
    torch.testing.assert_close(rows.sum(1), live.double()[:, 0].sum(-1))
    assert (entropy >= -1e-12).all()
    assert (entropy <= call.visible().sum(-1).clamp(min=1).log() + 1e-9).all()
    assert (lse >= logits.amax(-1) - 1e-9).all()


@pytest.mark.parametrize("engine", list(ENGINES))
def test_ties_go_to_the_lowest_column(engine):
    k = torch.zeros(1, 1, 200, 4, dtype=torch.float64)
    # equal keys in several tiles, and one better key that ties with its copy far away
    k[:, :, [70, 150]] = 1.0
    q = torch.ones(1, 1, 200, 4, dtype=torch.float64)
    keys, _ = ENGINES[engine](Call(q, k, k, 1.0), (TopKeys(3),)).values[0]
    assert keys[0, 0, 60].tolist() == [0, 1, 2]
    assert keys[0, 0, 100].tolist() == [70, 0, 1]
    assert keys[0, 0, 199].tolist() == [70, 150, 0]
    one = ENGINES[engine](Call(q, k, k, 1.0), (TopKeys(1),)).values[0][0]
    assert one[0, 0, [60, 100, 199], 0].tolist() == [0, 70, 70]


@pytest.mark.parametrize("engine", list(ENGINES))
def test_key_bias_of_log_c_is_a_key_repeated_c_times(engine):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 8, generator=rng, dtype=torch.float64) for n in (5, 6, 6))
    bias = torch.zeros(1, 1, 6, dtype=torch.float64)
    bias[..., 2] = torch.tensor(3.0).log()
    biased = ENGINES[engine](Call(q, k, v, 1.0, causal=False, key_bias=bias)).out
    again = [0, 1, 2, 2, 2, 3, 4, 5]
    repeated = ENGINES[engine](Call(q, k[:, :, again], v[:, :, again], 1.0, causal=False)).out
    torch.testing.assert_close(biased, repeated)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_zero_logit_scale_is_uniform(engine):
    call = replace(draw(3)[0], window=None, sinks=None, key_bias=None, row_coef=None, mask=None, softcap=None)
    heads = call.sizes[1]
    uniform = replace(call, logit_scale=torch.zeros(heads))
    pattern = ENGINES[engine](uniform, (Rows(torch.arange(call.sizes[3])),)).values[0]
    seen = call.visible().expand_as(pattern).double()
    torch.testing.assert_close(pattern, seen / seen.sum(-1, keepdim=True).clamp(min=1))


@pytest.mark.parametrize("engine", list(ENGINES))
def test_extreme_logits(engine):
    q = torch.full((1, 1, 3, 4), 1e4)
    k = torch.tensor([1.0, -1.0, 1.0])[None, None, :, None].expand(1, 1, 3, 4).contiguous()
    lse, entropy, at = ENGINES[engine](Call(q, k, k, 1.0), (Lse(), Entropy(), At(torch.zeros(1, 3, 1).long()))).values
    assert lse.isfinite().all()
    assert entropy.isfinite().all()
    # exp(logit - lse) knows a logit of 4e4 to 4e-3 in float32
    torch.testing.assert_close(at[0, 0, :, 0], torch.tensor([1.0, 1.0, 0.5]), atol=2e-3, rtol=0)


def test_gradients_flow_through_chunked():
    call, _, _ = draw(5)
    q = call.q.clone().requires_grad_()
    for engine in ENGINES.values():
        result = engine(replace(call, q=q))
        result.written.square().sum().backward()
    assert q.grad is not None
    twice = q.grad.clone()
    q.grad = None
    naive.attend(replace(call, q=q)).written.square().sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(twice, 2 * q.grad)


def test_heads_of_a_call_are_the_heads_of_the_whole():
    call, _, _ = draw(7)
    heads = torch.tensor([call.sizes[1] - 1, 0])
    whole = chunked.attend(call).written
    torch.testing.assert_close(chunked.attend(call.for_heads(heads)).out, whole[:, heads])


def test_bit_equal_between_runs():
    call, requests, queries = draw(9, torch.float32)
    first = chunked.attend(call, requests, queries)
    for _ in range(3):
        again = chunked.attend(call, requests, queries)
        assert torch.equal(first.written, again.written)
        assert torch.equal(first.values[0], again.values[0])


def test_select_says_why_and_can_be_forced():
    call, _, _ = draw(0)
    assert "memory" in str(select(call))
    assert select(call, force="naive").name == "naive"
    with pytest.raises(UsageError, match="engine 'fast' does not exist: take one of"):
        select(call, force="fast")


def test_shapes_that_do_not_fit():
    q = torch.zeros(1, 3, 2, 4)
    with pytest.raises(UsageError, match="do not fit together"):
        Call(q, q[:, :2], q[:, :2], 1.0)
