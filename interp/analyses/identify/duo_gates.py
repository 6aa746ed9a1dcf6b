"""DuoAttention: which kv heads need all keys, by a gate on each that is trained to close."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses import costs, memory
from interp.analyses.identify._distillation import Full, Settings, State, frozen, order_of
from interp.analyses.registry import analysis
from interp.analyses.results.files import digest
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import ModelError, UsageError
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import check_eval, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

__all__ = ["GateShares", "duo_gates", "duo_heads", "gate_shares"]


@analysis(
    title="DuoAttention gates",
    group="long context",
    order=20,
    sets=("long",),
    prompts=standard.passkeys,
    joint=True,
    resumable=True,
    own_prompts=False,
    run_settings={"batch_size": 1, "steps": "$training_steps"},
    cost=costs.training(steps=100),
    source_settings={
        "sink": 128,
        "recent": 256,
        "steps": 2000,
        "lr": 0.02,
        "l1": 0.05,
        "full": "teacher in the code, student in the paper",
        "passkeys.lengths": "1,000 to 32,000",
        "passkeys.keys": 10,
        "passkeys.words": 32,
    },
)
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
    checkpoint: bool = True,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each kv head by how open its gate to far keys stays when it is trained to close without changing the model.

    A gate a[l g] in [0, 1] for each kv head, 1 at first, mixes what its query heads write, `z = (1 - a) stream + a
    full`, where stream attends to the first `sink` keys and the last `recent`.

    `loss = mean over tokens of "span" and over m of (H_teacher - H_student)^2 + l1 mean over l, g of |a|`, where H is
    the residual stream [q m] after the final norm, and the teacher is the unmodified model. AdamW runs without weight
    decay, at the rate `lr min(1, max((t + 1) / (N / 5), 0.1), max((N - t) / (N / 5), 0.1))` at step t of N, with
    `batch_size` prompts per step in an order drawn from the seed. A native window belongs to both branches.

    `duo_heads` chooses the heads that keep a full cache, and `formats.write_duo_attention` exports gates.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with a span whose tokens the loss is taken on, such as `tasks.passkeys`.
        sink: Number of first keys of the streaming branch.
        recent: Number of last keys of the streaming branch.
        steps: Number of optimisation steps.
        lr: Peak learning rate.
        l1: Weight of the penalty on open gates.
        full: Which q, k and v the full branch uses: those of the "teacher" (the released code), or those of the
            "student" (the paper's reading).
        span: Span whose tokens the loss is taken on.
        batch_size: Number of prompts per step.
        runs: Number of trainings; run r has the seed `seed` + r.
        checkpoint: Compute each layer again in the backward pass, so that only the inputs of the layers are stored.
            False is faster and takes far more memory; the gates are the same.
        folder: Folder that keeps every step, so that an interrupted call continues with the same numbers.
        seed: Seed of the order of prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, from 0 to 1; each query head has the gate of its group. A row is a
            run, not a prompt, so intervals, where there are several runs, are over orders of the prompts. The labels
            hold the distillation loss of the last fifth of each run.

    Raises:
        SpanError: If a prompt has no such span.
        ModelError: If the model is in float16, whose gradients overflow, or has no body below its head.
        UsageError: If a setting is out of range.
        CostError: If the activations of a step do not fit into the free memory.

    Examples:
        >>> scores = interp.identify.duo_gates(model, prompts, span="second", sink=1, recent=4, steps=2)
        >>> scores.per_prompt.shape
        torch.Size([1, 2, 4])

    Source:
        Xiao et al. 2410.10819 and its released code: sink 128, recent 256, 2,000 steps, lr 0.02, l1 0.05 on the mean of
        |a| (the paper writes a sum).

    Differs:
        Sizes suit short prompts. Distances are those of keys, not of blocks. The teacher runs separately and its z is
        kept. The backward pass computes each layer again.

    Limits:
        Does not show which query head of a group matters, nor that a head with a low gate is idle. Gates depend on
        sink, recent and l1, so compare ranks, not values.
    """
    settings = Settings(sink, recent, steps, lr, l1, full, span, batch_size)
    network = unwrap(model)
    if torch.float16 in {parameter.dtype for parameter in network.parameters()}:
        raise ModelError("the model is in float16, whose gradients overflow; load it in bfloat16 or float32.")
    if network.base_model is network:
        raise ModelError(f"{type(network).__name__} has no body below its head; load it as a causal language model.")
    if runs < 1:
        raise UsageError(f"runs={runs} is too small; train at least once.")
    check_eval(network)
    prompts.span(span)
    given = {**asdict(settings), "checkpoint": checkpoint}
    memory.check("duo_gates", memory.training, model, [(batch_size, max(prompts.lengths))], given)
    layout = HeadLayout.of(network)
    provenance = Provenance.of(model, prompts.tokenizer, seed=seed)
    identity = [
        provenance.config_hash,
        provenance.weights_hash,
        provenance.dtype,
        prompts.fingerprint(),
        asdict(settings),
    ]
    rows, labels = [], []
    with (
        torch.inference_mode(False),
        frozen(network),
        tqdm(total=runs * steps, desc="duo_gates", disable=not progress, delay=2, leave=False) as bar,
    ):
        for run in range(seed, seed + runs):
            path = None if folder is None else Path(folder) / f"duo-{digest([*identity, run])}.safetensors"
            state = State.open(path, layout, settings)
            bar.update(state.step)
            order = order_of(len(prompts), batch_size * steps, run)
            while state.step < steps:
                first = state.step * batch_size
                chosen = Prompts(
                    tuple(prompts[i] for i in order[first : first + batch_size]), prompts.tokenizer, prompts.pad_id
                )
                state.advance(network, chosen, settings, checkpoint)
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
    """Choose the query heads whose kv heads keep a full cache: those of the `share` of kv heads with the highest gates.

    `kept[l g] = gate[l g] >= the (1 - share) quantile of all gates`, where noise below 1e-6 breaks ties. The gate of a
    kv head is the largest of its query heads.

    Args:
        scores: Scores of `duo_gates`.
        share: Share of the kv heads that keep their full cache.
        seed: Seed of the noise.

    Returns:
        HeadSet: The query heads of the kept kv heads.

    Raises:
        UsageError: If the share is not in (0, 1), or a head has no score.

    Examples:
        >>> len(interp.identify.duo_heads(scores, 0.5))
        4

    Source:
        Xiao et al. 2410.10819 (0.25 for Llama-2-7B, 0.5 for models with kv groups).

    Limits:
        Does not show that the share is enough. Gates of models with kv groups stay near 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"share={share} is not in (0, 1); give the share of the kv heads that keep their full cache.")
    gates = _groups(scores)
    noise = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates = gates.double() + 1e-6 * noise
    kept = gates >= torch.quantile(gates.flatten(), 1 - share)
    return HeadSet.from_mask(kept.repeat_interleave(scores.n_heads // gates.shape[1], 1))


@dataclass(frozen=True)
class GateShares:
    """How the gates of a model are distributed over its kv heads."""

    half: float
    """share of gates at 0.5 or above"""
    open: float
    """share of gates above 0.9"""
    closed: float
    """share of gates below 0.02"""
    mean: float
    """mean of all gates"""


def gate_shares(scores: HeadScores) -> GateShares:
    """Count how many gates are open and closed, over kv heads: the numbers by which published gate files are compared.

    Args:
        scores: Scores of `duo_gates`.

    Returns:
        GateShares: Shares of gates, and their mean.

    Raises:
        UsageError: If a head has no score.

    Examples:
        >>> interp.identify.gate_shares(scores).open
        0.0
    """
    gates = _groups(scores)
    half, wide, closed = ((x.float().mean().item()) for x in (gates >= 0.5, gates > 0.9, gates < 0.02))
    return GateShares(half, wide, closed, gates.mean().item())


def _groups(scores: HeadScores) -> Float[Tensor, "l g"]:
    """Gate of each kv head, the largest of its query heads."""
    gates = scores.values.unflatten(1, (scores.layout.kv_heads, -1)).amax(2)
    if gates.isnan().any():
        raise UsageError(f"'{scores.name}' has heads without a score; give a gate for every head.")
    return gates
