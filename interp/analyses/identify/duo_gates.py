"""DuoAttention: which kv heads need all keys, by a gate on each that is trained to close."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.identify._distillation import Full, Settings, State, order_of, still
from interp.analyses.results.files import digest
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ModelError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts


def duo_gates(
    model: nn.Module,
    prompts: Prompts,
    *,
    sink: int = 16,
    recent: int = 64,
    steps: int = 100,
    lr: float = 0.02,
    l1: float = 0.05,
    full: Full = "teacher",
    span: str = "tail",
    batch_size: int = 1,
    runs: int = 1,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """DuoAttention gates: how open a kv head's gate to far keys stays when it is trained to close without harm.

    A gate a[l g] in [0, 1] for each kv head, 1 at first, mixes what its query heads write,
    z = (1 - a) stream + a full, stream seeing the first `sink` keys and the last `recent`.
    loss = mean over tokens of `span` and over m of (H_teacher - H_student)^2 + l1 mean over l, g of |a|, H the residual
    stream [q m] after the final norm, the teacher the model as it is; AdamW without decay, its rate
    lr min(1, max((t + 1) / (N / 5), 0.1), max((N - t) / (N / 5), 0.1)) at step t of N; batch_size prompts a step, in an
    order drawn from the seed. A native window belongs to both branches.
    full: whose q, k and v the full branch takes: the teacher's (the released code), or the student's own (the paper's
    reading). Scores: each query head has the gate of its group. A row of the table is a run, not a prompt: run r has
    the seed `seed` + r, so intervals, where there are several, are over orders of the prompts. labels: the distillation
    loss of its last fifth. folder: every step is kept there, and a call that was cut goes on with the same numbers.
    prompts: tasks.passkeys. `duo_heads` takes the heads that keep a full cache; formats.write_duo_attention exports.
    Raises SpanError for a prompt without the span, ModelError for float16, whose gradients overflow, or no body below
    the head; UsageError for sizes without meaning.
    Source: Xiao et al. 2410.10819 and its released code: sink 128, recent 256, 2,000 steps, lr 0.02, l1 0.05 on the
    mean of |a| (the paper writes a sum). Differs: sizes for short prompts; a key's distance, not that of its block; the
    teacher runs apart, its z is kept; q, k and v of the stream are stored and its weights made again.
    Cannot show: which query head of a group matters, nor that a head with a low gate is idle; gates depend on sink,
    recent and l1, so compare ranks, not values.
    """
    settings = Settings(sink, recent, steps, lr, l1, full, span, batch_size)
    network = unwrap(model)
    if torch.float16 in {parameter.dtype for parameter in network.parameters()}:
        raise ModelError("the model is in float16, whose gradients overflow: load it in bfloat16 or float32.")
    if network.base_model is network:
        raise ModelError(f"{type(network).__name__} names no body below its head: load it as a causal LM.")
    if runs < 1:
        raise UsageError(f"runs={runs}: train at least once.")
    check_eval(network)
    prompts.span(span)
    layout = HeadLayout.of(network)
    provenance = Provenance.of(model, prompts.tokenizer, seed=seed)
    what = [provenance.config_hash, provenance.weights_hash, provenance.dtype, prompts.fingerprint(), asdict(settings)]
    rows, labels = [], []
    with (
        torch.inference_mode(False),
        still(network),
        tqdm(total=runs * steps, desc="duo_gates", disable=not progress, delay=2, leave=False) as bar,
    ):
        for run in range(seed, seed + runs):
            path = None if folder is None else Path(folder) / f"duo-{digest([*what, run])}.safetensors"
            state = State.open(path, layout, settings)
            bar.update(state.step)
            order = order_of(len(prompts), batch_size * steps, run)
            while state.step < steps:
                first = state.step * batch_size
                chosen = Prompts(
                    tuple(prompts[i] for i in order[first : first + batch_size]), prompts.tokenizer, prompts.pad_id
                )
                state.advance(network, chosen, settings)
                state.save(path)
                bar.update()
            rows.append(state.gates.detach().clamp(0, 1).repeat_interleave(layout.heads // layout.kv_heads, 1))
            labels.append(f"seed {run}, loss {state.losses[-max(1, steps // 5) :].mean():.3g}")
    return HeadScores(
        name="duo_gates",
        per_prompt=torch.stack(rows),
        unit="gate of full attention",
        kv_heads=layout.kv_heads,
        settings=asdict(settings) | {"prompts": prompts.fingerprint()},
        provenance=provenance,
        seed=seed,
        labels=tuple(labels),
    )


def duo_heads(scores: HeadScores, share: float, *, seed: int = 0) -> HeadSet:
    """The query heads whose kv heads keep a full cache: the `share` of all kv heads whose gates are the highest.

    kept[l g] = gate[l g] >= the (1 - share) quantile of all gates, ties broken by a noise below 1e-6; the gate of a kv
    head is the largest of its query heads. Raises UsageError for a share outside of (0, 1), or heads without a score.
    Source: Xiao et al. 2410.10819 (0.25 for Llama-2-7B, 0.5 for models with kv groups).
    Cannot show: that the share is enough; gates of models with kv groups stay near 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"share={share} is not in (0, 1): give the part of the kv heads that keeps its full cache.")
    gates = _groups(scores)
    noise = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates = gates.double() + 1e-6 * noise
    kept = gates >= torch.quantile(gates.flatten(), 1 - share)
    return HeadSet.from_mask(kept.repeat_interleave(scores.n_heads // gates.shape[1], 1))


@dataclass(frozen=True)
class GateShares:
    """How the gates of a model are spread over its kv heads."""

    half: float
    """share of gates at 0.5 or above"""
    open: float
    """share above 0.9"""
    closed: float
    """share below 0.02"""
    mean: float


def gate_shares(scores: HeadScores) -> GateShares:
    """How many gates are open and closed, over kv heads: the figures by which published gate files are compared.

    Raises UsageError for heads without a score.
    """
    gates = _groups(scores)
    half, wide, closed = ((x.float().mean().item()) for x in (gates >= 0.5, gates > 0.9, gates < 0.02))
    return GateShares(half, wide, closed, gates.mean().item())


def _groups(scores: HeadScores) -> Float[Tensor, "l g"]:
    gates = scores.values.unflatten(1, (scores.layout.kv_heads, -1)).amax(2)
    if gates.isnan().any():
        raise UsageError(f"'{scores.name}' has heads without a score: give a gate for every head.")
    return gates
