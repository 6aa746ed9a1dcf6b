"""The kernels on a GPU, with the tilings of the table, 16-bit inputs and long calls.

There are few variants, because each takes a second or two to compile.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import causal_call, in_dtype
from engines import ENGINES_BY_NAME

from interp.kernels import naive
from interp.kernels.contract import At, Blocks, Call, Columns, Entropy, Lse, Mass, Request, Rows, TopKeys
from interp.kernels.gpu import hopper
from interp.kernels.gpu.columns import columns
from interp.kernels.gpu.few_rows import attend_few_rows
from interp.kernels.gpu.forward import forward
from interp.kernels.gpu.gather import winners
from interp.kernels.gpu.tile_sizes import tiling
from interp.kernels.select import select

GPU = torch.cuda.is_available() and "triton" in ENGINES_BY_NAME
pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")

OUT_ATOL = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 2e-4}
MASS_ATOL = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-4}


@pytest.fixture(autouse=True)
def on_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs TRITON_INTERPRET=0")
    yield
    torch.cuda.empty_cache()


def requests_of(call: Call) -> tuple[Request, ...]:
    b, _, _, n, m = call.sizes
    device = call.q.device
    rng = torch.Generator().manual_seed(0)
    spans = torch.zeros(b, 5, m)
    for s, (start, stop) in enumerate([(0, 1), (5, m // 3), (m // 3, m), (m // 2, m // 2 + 40), (0, m)]):
        spans[:, s, start:stop] = 1
    listed = torch.randint(-1, m, (b, n, 2), generator=rng)
    first = torch.zeros(b, dtype=torch.int64) if call.live is None else (~call.live).sum(1).cpu()
    return (
        Lse(),
        Entropy(),
        TopKeys(1),
        Mass(spans.to(device), spans=True),
        At(listed.to(device)),
        Columns(),
        Blocks(128, first.to(device)),
        Rows(torch.tensor([0, n - 1], device=device)),
    )


def check(call: Call, requests: tuple[Request, ...]) -> None:
    """Assert equality with the reference in float64. The best key may differ if its logit is tied."""
    dtype = call.q.dtype
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    judge, found = naive.attend(exact, requests), ENGINES_BY_NAME["triton"].attend(call, requests)
    near(judge.out, found.out, OUT_ATOL[dtype], "out")
    for request, one, other in zip(requests, judge.values, found.values, strict=True):
        name = type(request).__name__
        if isinstance(request, TopKeys):
            seen = one[0] >= 0
            assert torch.equal(seen, other[0] >= 0)
            logits = naive.logits(exact)
            best = [logits.gather(-1, (keys - call.k_start).clamp(min=0))[seen] for keys in (one[0], other[0])]
            near(best[0], best[1], 1e-4 * max(1.0, float(best[0].abs().max())), "largest logit")
            near(one[1], other[1], 2e-4, "largest probability")
        elif isinstance(request, Mass):
            near(one, other, MASS_ATOL[dtype], name)
        else:
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            for a, b in pairs:
                near(a, b, 2e-4, name)


def near(expected: Any, found: Any, atol: float, what: str) -> None:
    if isinstance(expected, int):
        assert expected == found, what
        return
    assert expected.shape == found.shape, what
    assert not found.isnan().any(), what
    torch.testing.assert_close(
        found.double(), expected.double(), atol=atol, rtol=atol, msg=lambda m: f"{what}: {m}", check_device=False
    )


# lengths divisible by 16 and other lengths use different kernels
PLAIN = [
    (torch.bfloat16, 64, 1025),
    (torch.bfloat16, 128, 1024),
    (torch.float16, 128, 257),
    (torch.float32, 64, 384),
    (torch.float32, 128, 257),
]


@pytest.mark.parametrize(("dtype", "d", "n"), PLAIN)
def test_plain_calls(device, dtype, d, n):
    call = in_dtype(causal_call(2, 8, 2, n, 0, d), dtype, device)
    check(call, requests_of(call))


@pytest.mark.parametrize("d", [80, 256])
def test_other_widths(device, d):
    call = in_dtype(causal_call(1, 4, 2, 257, 0, d), torch.bfloat16, device)
    check(call, requests_of(call))


def test_padding_window_and_sinks(device):
    live = torch.arange(513)[None] >= torch.tensor([[0], [200]])
    call = causal_call(
        2, 4, 2, 513, 0, 64, live=live, row_live=live, window=300, sinks=torch.tensor([0.0, 3.0, -3.0, 20.0])
    )
    call = in_dtype(call, torch.bfloat16, device)
    check(call, requests_of(call))
    dirty = replace(
        call,
        q=call.q.masked_fill(~live.to(device)[:, None, :, None], torch.nan),
        k=call.k.masked_fill(~live.to(device)[:, None, :, None], torch.inf),
        v=call.v.masked_fill(~live.to(device)[:, None, :, None], torch.nan),
    )
    zeros = replace(dirty, q=dirty.q.nan_to_num(0, 0, 0), k=dirty.k.nan_to_num(0, 0, 0), v=dirty.v.nan_to_num(0, 0, 0))
    requests = (Lse(), Entropy(), TopKeys(1), Columns())
    one, other = (ENGINES_BY_NAME["triton"].attend(x, requests) for x in (zeros, dirty))
    assert torch.equal(one.written, other.written)
    assert all(torch.equal(a, b) for a, b in zip(one.values[:2], other.values[:2], strict=True))
    assert torch.equal(one.values[3][0], other.values[3][0])


def test_biases(device):
    rng = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 4, 384, generator=rng)
    bias[..., 100] = -torch.inf
    more: dict[str, Any] = {
        "key_bias": bias,
        "row_coef": torch.randn(1, 4, 384, 2, generator=rng),
        "key_group": torch.arange(384)[None] % 3,
        "logit_scale": torch.rand(4, generator=rng),
        "softcap": 5.0,
    }
    call = in_dtype(causal_call(1, 4, 2, 384, 0, 128, **more), torch.bfloat16, device)
    check(call, requests_of(call))


def on_span(n: int, value: float, start: int = 130, stop: int = 600) -> torch.Tensor:
    """Return a bias [1 h k] of some keys, for two of four heads."""
    bias = torch.zeros(1, 4, n)
    bias[:, ::2, start:stop] = value
    return bias


def of_rows(n: int, coef: torch.Tensor) -> dict[str, Any]:
    member = (torch.arange(n)[None] % 450) < 170
    return {"row_coef": coef.expand(1, 4, n)[..., None].clone(), "key_group": member.long()}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


BIASES = {
    "a span raised": lambda n: {"key_bias": on_span(n, 1.4)},
    "a different bias for every key": lambda n: {"key_bias": noise(1, 4, n)},
    "hidden keys, some rows see none": lambda n: {"key_bias": on_span(n, -torch.inf, 0, 300)},
    "one key takes all": lambda n: {"key_bias": on_span(n, torch.inf, 200, 201)},
    "rows raise a group": lambda n: of_rows(n, noise(1, 4, n)),
    "rows hide a group": lambda n: of_rows(n, torch.where(noise(1, 4, n) > 0, -torch.inf, 0.5)),
    "both": lambda n: of_rows(n, noise(1, 4, n)) | {"key_bias": on_span(n, -0.7)},
}


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", BIASES)
def test_biases_on_hopper(device, name, d):
    call = in_dtype(causal_call(1, 4, 2, 1000, 0, d, **BIASES[name](1000)), torch.bfloat16, device)
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert hopper.tiling_of(call) is not None
    check(call, requests_of(call))


DOMINANT_BIASES = {
    "a tile takes all": {"key_bias": on_span(1000, torch.inf, 256, 512)},
    "rows give all to a tile": of_rows(1000, torch.where(noise(1, 4, 1000) > 1, torch.inf, 0.5)),
}


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", DOMINANT_BIASES)
def test_several_keys_share_a_row_that_they_take(device, name, d):
    """A log-sum-exp of 1e30 cannot give these probabilities, so `forward` is compared with its Triton kernel."""
    call = in_dtype(causal_call(1, 4, 2, 1000, 0, d, **DOMINANT_BIASES[name]), torch.bfloat16, device)
    one, other = forward(call, tiles=tiling("forward", call.q, d)), forward(call)
    near(one.out, other.out, 2e-2, "out")
    near(one.lse, other.lse, 2e-4, "lse")


def test_chunk_of_a_prefill_and_decode(device):
    whole = in_dtype(causal_call(1, 8, 2, 1024, 0, 128), torch.bfloat16, device)
    chunk = replace(whole, q=whole.q[:, :, 512:], q_start=512)
    check(chunk, requests_of(chunk))
    last = replace(whole, q=whole.q[:, :, -1:], q_start=1023)
    out, lse, _ = attend_few_rows(last)
    found = forward(whole)
    assert found.out is not None
    near(found.out[:, :, -1:], out, 2e-2, "out")
    near(found.lse[:, :, -1:], lse, 2e-4, "lse")


def test_layouts_give_the_same(device):
    call = in_dtype(causal_call(1, 4, 2, 512, 0, 128), torch.bfloat16, device)
    inside = replace(call, **{x: getattr(call, x).transpose(1, 2).contiguous().transpose(1, 2) for x in "qkv"})
    # without alignment to 16 bytes, the copy engine cannot be used, but pointers can
    odd = replace(call, **{x: torch.nn.functional.pad(getattr(call, x), (1, 0))[..., 1:] for x in "qkv"})
    shared = replace(call, k=call.k[:, :1].expand(-1, 2, -1, -1), v=call.v[:, :1].expand(-1, 2, -1, -1))
    for laid in (inside, odd, shared):
        check(laid, (Lse(), TopKeys(1)))


@pytest.mark.parametrize("d", [64, 128])
def test_hundred_runs_are_bit_identical(device, d):
    call = in_dtype(causal_call(1, 8, 2, 1024, 0, d), torch.bfloat16, device)
    requests = (Lse(), Entropy(), Columns(), Mass(torch.rand(1, 5, 1024, device=device)))

    def once() -> tuple[torch.Tensor, ...]:
        result = ENGINES_BY_NAME["triton"].attend(call, requests)
        return result.written, result.values[0], result.values[1], *result.values[2], result.values[3]

    first = once()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def long(device: torch.device, b: int, h: int, g: int, n: int, d: int) -> Call:
    made = {"dtype": torch.bfloat16, "device": device}
    q, k, v = torch.randn(b, h, n, d, **made), torch.randn(b, g, n, d, **made), torch.randn(b, g, n, d, **made)
    return Call(q, k, v, d**-0.5)


def sampled(call: Call, b: int, h: int, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [d], lse, pattern [k]) of one row in float64."""
    group = call.sizes[1] // call.sizes[2]
    k, v = call.k[b, h // group, : row + 1].double(), call.v[b, h // group, : row + 1].double()
    score = k @ call.q[b, h, row].double() * call.scale
    lse = score.logsumexp(0)
    pattern = (score - lse).exp()
    return pattern @ v, lse, pattern


@pytest.mark.parametrize("d", [64, 128])
def test_long_calls_on_sampled_rows(device, d):
    n = 131072
    call = long(device, 1, 2, 1, n, d)
    spans = torch.zeros(1, 1, n, 2, device=device)
    spans[..., :1000, 0] = 1
    spans[..., 60000:, 1] = 1
    found = forward(call, sets=spans, spans=True, top=True, entropy=True)
    assert found.out is not None
    assert found.mass is not None
    assert found.tile is not None
    assert found.entropy is not None
    keys = winners(call, found.tile, found.tiling)
    for h, row in ((0, 0), (1, 127), (0, 8191), (1, 65537), (0, n - 1), (1, n - 1)):
        out, lse, pattern = sampled(call, 0, h, row)
        near(out, found.out[0, h, row], 2e-2, f"out {row}")
        near(lse, found.lse[0, h, row], 2e-4, f"lse {row}")
        near(torch.stack([pattern[:1000].sum(), pattern[60000:].sum()]), found.mass[0, h, row], 2e-3, f"mass {row}")
        near(torch.special.entr(pattern).sum(), found.entropy[0, h, row], 1e-3, f"entropy {row}")
        near(pattern.max(), pattern[keys[0, h, row]], 1e-6, f"largest {row}")
    received, _ = columns(call, found.lse)
    near(torch.full((1, 2), float(n), device=device), received.double().sum(-1), 1.0, "column sums")


def test_more_elements_than_32_bits_count(device):
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    # 2.3e9 elements of q; the last head is past 2^31
    call = long(device, 9, 64, 1, 32768, 128)
    assert call.q.numel() > 1 << 31
    found = forward(call)
    assert found.out is not None
    for b, h, row in ((0, 0, 5), (8, 63, 32767), (8, 60, 12345)):
        out, lse, _ = sampled(call, b, h, row)
        near(out, found.out[b, h, row], 2e-2, "out")
        near(lse, found.lse[b, h, row], 2e-4, "lse")
    del found
    chosen = call.for_queries(torch.tensor([12345, 32767], device=device))
    out, lse, _ = attend_few_rows(chosen, scores=None)
    assert out is not None
    near(sampled(call, 8, 63, 32767)[0], out[8, 63, 1], 2e-2, "out of rows")


def test_a_gpu_chooses_the_kernels(device):
    call = in_dtype(causal_call(1, 4, 2, 64, 0, 64), torch.bfloat16, device)
    assert select(call).name == "triton"
    assert select(replace(call, mask=torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device))).name == "chunked"


