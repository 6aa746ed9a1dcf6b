"""Function vectors: heads whose output at the last token carries the task that the examples of a prompt show."""

from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses import costs
from interp.analyses.causal.sweep import Batch, Cell
from interp.analyses.identify._gate import predicts
from interp.analyses.identify._last_token import at_last
from interp.analyses.measures.continuations import Options
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import Intervention, ReferenceOutputs
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import attention_layers, projection_name, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.model.weights import compute_dtype, input_device
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read import keep as keeps

__all__ = ["function_vector", "function_vectors"]
ANSWER = "id of the answer"
"""name of the first token's id in the meta"""


@analysis(
    title="Function vectors",
    group="in-context tasks",
    order=19,
    prompts=standard.relations,
    paired=True,
    partners_first=True,
    own_prompts=False,
    cost=costs.gated(costs.patching_means(), side=1),
    source_settings={"right_only": True, "n_few_shot": "25 for each data set, means of 100", "relations.shots": 10},
)
def function_vectors(
    model: nn.Module,
    clean: Prompts,
    shuffled: Prompts,
    *,
    right_only: bool = True,
    batch_size: int = 4,
    rows: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by what its mean output in clean few-shot prompts does for the answer in shuffled ones.

    This is the causal indirect effect.

    `zbar[l h d] = mean over the clean prompts of a relation of z[n l h d]` at the last token, and y is the first token
    of the first text in meta "right". `score[n l h] = P(y | shuffled prompt n, z of the head at its last token := zbar)
    - P(y | shuffled prompt n)`.

    The model has to do the task: the mean is over the clean prompts whose most probable next token is y. A shuffled
    prompt counts where its clean twin, the prompt with the same meta "id", is one of them. Without a twin it counts
    where any clean prompt of its relation is. The others are NaN, and where none counts, no head has a score.

    There is one forward pass for each prompt that counts and each head, from the head's layer on; many of them are
    sequences of one batch.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        clean: Few-shot prompts, such as `tasks.relations`. Meta "relation" names the group whose mean is taken. They
            may be the twins of the shuffled prompts, or others, of any number.
        shuffled: Few-shot prompts whose answers are shuffled, such as `tasks.relations(shuffled=True)`.
        right_only: Use only the clean prompts that the model answers right, and their twins; False uses all.
        batch_size: Number of shuffled prompts in a batch. Every forward pass holds all prompts of a batch, for one or
            more heads.
        rows: Largest number of sequences per forward pass, where each sequence is one prompt with one head replaced,
            but never fewer than the prompts of a batch; by default as many as fit into free memory.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`, in probability; NaN where the prompt does not count. The extra
            "patched" is the first of the two terms.

    Raises:
        PromptError: If there are no prompts, a relation has no clean prompts, or a prompt has no answer.

    Examples:
        >>> clean, mixed = (interp.tasks.relations(tokenizer, n=2, shots=2, shuffled=s) for s in (False, True))
        >>> interp.identify.function_vectors(model, clean, mixed).per_prompt.shape
        torch.Size([2, 2, 4])

    Source:
        Todd et al. 2310.15213, by the released code: the first token of the answer, means and effects on prompts that
        the model answers right, averaged over prompts and relations.

    Differs:
        The code takes means over 100 clean prompts and effects over 25 shuffled ones of each data set, with 10 examples
        in a prompt; here there are as many as given, of lists of words of this project. The code judges once for each
        question of a validation split whether the model answers it, in a prompt with other examples; here every clean
        prompt is judged itself. Clean and shuffled twins share their examples, which the code draws anew, and no answer
        keeps its place, as the code's permutation allows.

    Limits:
        Does not show that heads need each other, nor that a head carries the task rather than the kind of word that the
        answer is.
    """
    if not len(clean) or not len(shuffled):
        raise PromptError(
            f"{len(clean)} clean and {len(shuffled)} shuffled prompts are too few; give at least one of each."
        )
    layout = HeadLayout.of(model)
    answers = _answers(shuffled)
    if missing := sorted({_relation(prompt) for prompt in shuffled} - {_relation(prompt) for prompt in clean}):
        raise PromptError(
            f"no clean prompt has the relation {missing[0]!r} of a shuffled one; give clean prompts of each relation."
        )
    right = predicts(model, clean, _answers(clean), batch_size).tolist() if right_only else [True] * len(clean)
    means = _means(model, replace(clean, items=tuple(compress(clean, right))), batch_size)
    counts = [_counts(prompt, clean, right) for prompt in shuffled]
    items = tuple(
        replace(prompt, meta={**prompt.meta, ANSWER: answer})
        for prompt, answer in compress(zip(shuffled, answers, strict=True), counts)
    )
    heads = layout.all()
    patched, before = [torch.empty(0, layout.layers, layout.heads)], [torch.empty(0)]
    bar = tqdm(total=len(items), desc="function vectors", disable=not progress, delay=2, leave=False)
    for batch in replace(shuffled, items=items).batches(batch_size):
        change = Intervention("patch", reference=batch)
        bank = ReferenceOutputs.of(model, heads, change)
        if bank is None:
            raise UsageError("patching has no reference prompts; give at least one shuffled prompt.")
        # every head writes what it writes in the unmodified model, except at the last token
        for row, prompt in zip(bank.z, batch, strict=True):
            row[len(prompt) - 1] = means[_relation(prompt)].flatten(0, 1)
        cell = Cell(batch, tuple(HeadSet((head,)) for head in heads), change, probability, rows)
        reader = cell.reader(unwrap(model), bank)
        patched.append(cell.run(unwrap(model), reader).unflatten(1, (layout.layers, layout.heads)))
        before.append(_of_answer(reader.logits, batch).cpu())
        bar.update(len(batch))
    bar.close()
    after = torch.full((len(shuffled), layout.layers, layout.heads), torch.nan)
    effects, used = after.clone(), torch.tensor(counts)
    after[used] = torch.cat(patched)
    effects[used] = after[used] - torch.cat(before)[:, None, None]
    return HeadScores(
        name="function_vectors",
        per_prompt=effects,
        unit="probability",
        kv_heads=layout.kv_heads,
        settings={"clean": clean.fingerprint(), "right_only": right_only},
        provenance=Provenance.of(model, clean.tokenizer, seed=seed),
        extras={"patched": after},
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in shuffled),
    )


def function_vector(model: nn.Module, clean: Prompts, heads: Any, *, batch_size: int = 4) -> Float[Tensor, "m"]:
    """Sum of what heads write at the last token, averaged over clean few-shot prompts of one task.

    `vector[m] = sum over heads of zbar[l h d] W_O[l h d m]`, with `zbar[l h d] = mean over prompts of z` at the last
    token. It is meant to be added to the residual stream of a middle layer, at the last token of another prompt, to
    make the model do the task there. Biases are left out. Where a norm follows attention (Gemma 2 and 3, OLMo 2), the
    vector is what enters that norm.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        clean: Few-shot prompts of one task.
        heads: Anything that HeadSet.parse takes, such as `function_vectors(...).heads(top=10)`.
        batch_size: Number of prompts per forward pass.

    Returns:
        Tensor: float32 [m].

    Raises:
        HeadError: If the model has no such head.
        UsageError: If no heads are given.

    Examples:
        >>> interp.identify.function_vector(model, prompts, "L1H0").shape
        torch.Size([32])

    Source:
        Todd et al. 2310.15213, with the top 10 heads.

    Limits:
        Does not show at which layer and how strongly to add the vector.
    """
    network, layout = unwrap(model), HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        raise UsageError("no heads are given; name at least one, as function_vectors(...).heads(top=10) does.")
    mean, modules = at_last(model, clean, keeps.z(), batch_size=batch_size).mean(0), attention_layers(network)
    wrote = []
    for layer, own in chosen.by_layer().items():
        project = getattr(modules[layer], str(projection_name(modules[layer])))
        z = torch.zeros_like(mean[layer])
        z[list(own)] = mean[layer][list(own)]
        with torch.no_grad():
            rows = torch.stack([z.flatten(), torch.zeros_like(z.flatten())])
            both = project(rows.to(input_device(network), compute_dtype(network)))
        wrote.append((both[0] - both[1]).float().cpu())
    return torch.stack(wrote).sum(0)


def probability(logits: Float[Tensor, "r v"], batch: Batch) -> Float[Tensor, "r"]:
    """Probability of the first token of the right answer, for `sweep`."""
    return _of_answer(logits, batch.prompts)


def _of_answer(logits: Float[Tensor, "r v"], prompts: Prompts) -> Float[Tensor, "r"]:
    ids = torch.tensor([prompt.meta[ANSWER] for prompt in prompts], device=logits.device)
    return logits.softmax(-1).gather(1, ids[:, None])[:, 0]


def _answers(prompts: Prompts) -> list[int]:
    """The first token of the right answer of each prompt."""
    return [ids[0][0] for ids in Options.of(prompts).ids]


def _counts(prompt: Prompt, clean: Prompts, right: list[bool]) -> bool:
    """Whether the model does the task of a shuffled prompt: in its clean twin, else in any prompt of its relation."""
    pairs = list(zip(clean, right, strict=True))
    own = prompt.meta.get("id")
    twins = [yes for other, yes in pairs if own is not None and other.meta.get("id") == own]
    return any(twins or [yes for other, yes in pairs if _relation(other) == _relation(prompt)])


def _means(model: nn.Module, clean: Prompts, batch_size: int) -> dict[str, Float[Tensor, "l h d"]]:
    """Mean z at the last token of the prompts of each relation."""
    kinds = [_relation(prompt) for prompt in clean]
    if not kinds:
        return {}
    z = at_last(model, clean, keeps.z(), batch_size=batch_size)
    return {kind: z[[other == kind for other in kinds]].mean(0) for kind in dict.fromkeys(kinds)}


def _relation(prompt: Any) -> str:
    return str(prompt.meta.get("relation", ""))
