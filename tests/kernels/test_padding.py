"""Values that the tensors of a call hold on padding reach no result of the torch engines."""

from dataclasses import replace

import pytest
import torch
from attention_calls import causal_call, every_request

from interp.kernels import chunked, naive
from interp.kernels.contract import Call, Rows
from interp.kernels.moments import far_bulk
from interp.kernels.streaming import stream

LIVE = torch.arange(34)[None] >= torch.tensor([[0], [9]])
SEEN = (torch.arange(34)[None] <= torch.arange(34)[:, None]) & LIVE[:, None, None]
PADDED = {
    "left padding": {"live": LIVE, "row_live": LIVE},
    "right padding": {"live": LIVE.flip(1), "row_live": LIVE.flip(1)},
    "a window": {"live": LIVE, "row_live": LIVE, "window": 7},
    "a soft-cap": {"live": LIVE, "row_live": LIVE, "softcap": 3.0},
    "learned sinks": {"live": LIVE, "row_live": LIVE, "sinks": torch.tensor([0.3, -1.0])},
    "a bias": {"live": LIVE, "row_live": LIVE, "key_bias": torch.linspace(-1, 1, 34).expand(2, 2, -1)},
    "a mask of four axes": {"causal": False, "mask": SEEN},
    "a mask that differs by head": {"causal": False, "mask": torch.cat([SEEN & (torch.arange(34) != 12), SEEN], 1)},
    "an added mask": {
        "causal": False,
        "mask": torch.zeros(SEEN.shape, dtype=torch.float64).masked_fill(~SEEN, torch.finfo(torch.float64).min),
    },
}


def filled(call: Call, value: float) -> Call:
    """The call with a value in everything that belongs to padding."""
    dead = ~call.live if call.live is not None else ~LIVE
    k, v = (x.masked_fill(dead[:, None, :, None], value) for x in (call.k, call.v))
    q = call.q if call.row_live is None else call.q.masked_fill(~call.row_live[:, None, :, None], value)
    return replace(call, q=q, k=k, v=v)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("engine", [naive.attend, chunked.attend], ids=["naive", "chunked"])
def test_padding_that_is_not_finite_changes_no_result(engine, name, value):
    call = causal_call(**PADDED[name])
    requests = every_request(call, 34, torch.Generator().manual_seed(0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            clean, given = engine(filled(call, 0.0), requests), engine(filled(call, value), requests)
            alone = engine(filled(call, value)).written
    assert torch.equal(clean.written, given.written)
    torch.testing.assert_close(alone, clean.written, atol=1e-9, rtol=0)
    for one, other in zip(clean.values, given.values, strict=True):
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
            assert a == b if isinstance(a, int) else torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["left padding", "a window", "a mask of four axes"])
def test_streaming_and_moments_leave_padding_out(name, value):
    call = causal_call(**PADDED[name])
    for one, other in zip(stream(filled(call, 0.0), 2, 5), stream(filled(call, value), 2, 5), strict=True):
        assert torch.equal(one, other)
    if call.mask is None:
        first = (~LIVE).sum(1)
        clean, given = (far_bulk(filled(call, x), first, 2, 5, 4, 3) for x in (0.0, value))
        live = LIVE[:, None].expand_as(clean[0])
        for one, other in zip(clean, given, strict=True):
            assert torch.equal(one.expand_as(live)[live], other.expand_as(live)[live])


@pytest.mark.parametrize("engine", [naive.attend, chunked.attend], ids=["naive", "chunked"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_in_a_real_row_stays_nan(engine, where):
    call = causal_call(**PADDED["left padding"])
    x = getattr(call, where).clone()
    x[:, :, 20] = torch.nan
    result = engine(replace(call, **{where: x}), (Rows(torch.arange(34)),))
    assert bool(result.written[:, :, 20].isnan().all())
    if where != "v":
        assert bool(result.values[0][:, :, 20].isnan().any(-1).all())
    if where == "q":
        assert not bool(result.written[:, :, 21:].isnan().any())
