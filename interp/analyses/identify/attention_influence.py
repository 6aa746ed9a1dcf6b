"""AttentionInfluence: how much worse a model predicts a document when its retrieval heads are masked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.causal.ablation_test import bootstrap, conditions
from interp.analyses.measures.losses import token_losses
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, ablate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts


@dataclass(frozen=True, eq=False)
class Influence:
    """Losses of every document as loaded, with the heads masked, and with random heads masked."""

    heads: HeadSet
    kind: str
    """the ablation"""
    base: Float[Tensor, "p"]
    """nats per token, as loaded"""
    masked: Float[Tensor, "p"]
    controls: dict[str, Float[Tensor, "r p"]]
    """"random" and "random by layer": losses of each draw"""
    labels: tuple[str, ...] = ()
    seed: int = 0

    @property
    def values(self) -> Float[Tensor, "p"]:
        """(masked - base) / base, Eq. 5."""
        return (self.masked - self.base) / self.base

    @property
    def ranking(self) -> list[int]:
        """Numbers of the documents, the most influenced first."""
        return self.values.sort(descending=True, stable=True).indices.tolist()

    def control(self, name: str = "random") -> Float[Tensor, "r p"]:
        """The same influence of random heads, by draw. Raises UsageError for a control that there is not."""
        if name not in self.controls:
            raise UsageError(f"control {name!r} is none: take one of {', '.join(map(repr, self.controls))}.")
        return (self.controls[name] - self.base) / self.base

    def group(self, name: str = "heads") -> tuple[float, float, float]:
        """Mean influence of "heads" or of a control, and its 95% interval over documents (and draws)."""
        rows: Any = (self.values[None] if name == "heads" else self.control(name)).tolist()
        return sum(map(sum, rows)) / sum(map(len, rows)), *bootstrap(rows, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: heads as names, a row for each document in the order given."""
        place = {document: rank for rank, document in enumerate(self.ranking)}
        random = {name: self.control(name).mean(0) for name in self.controls}
        rows = [
            {
                "label": self.labels[i] if self.labels else "",
                "base": float(self.base[i]),
                "masked": float(self.masked[i]),
                "influence": float(self.values[i]),
                "rank": place[i],
                **{name: float(values[i]) for name, values in random.items()},
            }
            for i in range(len(self.base))
        ]
        heads = [str(head) for head in self.heads]
        groups = {name: self.group(name) for name in ("heads", *self.controls)}
        return {"kind": self.kind, "heads": heads, "seed": self.seed, "groups": groups, "documents": rows}

    def __str__(self) -> str:
        lines = []
        for name in ("heads", *self.controls):
            mean, low, high = self.group(name)
            lines.append(f"{name:16s} {mean:+.3f}  [{low:+.3f}, {high:+.3f}]")
        return "\n".join(lines)


def attention_influence(
    model: nn.Module,
    documents: Prompts | Sequence[str],
    heads: HeadScores | Any,
    *,
    share: float = 0.05,
    kind: AblationKind = "uniform",
    reference: Prompts | None = None,
    tokenizer: Any = None,
    draws: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Influence:
    """Influence of heads on documents: the relative rise of a document's loss with the heads masked.

    AI[p] = (masked[p] - base[p]) / base[p], both the mean next-token cross-entropy of document p. Beside it the same
    for as many random heads of the rest, `draws` times, drawn freely and matched by layer.
    documents: prompts, or texts and their tokenizer. heads: scores, of which the top `share` of all heads with a score
    above 0 are masked, or anything HeadSet.parse takes. kind, reference: see `ablate`; "uniform" gives equal weights to
    all visible keys.
    Raises UsageError for texts without a tokenizer and where there are no heads, PromptError for a document of one
    token or longer than the context, HeadError where too few heads are left to draw from.
    Source: AttentionInfluence, 2505.07293, Eq. 5, top 5% of heads by `identify.retrieval` on a small model. Differs:
    the paper's mask is in an appendix that was not read, so equal weights are our reading; random heads are ours.
    Cannot show: quality. Scores compare only within one domain (general, math, code); repetitive text inflates them, so
    deduplicate first; a document that the model predicts well has a small base, and a large score for little.
    """
    if not isinstance(documents, Prompts):
        if tokenizer is None:
            raise UsageError("documents are texts and there is no tokenizer: pass tokenizer=, or give prompts.")
        documents = Prompts.encode(tokenizer, documents)
    layout = HeadLayout.of(model)
    if not 0 < share <= 1:
        raise UsageError(f"share={share}: give a share of all heads above 0, 1 at most.")
    if isinstance(heads, HeadScores):
        chosen = heads.heads(top=max(1, round(share * layout.size)), above=0.0)
    else:
        chosen = HeadSet.parse(heads, layout)
    losses: dict[str, list[Tensor]] = {}
    rows = conditions(chosen, layout, draws, seed)
    for condition in tqdm(rows, desc="attention influence", disable=not progress, delay=2, leave=False):
        with ablate(model, condition.heads, kind, reference=reference, seed=seed):
            losses.setdefault(condition.group, []).append(token_losses(model, documents, batch_size))
    return Influence(
        heads=chosen,
        kind=kind,
        base=losses.pop("as loaded")[0],
        masked=losses.pop("top")[0],
        controls={name: torch.stack(drawn) for name, drawn in losses.items()},
        labels=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(documents)),
        seed=seed,
    )
