"""Contracts of analyses that score heads."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from interp.analyses.results.head_scores import HeadScores
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families, planted
from interp.testing.contract_error import modules_with_hooks, require

Detector = Callable[..., HeadScores]
Control = Literal["weights", "data"]
RANDOM_LENGTHS = (24, 40, 30)
TOLERANCE = 1e-4


def check_detector(
    method: Detector,
    kind: str,
    *,
    controls: Sequence[Control] = ("weights",),
    families: Sequence[str] = planted.FAMILIES,
    seeds: Iterable[int] = range(5),
    present: float = 0.9,
    absent: float = 0.45,
    **settings: Any,
) -> None:
    """Check that an analysis ranks the planted head first, and that its score is gone in a control.

    Args:
        method: `f(model, prompts, *, batch_size, **settings) -> HeadScores`.
        kind: The planted job, one of `planted.KINDS`.
        controls: "weights": the query weights of the planted head are shuffled; "data": the prompts lack the pattern,
            for kinds in `planted.DATA_CONTROLS`.
        families: Model families, "gpt2" and "llama".
        seeds: One model and set of prompts for each.
        present: The score of the planted head must be above this.
        absent: In a control it must be below this; a prompt that does not count is taken as 0.
        settings: Settings of the method.

    Raises:
        ContractError: With the family, the seed and the scores that broke the contract.

    Examples:
        >>> interp.testing.check_detector(interp.identify.induction, "induction", families=["llama"], seeds=[0])
    """
    seeds = tuple(seeds)
    require(families and seeds, "there is nothing to check; give at least one family and one seed.")
    for family in families:
        for seed in seeds:
            where = f"{kind}, {family}, seed {seed}"
            truth = planted.make(kind, seed, family)
            scores = method(truth.model, planted_prompts(kind, seed), batch_size=4, **settings)
            require(scores.counted == 4, f"{where}: {scores.counted} of 4 prompts counted.")
            require(scores.top(1) == [truth.head], f"{where}: {truth.head} is planted, the scores are {scores}.")
            require(scores[truth.head] > present, f"{where}: the planted head scores below {present}: {scores}.")
            for control in controls:
                null = planted.make(kind, seed, family, shuffled=control == "weights")
                batch = planted_prompts(kind, seed, shuffled=control == "data")
                found = method(null.model, batch, batch_size=4, **settings)
                # a prompt that does not count is no evidence for the head
                value = float(found.per_prompt.nan_to_num(0.0).mean(0)[null.head])
                require(value < absent, f"{where}, control in the {control}: the head still scores {value:.2f}.")


def check_invariances(
    method: Detector,
    kind: str = "",
    *,
    family: str = "llama",
    prompts: Prompts | None = None,
    tolerance: float = TOLERANCE,
    **settings: Any,
) -> None:
    """Check that batches, padding and the order of prompts change no score, and that the model is left as it was.

    `concat(f(a), f(b)) == f(a + b)` lets a run be killed and continued.

    Args:
        method: As in `check_detector`.
        kind: The job whose spans random prompts get, see `random_prompts`.
        family: One of `families.FAMILIES`.
        prompts: Prompts in place of the random ones, at least two of different lengths.
        tolerance: Largest difference of a score.
        settings: Settings of the method.

    Raises:
        ContractError: With what changed the scores.

    Examples:
        >>> interp.testing.check_invariances(interp.identify.induction, "induction")
    """
    model = families.make(family)
    batch = random_prompts(kind, families.VOCAB, RANDOM_LENGTHS) if prompts is None else prompts
    n = len(batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    together = method(model, batch, batch_size=n, **settings)
    require(
        bool(together.per_prompt.nan_to_num(0.0).abs().max() > 0),
        "all scores are 0, so there is nothing to compare; give prompts on which the method scores a head.",
    )
    again = method(model, batch, batch_size=n, **settings)
    alone = HeadScores.concat([method(model, batch[i : i + 1], batch_size=1, **settings) for i in range(n)])
    turned = method(model, batch[::-1], batch_size=n, **settings)
    _same(together.per_prompt, again.per_prompt, 0.0, "a second call")
    _same(together.per_prompt, alone.per_prompt, tolerance, "prompts one by one, without padding,")
    _same(together.per_prompt, turned.per_prompt.flip(0), tolerance, "prompts in reverse order")
    for key, extra in together.extras.items():
        require(key in alone.extras, f"the extra {key!r} is missing where prompts are given one by one.")
        _same(extra, turned.extras[key].flip(0), tolerance, f"prompts in reverse order, for {key!r},")
        _same(extra, alone.extras[key], tolerance, f"prompts one by one, for {key!r},")
    require(together.provenance is not None, "the scores have no provenance; pass Provenance.of(model, ...).")
    together.provenance.check_model(model)  # pyright: ignore[reportOptionalMemberAccess]
    require(together.unit, "the scores have no unit.")
    kept = all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    require(kept, "the method changed the weights of the model.")
    require(model.config._attn_implementation == attention, "the method left another attention implementation.")
    require(not modules_with_hooks(model), f"the method left hooks on {', '.join(modules_with_hooks(model))}.")


def planted_prompts(kind: str, seed: int, shuffled: bool = False, batch: int = 4) -> Prompts:
    """The prompts of a planted job.

    Args:
        kind: One of `planted.KINDS`.
        seed: Seed of the prompts.
        shuffled: The control in the data, see `planted.prompts`.
        batch: Number of prompts.

    Returns:
        Prompts: the prompts.
    """
    task = planted.prompts(kind, seed, shuffled=shuffled, batch=batch)
    return Prompts.from_ids(task.ids, spans=task.spans, meta=task.meta, pad_id=planted.PAD)


def random_prompts(kind: str, vocab: int, lengths: tuple[int, ...], seed: int = 0) -> Prompts:
    """Random tokens with the spans that a detector of this kind needs, for models in which nothing was planted.

    Args:
        kind: One of `planted.KINDS`; others get a span "answer" over nearly all tokens.
        vocab: Number of tokens to draw from.
        lengths: One prompt of about each length.
        seed: Seed of the tokens.
    """
    rng = torch.Generator().manual_seed(seed)
    ids, spans = [], []
    for n in lengths:
        half = torch.randint(3, vocab, (n // 2,), generator=rng).tolist()
        ids.append([1, *half, *half])
        marks = {"first": (1, n // 2 + 1), "second": (n // 2 + 1, 2 * (n // 2) + 1)}
        # nearly every key is an answer, so that random heads paste some of it
        apart = [(i, i + 4) for i in range(1, n - 6, 4)]
        jobs = {
            "induction": marks,
            "echo": marks,
            "documents": {"documents": apart, "gold": apart[1:3], "query": (len(ids[-1]) - 3, len(ids[-1]))},
            "options": {"options": apart},
        }
        spans.append(jobs.get(kind, {"answer": (1, 2 * (n // 2))}))
    return Prompts.from_ids(ids, spans=spans, meta=[{"option": 1}] * len(ids))


def _same(one: Tensor, other: Tensor, tolerance: float, what: str) -> None:
    require(one.shape == other.shape, f"{what} gave {list(other.shape)} scores, not {list(one.shape)}.")
    differ = (one.double() - other.double()).abs()
    differ = torch.where(one.isnan() & other.isnan(), 0.0, differ)
    worst = float(differ.nan_to_num(nan=torch.inf).max()) if differ.numel() else 0.0
    require(worst <= tolerance, f"{what} gave other scores, by {worst:.1e}.")
