"""Every engine against the reference in float64, and properties of any attention."""

import math
from dataclasses import replace

import pytest
import torch
from attention_calls import causal_call, draw
from engines import ENGINES, ENGINES_BY_NAME, EngineUnderTest, engine_params

from interp.kernels import chunked, naive
from interp.kernels.contract import MAX_BIAS, At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, Rows, TopKeys
from interp.kernels.folding import fold_biases
from interp.kernels.select import ENGINE_NAMES


def agree(engine: EngineUnderTest, call: Call, requests: tuple[Request, ...], queries=None, **more) -> None:
    """Assert that the engine gives the results of the reference in float64."""
    given = engine.adapt(call)
    exact = replace(given, q=call.q.double(), k=call.k.double(), v=call.v.double())
    judge, found = naive.attend(exact, requests, queries), engine.attend(given, requests, queries, **more)
    engine.assert_close(judge.out, found.out, "out")
    for request, one, other in zip(requests, judge.values, found.values, strict=True):
        engine.assert_close(one, other, repr(request)[:40])


def test_every_engine_is_tested():
    assert set(ENGINES_BY_NAME) <= set(ENGINE_NAMES)


@pytest.mark.parametrize("engine", engine_params("naive", "triton"))
@pytest.mark.parametrize("seed", range(60))
def test_engine_equals_naive(engine, seed):
    call, requests, queries = draw(seed)
    # a block of one row, of a few rows, and of all rows
    size = (1, 1000, 1 << 20)[seed % 3]
    # without gradients, memory is reused and masses come from the product with v
    with torch.set_grad_enabled(bool(seed % 2)):
        agree(engine, call, requests, queries, block=size)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(16))
def test_triton_equals_naive(tiny16, seed):
    call, requests, queries = draw(seed, small=True)
    agree(
        ENGINES_BY_NAME["triton"], call, (*requests, Blocks(16, torch.zeros(call.sizes[0], dtype=torch.int64))), queries
    )


@pytest.mark.parametrize("engine", engine_params("naive"))
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near_float64(engine, dtype, atol):
    call, _, _ = draw(1, dtype)
    call = call if engine.torch_only else replace(call, mask=None)
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    requests = (Lse(), Mass(torch.ones(call.sizes[0], 1, call.sizes[4])))
    judge, found = naive.attend(exact, requests), engine.attend(call, requests)
    assert found.out is not None
    assert found.out.dtype == dtype
    assert found.values[0].dtype == torch.float32
    engine.assert_close(judge.out, found.out, "out", atol)
    engine.assert_close(judge.values[1], found.values[1], "mass", 2e-5)


@pytest.mark.parametrize("engine", engine_params())
def test_dead_rows_are_zero_not_nan(engine):
    q = torch.randn(1, 2, 4, 8)
    live = torch.tensor([[False, False, True, True]])
    call = Call(q, q, q, 1.0, live=live, row_live=live, sinks=torch.zeros(2))
    requests = (Lse(), TopKeys(2), Mass(torch.ones(1, 1, 4)), Entropy(), Rows(torch.arange(4), logits=True))
    result = engine.attend(engine.adapt(call), requests)
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


@pytest.mark.parametrize("engine", engine_params())
def test_conservation(engine, tiny16):
    call = engine.adapt(
        causal_call(2, 2, 1, 44, 5, 16, window=20, live=torch.arange(49)[None] >= torch.tensor([[0], [9]]))
    )
    b, _, _, n, m = call.sizes
    halves = torch.zeros(b, 2, m)
    halves[:, 0, ::2] = 1
    halves[:, 1, 1::2] = 1
    first = torch.tensor([0, 9])
    requests = (Mass(halves), Columns(), Entropy(), Lse(), Blocks(16, first), Rows(torch.arange(n), logits=True))
    mass, (received, _), entropy, lse, (_, sums, live_rows), logits = engine.attend(call, requests).values
    live = call.visible().any(-1).expand(b, call.sizes[1], n).double()
    assert 0 < live.mean() < 1
    engine.assert_close(live, mass.sum(-1), "mass of a partition")
    engine.assert_close(live.sum(-1), received.sum(-1), "column sums")
    engine.assert_close(live.sum(-1), sums.sum((2, 3)), "blocks")
    engine.assert_close(live[:, 0].sum(-1), live_rows.sum(1), "live rows of blocks")
    # the blocks of the second prompt start at its first token
    by_key = torch.nn.functional.pad(received[1, :, 9:], (0, 8)).unflatten(-1, (3, 16)).sum(-1)
    engine.assert_close(by_key.double(), sums[1, :, :, :3].sum(1), "columns of blocks")
    assert (entropy >= -1e-12).all()
    assert (entropy <= call.visible().sum(-1).clamp(min=1).log() + engine.atol).all()
    assert (lse >= logits.amax(-1) - engine.atol).all()


