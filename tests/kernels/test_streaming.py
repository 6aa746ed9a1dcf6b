"""Streaming attention and its complement against the n x n mask, in float64, including gradients."""

from dataclasses import replace

import attention_calls
import pytest
import torch

from interp.errors import UsageError
from interp.kernels import chunked, naive, streaming
from interp.kernels.contract import Lse
from interp.kernels.select import select

SIZES = [(0, 1), (1, 3), (4, 8), (3, 40), (16, 64), (200, 500)]


def first_of(call):
    if call.live is None:
        return torch.full((call.q.shape[0],), call.k_start)
    return call.live.to(torch.int8).argmax(1) + call.k_start


def near(call, sink, recent):
    """Return the mask that defines streaming, Bool [b 1 q k]: the first keys of a prompt and the last of a query."""
    row = call.rows[None, None, :, None]
    column = torch.arange(call.k_start, call.k_start + call.k.shape[2])[None, None, None]
    distance = row - column
    return (distance >= 0) & ((column - first_of(call)[:, None, None, None] < sink) | (distance < recent))


def masked(call, seen):
    """Return the call with `seen` combined with its own mask."""
    if call.mask is None:
        return replace(call, mask=seen)
    if call.mask.dtype == torch.bool:
        return replace(call, mask=seen & call.mask)
    return replace(call, mask=call.mask.masked_fill(~seen, torch.finfo(call.mask.dtype).min))


def drawn(seed):
    call, _, _ = attention_calls.draw(seed)
    # edits are not supported
    return replace(call, key_bias=None, row_coef=None, key_group=None, logit_scale=None)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_mask_that_defines_it(seed):
    call = drawn(seed)
    sink, recent = SIZES[seed % len(SIZES)]
    out, lse = streaming.stream(call, sink, recent)
    wanted = masked(call, near(call, sink, recent))
    expected = naive.attend(wanted, (Lse(),))
    torch.testing.assert_close(out, expected.out, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(lse, expected.values[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_stream_and_beyond_add_up_to_the_whole(seed):
    call = drawn(seed)
    sink, recent = SIZES[seed % len(SIZES)]
    _, lse = streaming.stream(call, sink, recent)
    rest = streaming.beyond(call, sink, recent)
    (bulk,) = chunked.attend(rest, (Lse(),), out=False).values
    (whole,) = naive.attend(call, (Lse(),)).values
    # a row that sees a learned sink but no near key counts as dead in `stream`
    sees = lse > -torch.inf
    if call.sinks is None:
        sees = torch.ones_like(sees)
    torch.testing.assert_close(torch.logaddexp(lse, bulk)[sees], whole[sees], atol=1e-12, rtol=1e-10)
    expected = masked(replace(call, sinks=None), ~near(call, sink, recent))
    torch.testing.assert_close(bulk, naive.attend(expected, (Lse(),)).values[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"h": 8, "g": 2},
        {"softcap": 3.0},
        {"sinks": torch.tensor([0.5, -1.0], dtype=torch.float64)},
        {"window": 9},
        {"before": 30},
        {"live": torch.arange(70)[None] >= torch.tensor([[0], [37]])},
        {"n": 1, "before": 69},
    ],
    ids=str,
)
@pytest.mark.parametrize(("sink", "recent"), [(0, 5), (4, 6), (3, 33)])
def test_gradients_equal_those_of_the_mask(settings, sink, recent):
    call = attention_calls.causal_call(**{"n": 70} | settings)
    if call.live is not None:
        call = replace(call, row_live=call.live)
    weigh = torch.randn(*call.q.shape[:3], call.v.shape[-1], dtype=torch.float64)
    found = []

    def plain(c):
        result = naive.attend(masked(c, near(c, sink, recent)), (Lse(),))
        return result.written, result.values[0]

    for way in (lambda c: streaming.stream(c, sink, recent), plain):
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
        out, lse = way(replace(call, q=leaves[0], k=leaves[1], v=leaves[2]))
        loss = (out * weigh).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
        found.append(torch.autograd.grad(loss, leaves))
    for mine, theirs in zip(*found, strict=True):
        # in the reference, a masked row that sees no key has a gradient of NaN
        torch.testing.assert_close(mine, theirs.nan_to_num(0.0), atol=1e-11, rtol=1e-9)
        assert mine.isfinite().all()


@pytest.mark.parametrize("seed", range(20))
def test_splitting_into_runs_changes_nothing(seed, monkeypatch):
    call = drawn(seed)
    sink, recent = SIZES[seed % 4]
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    call = replace(call, q=leaves[0], k=leaves[1], v=leaves[2])
    found = []
    for limit in (streaming.MAX_LOGITS, 1):
        monkeypatch.setattr(streaming, "MAX_LOGITS", limit)
        out, lse = streaming.stream(call, sink, recent)
        found.append((out, lse, *torch.autograd.grad(out.sin().sum(), leaves)))
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", ["chunked", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("settings", [{}, {"h": 4, "g": 2}, {"window": 20}, {"softcap": 3.0}, {"before": 20}], ids=str)
def test_beyond_runs_on_every_engine(name, settings):
    call = attention_calls.in_dtype(attention_calls.causal_call(n=44, **settings), torch.float32)
    rest = streaming.beyond(call, 3, 8)
    (found,) = select(rest, (Lse(),), force=name).engine(rest, (Lse(),), out=False).values
    (expected,) = naive.attend(rest, (Lse(),)).values
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[:, :, :8] == -torch.inf).all() or settings


def test_low_precision_keeps_its_dtype_and_float32_statistics():
    call = attention_calls.in_dtype(attention_calls.causal_call(h=4, g=2, n=50), torch.bfloat16)
    out, lse = streaming.stream(call, 2, 8)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wanted = naive.attend(masked(call, near(call, 2, 8)), (Lse(),))
    torch.testing.assert_close(out, wanted.out, atol=1e-2, rtol=1e-2)


def test_memory_grows_with_the_length_only():
    """The largest tensor has a few times n (sink + recent) elements, far fewer than n^2."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
            return out

    n, h = 4096, 2
    call = attention_calls.causal_call(b=1, h=h, g=1, n=n, d=4)
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    with Largest() as seen:
        out, _ = streaming.stream(call, 4, 32)
        torch.autograd.grad(out.sum(), leaves)
    assert seen.size <= h * n * (4 + 2 * 32 + 32)
    assert seen.size < n * n / 8


def test_no_rows_and_no_keys():
    call = attention_calls.causal_call(n=0, before=5)
    out, lse = streaming.stream(call, 1, 4)
    assert out.shape == (2, 2, 0, 32)
    assert lse.shape == (2, 2, 0)


def test_invalid_arguments():
    call = attention_calls.causal_call()
    with pytest.raises(UsageError, match="sink=-1 and recent=4 are not valid; pass sink >= 0 and recent >= 1"):
        streaming.stream(call, -1, 4)
    with pytest.raises(UsageError, match="sink=4 and recent=0"):
        streaming.beyond(call, 4, 0)
    with pytest.raises(UsageError, match="does not support edits or chosen rows; pass an unmodified call"):
        streaming.stream(replace(call, key_bias=torch.zeros(2, 2, 34)), 1, 4)