def test_a_model_is_read_by_the_kernels(device):
    from transformers import GenerationConfig

    from interp.hooks.prompts.prompts import Prompts
    from interp.hooks.read import keep
    from interp.hooks.read.capture import capture
    from interp.testing.families import make

    made: Any = make("llama")
    model = made.to(device, torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (n,), generator=rng).tolist() for n in (70, 90)]
    prompts = Prompts.from_ids(ids, spans=[{"mark": (5, 9)} for _ in ids])
    wanted = [keep.mass("mark", 0), keep.entropy(), keep.lse(), keep.top_keys(1)]
    given = {name: x.to(device) for name, x in prompts.tensors().items()}
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    read = []
    for engine in ("naive", "triton"):
        with capture(model, wanted, prompts, engine=engine) as cap:
            model.generate(**given, generation_config=settings)
        read.append([cap[x] for x in wanted])
    for kept, one, other in zip(wanted, *read, strict=True):
        # which of two nearly equal keys is largest depends on rounding, but its probability does not
        a, b = (x[1] if isinstance(x, tuple) else x for x in (one, other))
        assert a.shape[:4] == (2, 2, 4, b.shape[3])
        # the first layer has the same q, k and v; later layers have the rounding of its output to 16 bits
        torch.testing.assert_close(b[:, 0, :, :70], a[:, 0, :, :70], atol=6e-3, rtol=1e-3, msg=repr(kept))
        assert (a - b)[:, 1, :, :70].abs().mean() < 0.05, kept