@pytest.mark.parametrize("engine", engine_params())
def test_ties_go_to_the_lowest_column(engine):
    k = torch.zeros(1, 1, 200, 4)
    # equal keys in several tiles, and a better key that ties with a distant copy
    k[:, :, [70, 150]] = 1.0
    call = engine.adapt(Call(torch.ones(1, 1, 200, 4), k, k, 1.0))
    keys, _ = engine.attend(call, (TopKeys(3),)).values[0]
    assert keys[0, 0, 60].tolist() == [0, 1, 2]
    assert keys[0, 0, 100].tolist() == [70, 0, 1]
    assert keys[0, 0, 199].tolist() == [70, 150, 0]
    one = engine.attend(call, (TopKeys(1),)).values[0][0]
    assert one[0, 0, [60, 100, 199], 0].tolist() == [0, 70, 70]


@pytest.mark.parametrize("engine", engine_params())
def test_key_bias_of_log_c_is_a_key_repeated_c_times(engine):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 8, generator=rng, dtype=engine.dtype) for n in (5, 6, 6))
    bias = torch.zeros(1, 1, 6, dtype=torch.float64)
    bias[..., 2] = math.log(3)
    biased = engine.attend(Call(q, k, v, 1.0, causal=False, key_bias=bias)).out
    again = [0, 1, 2, 2, 2, 3, 4, 5]
    repeated = engine.attend(Call(q, k[:, :, again], v[:, :, again], 1.0, causal=False)).out
    engine.assert_close(repeated, biased, "repeated")


@pytest.mark.parametrize("engine", engine_params())
@pytest.mark.parametrize("where", ["key", "coef"])
def test_bias_of_inf_takes_the_whole_row(engine, where):
    call = causal_call(1, 2, 1, 24)
    if where == "key":
        bias = torch.zeros(1, 2, 24)
        bias[:, :, 5] = torch.inf
        call = replace(call, key_bias=bias)
    else:
        coef = torch.zeros(1, 2, 24, 1)
        coef[:, :, 8:] = torch.inf
        call = replace(call, row_coef=coef, key_group=(torch.arange(24) == 5)[None].int())
    requests = (Lse(), Entropy(), TopKeys(1), Mass(torch.rand(1, 2, 24)), Columns(), Rows(torch.tensor([3, 20])))
    given = engine.adapt(call)
    result = engine.attend(given, requests)
    agree(engine, call, requests)
    assert (result.values[0][:, :, 8:] == torch.tensor(MAX_BIAS, dtype=result.values[0].dtype)).all()
    assert torch.equal(result.written[:, :, 8:], given.v[:, :, 5:6].expand_as(result.written[:, :, 8:]))
    assert (result.values[2][0][:, :, 8:] == 5).all()


@pytest.mark.parametrize("engine", engine_params())
def test_zero_logit_scale_is_uniform(engine):
    call = replace(draw(3)[0], window=None, sinks=None, key_bias=None, row_coef=None, mask=None, softcap=None)
    heads = call.sizes[1]
    uniform = engine.adapt(replace(call, logit_scale=torch.zeros(heads)))
    pattern = engine.attend(uniform, (Rows(torch.arange(call.sizes[3])),)).values[0]
    seen = call.visible().expand_as(pattern).double()
    engine.assert_close(seen / seen.sum(-1, keepdim=True).clamp(min=1), pattern, "pattern")


