"""Function vectors: heads whose output at the last token carries the task that the examples of a prompt show."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.sweep import Batch, Cell
from interp.analyses.identify._last_token import at_last
from interp.analyses.measures.continuations import Options
from interp.analyses.results.head_scores import HeadScores
from interp.errors import PromptError, UsageError
from interp.hooks.edit.ablation import Intervention, ReferenceOutputs
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import attention_layers, projection_name, unwrap
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps

ANSWER = "id of the answer"
"""of the first token, in the meta"""


def function_vectors(
    model: nn.Module,
    clean: Prompts,
    shuffled: Prompts,
    *,
    batch_size: int = 4,
    rows: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Causal indirect effect: what a head's mean output in clean few-shot prompts does for the answer in mixed-up ones.

    zbar[l h d] = mean over the clean prompts of a relation of z[n l h d] at the last token, and y the first token of
    meta["right"]. score[n l h] = P(y | shuffled prompt n, z of the head at its last token := zbar) - P(y | shuffled
    prompt n). extras["patched"] is the first of the two.
    clean, shuffled: as of tasks.relations, of any number each; meta "relation" says whose mean is taken. clean may hold
    the twins of shuffled, or others. One forward for each prompt and head, from the head's layer on, many side by side;
    batch_size: shuffled prompts read together; rows: of one forward, by default from the free memory.
    Raises PromptError (no prompts, a relation without clean prompts, no answer).
    Source: Todd et al. 2310.15213; averaged over prompts and relations as there. Differs: the first
    token of the answer, our relations, fewer prompts.
    Cannot show: that heads need each other, nor that a head makes the task rather than the answer's kind of word.
    """
    if not len(clean) or not len(shuffled):
        raise PromptError(f"{len(clean)} clean and {len(shuffled)} shuffled prompts: give at least one of each.")
    layout = HeadLayout.of(model)
    answers = [ids[0][0] for ids in Options.of(shuffled).ids]
    items = tuple(
        replace(prompt, meta={**prompt.meta, ANSWER: answer}) for prompt, answer in zip(shuffled, answers, strict=True)
    )
    means = _means(model, clean, batch_size)
    if missing := sorted({_relation(prompt) for prompt in shuffled} - set(means)):
        raise PromptError(f"no clean prompt shows {missing[0]!r}, which a shuffled one asks for: give some of each.")
    heads = layout.all()
    patched, before = [], []
    bar = tqdm(total=len(items), desc="function vectors", disable=not progress, delay=2, leave=False)
    for batch in replace(shuffled, items=items).batches(batch_size):
        change = Intervention("patch", reference=batch)
        bank = ReferenceOutputs.of(model, heads, change)
        if bank is None:
            raise UsageError("patching has no reference prompts: give some.")
        # every head writes what it writes as loaded, but at the last token
        for row, prompt in zip(bank.z, batch, strict=True):
            row[len(prompt) - 1] = means[_relation(prompt)].flatten(0, 1)
        cell = Cell(batch, tuple(HeadSet((head,)) for head in heads), change, probability, rows)
        reader = cell.reader(unwrap(model), bank)
        patched.append(cell.run(unwrap(model), reader).unflatten(1, (layout.layers, layout.heads)))
        before.append(_of_answer(reader.logits, batch).cpu())
        bar.update(len(batch))
    bar.close()
    after = torch.cat(patched)
    return HeadScores(
        name="function_vectors",
        per_prompt=after - torch.cat(before)[:, None, None],
        unit="probability",
        kv_heads=layout.kv_heads,
        settings={"clean": clean.fingerprint()},
        provenance=Provenance.of(model, clean.tokenizer, seed=seed),
        extras={"patched": after},
        seed=seed,
        labels=tuple(str(prompt.meta.get("id", "")) for prompt in shuffled),
    )


def function_vector(model: nn.Module, clean: Prompts, heads: Any, *, batch_size: int = 4) -> Float[Tensor, "m"]:
    """The sum of what heads write at the last token, on average over clean few-shot prompts of one task; float32.

    vector[m] = sum over heads of zbar[l h d] W_O[l h d m], zbar[l h d] = mean over prompts of z at the last token. It
    is meant to be added to the residual of a middle layer, at the last token of another prompt, to make the model do
    the task there.
    heads: anything HeadSet.parse takes, such as function_vectors(...).heads(top=10). Biases are left out; where a norm
    follows attention (Gemma 2 and 3, OLMo 2), it is what enters that norm.
    Raises HeadError, and UsageError without heads.
    Source: Todd et al. 2310.15213, with the top 10 heads.
    Cannot show: at which layer and how strongly to add it.
    """
    network, layout = unwrap(model), HeadLayout.of(model)
    chosen = HeadSet.parse(heads, layout)
    layout.check(chosen)
    if not len(chosen):
        raise UsageError("no heads given: name at least one, as function_vectors(...).heads(top=10) does.")
    mean, modules = at_last(model, clean, keeps.z(), batch_size=batch_size).mean(0), attention_layers(network)
    wrote = []
    for layer, own in chosen.by_layer().items():
        project = getattr(modules[layer], str(projection_name(modules[layer])))
        like = next(network.parameters())
        z = torch.zeros_like(mean[layer])
        z[list(own)] = mean[layer][list(own)]
        with torch.no_grad():
            both = project(torch.stack([z.flatten(), torch.zeros_like(z.flatten())]).to(like))
        wrote.append((both[0] - both[1]).float().cpu())
    return torch.stack(wrote).sum(0)


def probability(logits: Float[Tensor, "r v"], batch: Batch) -> Float[Tensor, "r"]:
    """Of the first token of the right answer."""
    return _of_answer(logits, batch.prompts)


def _of_answer(logits: Float[Tensor, "r v"], prompts: Prompts) -> Float[Tensor, "r"]:
    ids = torch.tensor([prompt.meta[ANSWER] for prompt in prompts], device=logits.device)
    return logits.softmax(-1).gather(1, ids[:, None])[:, 0]


def _means(model: nn.Module, clean: Prompts, batch_size: int) -> dict[str, Float[Tensor, "l h d"]]:
    """Mean z at the last token of the prompts of each relation."""
    kinds = [_relation(prompt) for prompt in clean]
    z = at_last(model, clean, keeps.z(), batch_size=batch_size)
    return {kind: z[[other == kind for other in kinds]].mean(0) for kind in dict.fromkeys(kinds)}


def _relation(prompt: Any) -> str:
    return str(prompt.meta.get("relation", ""))
