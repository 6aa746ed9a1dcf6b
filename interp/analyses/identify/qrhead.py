"""QRHead: heads whose attention goes from a query to the document that answers it, beyond that of any query."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.analyses import costs
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.errors import PromptError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import read
from interp.hooks.read.keep import Columns, columns
from interp.hooks.read.visibility import Visibility, keys_from
from interp.hooks.seam import tapping

NDCG_DEPTH = 10
"""number of documents in nDCG"""


@analysis(
    title="QRHead",
    group="long context",
    order=14,
    sets=("long",),
    prompts=standard.documents,
    paired=True,
    own_prompts=False,
    cost=costs.reading(columns("sum")),
    source_settings={"metric": "score on LongMemEval, ndcg on BEIR", "n_needles": "70 of LongMemEval, 128 of BEIR"},
)
def qrhead(
    model: nn.Module,
    prompts: Prompts,
    null: Prompts,
    *,
    metric: Literal["score", "ndcg"] = "score",
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Score each head by the attention of the query on the document that answers it, minus that of an empty query.

    `c[n l h k] = mean over q in the span "query" of pattern[n l h q k]`, minus the same for the prompt's partner in
    `null`, which has the same documents and the query "N/A". `doc[n l h s] = sum over tokens k of document s with c[k]
    > mean - 2 std of c inside of s`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with the spans "documents", "gold" and "query", such as the first side of `tasks.documents`.
        null: A partner for each prompt, with the same documents and an empty query.
        metric: "score" sums doc over the documents of the span "gold"; "ndcg" is the nDCG@10 of the documents ranked by
            doc, from 0 to 1.
        batch_size: Number of prompts per forward pass.
        seed: Seed of the confidence intervals over prompts.
        progress: Show a progress bar.

    Returns:
        HeadScores: float32 `per_prompt [n l h]`; NaN where the window of a layer hides the "gold" documents from the
            query, and for "ndcg" any document. The extra "documents" is doc, Float [n l h s].

    Raises:
        PromptError: If partners differ in their documents.
        SpanError: If a span is missing.
        UsageError: If the metric is unknown.

    Examples:
        >>> one = {"documents": ["Sky is blue.", "Sun is hot."], "gold": "Sun is hot."}
        >>> texts = [(f"Sky is blue. Sun is hot. {query}", query) for query in ("Sun?", "N/A")]
        >>> items = [{"text": text, "spans": {**one, "query": query}} for text, query in texts]
        >>> asked, null = (interp.Prompts.encode(tokenizer, [item]) for item in items)
        >>> interp.identify.qrhead(model, asked, null).extras["documents"].shape
        torch.Size([1, 2, 4, 2])

    Source:
        QRHead, Zhang et al. 2506.09944, by the released code, which keeps 16 heads.

    Differs:
        Both prompts are read in full, where the code continues one cache. The softmax is in float32, and the windows of
        sliding layers are respected.

    Limits:
        Does not show that the answer is used. The query may find a document by its words alone.
    """
    if metric not in ("score", "ndcg"):
        raise UsageError(f"unknown metric {metric!r}; choose from 'score', 'ndcg'.")
    _check(prompts, null)
    found = [
        _received(model, side, prompts, batch_size, title if progress else None)
        for side, title in ((prompts, "qrhead"), (null, "qrhead, null query"))
    ]
    documents, parts = [], []
    for prompt, (mine, seen), (other, _) in zip(prompts, *found, strict=True):
        doc = _by_document(mine - other, prompt.spans["documents"])
        gold = [prompt.spans["documents"].index(place) for place in prompt.spans["gold"]]
        score = doc[..., gold].sum(-1) if metric == "score" else _ndcg(doc, gold)
        wanted = seen[..., gold].any(-1) if metric == "score" else seen.all(-1)
        parts.append(score.masked_fill(~wanted, torch.nan))
        documents.append(doc.masked_fill(~seen, torch.nan))
    most = max(doc.shape[-1] for doc in documents)
    wide = [nn.functional.pad(doc, (0, most - doc.shape[-1]), value=torch.nan) for doc in documents]
    return HeadScores(
        name="qrhead" if metric == "score" else "qrhead_ndcg",
        per_prompt=torch.stack(parts),
        unit="share of attention, less that of no query" if metric == "score" else "nDCG@10",
        kv_heads=HeadLayout.of(model).kv_heads,
        settings={"metric": metric},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed),
        extras={"documents": torch.stack(wide)},
        seed=seed,
        labels=tuple(str(prompt.meta.get("key", "")) for prompt in prompts),
    )