@pytest.mark.parametrize("engine", engine_params())
@pytest.mark.parametrize("n", [3, 20])
def test_extreme_logits(engine, n):
    q = torch.full((1, 1, n, 4), 1e4)
    k = torch.tensor([1.0, -1.0] * (n // 2) + [1.0] * (n % 2))[None, None, :, None].expand(1, 1, n, 4).contiguous()
    each = torch.zeros(1, n, 1, dtype=torch.int64)
    lse, entropy, at = engine.attend(Call(q, k, k, 1.0), (Lse(), Entropy(), At(each))).values
    assert lse.isfinite().all()
    assert entropy.isfinite().all()
    # in float32, exp(logit - lse) resolves a logit of 4e4 to 4e-3
    expected = 1.0 / torch.tensor([i // 2 + 1 for i in range(n)])
    torch.testing.assert_close(at[0, 0, :, 0].float(), expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("engine", engine_params())
@pytest.mark.parametrize("above", [0.0, 8.0, 60.0, 300.0, 1e4])
@pytest.mark.parametrize("window", [None, 7])
def test_entropy_does_not_depend_on_a_learned_sink(engine, above, window):
    # a sink far above leaves each key a weight that no float holds
    plain = engine.adapt(
        causal_call(2, 2, 1, 33, window=window, live=torch.arange(33)[None] >= torch.tensor([[0], [5]]))
    )
    top = float(naive.logits(plain).max())
    sinks = torch.tensor([top + above, top - 3.0])
    expected = naive.attend(plain, (Entropy(),)).values[0]
    assert expected.max() > 1
    engine.assert_close(expected, engine.attend(replace(plain, sinks=sinks), (Entropy(),)).values[0], "entropy")


def test_gradients_flow_through_plain_torch():
    call, _, _ = draw(5)
    q = call.q.clone().requires_grad_()
    carrying = [engine for engine in ENGINES if engine.torch_only]
    for engine in carrying:
        engine.attend(replace(call, q=q)).written.square().sum().backward()
    assert q.grad is not None
    twice = q.grad.clone()
    q.grad = None
    naive.attend(replace(call, q=q)).written.square().sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(twice, len(carrying) * q.grad)


@pytest.mark.parametrize("engine", engine_params("naive"))
def test_heads_of_a_call_are_the_heads_of_the_whole(engine):
    call = engine.adapt(causal_call(2, 4, 2, 20, 3))
    heads = torch.tensor([call.sizes[1] - 1, 0])
    whole = engine.attend(call).written
    engine.assert_close(whole[:, heads], engine.attend(call.for_heads(heads)).out, "heads")


def test_bit_equal_between_runs():
    call, requests, queries = draw(9, torch.float32)
    first = chunked.attend(call, requests, queries)
    for _ in range(3):
        again = chunked.attend(call, requests, queries)
        assert torch.equal(first.written, again.written)
        assert torch.equal(first.values[0], again.values[0])


BIASES = {
    "a bias of each head": {"key_bias": (4,), "row_coef": None},
    "one bias of all heads": {"key_bias": (1,), "row_coef": None},
    "groups that heads share": {"key_bias": None, "row_coef": 3},
    "groups of each head": {"key_bias": None, "row_coef": 2, "by_head": True},
    "both": {"key_bias": (4,), "row_coef": 2, "by_head": True},
}


@pytest.mark.parametrize(
    "limit", [{}, {"window": 9}, {"softcap": 3.0}, {"padded": True}, {"scaled": True}, {"hidden": True}]
)
@pytest.mark.parametrize("name", BIASES)
def test_biases_in_q_and_k_are_biases_on_logits(name, limit):
    kind, rng, (h, n) = BIASES[name], torch.Generator().manual_seed(3), (4, 40)
    call = causal_call(b=2, h=h, g=2, n=n, d=16)
    more = {key: value for key, value in limit.items() if key in ("window", "softcap")}
    if kind["key_bias"]:
        more["key_bias"] = torch.randn(2, *kind["key_bias"], n, generator=rng)
    if kind["row_coef"]:
        more["row_coef"] = torch.randn(2, h, n, kind["row_coef"], generator=rng)
        shape = (2, h, n) if kind.get("by_head") else (2, n)
        more["key_group"] = torch.randint(0, kind["row_coef"] + 1, shape, generator=rng)
    if "padded" in limit:
        more["live"] = more["row_live"] = torch.arange(n)[None] >= torch.tensor([[0], [11]])
    if "scaled" in limit:
        more["logit_scale"] = torch.rand(2, h, generator=rng)
    if "hidden" in limit:
        hidden = "key_bias" if kind["key_bias"] else "row_coef"
        more[hidden][:, :, 1::5] = -torch.inf
    call = replace(call, **more)
    folded = fold_biases(call)
    assert (folded.key_bias is None and folded.row_coef is None) == (limit not in ({"softcap": 3.0}, {"hidden": True}))
    chunks = ENGINES_BY_NAME["chunked"]
    for grad, block in ((False, 100), (False, 1 << 20), (True, 1 << 20)):
        with torch.set_grad_enabled(grad):
            agree(chunks, call, (), block=block)
            agree(chunks, call, (Lse(), Columns(), Mass(torch.rand(2, h, 2, n) < 0.5)), block=block)