def _by_document(c: Float[Tensor, "l h k"], places: Sequence[tuple[int, int]]) -> Float[Tensor, "l h s"]:
    """Sum over the tokens of each document that are above mean - 2 std of its tokens."""
    sums = []
    for start, stop in places:
        part = c[..., start:stop]
        # one token has no spread
        low = part.mean(-1, keepdim=True) - 2 * part.std(-1, keepdim=True, correction=int(stop - start > 1))
        sums.append((part * (part > low)).sum(-1))
    return torch.stack(sums, -1)


def _ndcg(doc: Float[Tensor, "l h s"], gold: Sequence[int]) -> Float[Tensor, "l h"]:
    """nDCG at 10 of the documents in descending order; ties go to the earlier document."""
    order = doc.sort(dim=-1, descending=True, stable=True).indices[..., :NDCG_DEPTH]
    gain = torch.tensor([1 / math.log2(rank + 2) for rank in range(order.shape[-1])])
    hit = torch.isin(order, torch.tensor(gold))
    return (hit * gain).sum(-1) / gain[: len(gold)].sum()


def _received(
    model: nn.Module, prompts: Prompts, marked: Prompts, batch_size: int, title: str | None
) -> list[tuple[Tensor, Tensor]]:
    """Attention that each token up to the end of the last document receives from the query, mean over its rows, [l h k]
    each; and whether the query can see the documents that `marked` marks, Bool [l h s]."""
    made: list[Columns] = []
    sight, numbers = Visibility(), iter(range(len(prompts)))

    def keep(batch: Prompts) -> Columns:
        # the end of a document is what a window hides last
        ends = [[stop - 1 for _, stop in marked[next(numbers)].spans["documents"]] for _ in batch]
        sight.start(keys_from([prompt.spans["query"][0][0] for prompt in batch], ends))
        rows = batch.span_mask("query").float()
        made.append(columns("sum", rows / rows.sum(1, keepdim=True)))
        return made[-1]

    found, marks = [], iter(marked)
    with tapping(model, sight):
        for batch, cap in read(model, prompts, keep, queries="query", batch_size=batch_size, progress=title):
            received, seen = cap[made.pop()], sight.seen
            for b in range(len(batch)):
                prompt = next(marks)
                own = seen[b, :, :, : len(prompt.spans["documents"])]
                found.append((received[b, :, :, : _end(prompt)].clone(), own))
    return found


def _end(prompt: Prompt) -> int:
    return prompt.spans["documents"][-1][1]


def _check(prompts: Prompts, null: Prompts) -> None:
    for name in ("documents", "gold", "query"):
        prompts.span(name)
    null.span("query")
    if len(prompts) != len(null):
        raise PromptError(
            f"{len(prompts)} prompts and {len(null)} null prompts do not match; give one partner for each prompt."
        )
    for number, (prompt, other) in enumerate(zip(prompts, null, strict=True)):
        end = _end(prompt)
        if prompt.ids[:end] != other.ids[:end] or min(p.spans["query"][0][0] for p in (prompt, other)) < end:
            raise PromptError(
                f"prompt {number} and its null partner differ before the end of the documents, or have the query "
                "before it; put equal documents first and the query last, as tasks.documents does."
            )
        if not set(prompt.spans["gold"]) <= set(prompt.spans["documents"]):
            raise PromptError(f'"gold" of prompt {number} is not one of its documents; mark whole documents.')
