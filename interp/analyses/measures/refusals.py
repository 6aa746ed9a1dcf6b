"""Whether a model refuses at all, and measures of it for causal curves: refusals, and what else breaks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.ablation_test import Judge
from interp.analyses.measures.losses import token_losses
from interp.analyses.tasks.judges import contains
from interp.analyses.tasks.refused import refused
from interp.errors import UsageError
from interp.hooks.generate import generate
from interp.hooks.prompts.prompts import Prompt, Prompts

REPLY = 32
"""new tokens of a reply"""
LEAST = 8
"""refused requests from which on heads are asked for"""


@dataclass(frozen=True)
class Replies:
    """Greedy replies to some requests, and which of them refuse."""

    prompts: Prompts
    texts: tuple[str, ...]
    verdicts: tuple[bool, ...]
    first: tuple[int, ...] = ()
    """the token that each reply begins with, -1 for an empty reply"""

    @property
    def rate(self) -> float:
        return sum(self.verdicts) / len(self.verdicts)

    def to_dict(self, keep_text: bool = False) -> dict[str, Any]:
        """JSON-able: verdicts and the first 40 characters of each reply, or all of it."""
        shown = [text if keep_text else text[:40] for text in self.texts]
        ids = [str(prompt.meta.get("id", number)) for number, prompt in enumerate(self.prompts)]
        told = {"ids": ids, "refused": list(self.verdicts), "first": list(self.first)}
        return {**told, "text" if keep_text else "begins": shown}


def ask(
    model: nn.Module, prompts: Prompts, *, max_new_tokens: int = REPLY, batch_size: int = 8, progress: bool = False
) -> Replies:
    """Greedy replies to requests as the model stands, and whether each refuses, by `tasks.refused`."""
    from tqdm.auto import tqdm

    texts: list[str] = []
    first: list[int] = []
    batches = list(prompts.batches(batch_size))
    for batch in tqdm(batches, desc="replies", disable=not progress, delay=2, leave=False):
        replies = generate(model, batch, max_new_tokens=max_new_tokens)
        texts += [reply.text for reply in replies]
        first += [reply.ids[0] if reply.ids else -1 for reply in replies]
    verdicts = tuple(refused(text, prompt) for text, prompt in zip(texts, prompts, strict=True))
    return Replies(prompts, tuple(texts), verdicts, tuple(first))


def check_contrast(harmful: Replies, harmless: Replies, least: int = LEAST, level: float = 0.01) -> None:
    """Raise UsageError where a model shows no refusal to attribute to heads.

    It must refuse at least `least` harmful requests, and a larger share of them than of harmless ones: Fisher's exact
    test, one-sided, below `level`. Cannot show: that what it refuses is what is harmful.
    """
    from scipy.stats import fisher_exact

    rows = [[sum(r.verdicts), len(r.verdicts) - sum(r.verdicts)] for r in (harmful, harmless)]
    found: Any = fisher_exact(rows, alternative="greater")
    if rows[0][0] < least or found.pvalue >= level:
        raise UsageError(
            f"this model refuses {rows[0][0]} of {len(harmful.verdicts)} harmful and {rows[1][0]} of "
            f"{len(harmless.verdicts)} harmless requests: there is no behaviour to attribute to heads; take a model "
            "that refuses, or requests of your own."
        )


def refusals(prompts: Prompts, *, max_new_tokens: int = REPLY, batch_size: int = 8) -> Callable[[nn.Module], Tensor]:
    """A measure: 1 for each request that the model refuses as it stands, [p]."""

    def measure(model: nn.Module) -> Tensor:
        return torch.tensor(ask(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size).verdicts).float()

    return measure


def right(
    prompts: Prompts, judge: Judge = contains, *, max_new_tokens: int = 16, batch_size: int = 8
) -> Callable[[nn.Module], Tensor]:
    """A measure: 1 for each question that the model answers right, [p]."""

    def measure(model: nn.Module) -> Tensor:
        verdicts: list[bool] = []
        for batch in prompts.batches(batch_size):
            replies = generate(model, batch, max_new_tokens=max_new_tokens)
            verdicts += [judge(reply.text, prompt) for reply, prompt in zip(replies, batch, strict=True)]
        return torch.tensor(verdicts).float()

    return measure


def losses(prompts: Prompts, *, batch_size: int = 8) -> Callable[[nn.Module], Tensor]:
    """A measure: the mean next-token loss of each text, [p], nats per token."""
    return lambda model: token_losses(model, prompts, batch_size)


def first_token_loss(replies: Replies) -> Callable[[Tensor, Prompts], Tensor]:
    """A loss for `importance`: -log P of the token that a reply as loaded begins with, by the prompt's ids.

    Its slope says which heads hold the beginning of a refusal up, first order. Raises UsageError for a prompt that was
    not among the replies.
    """
    begun = {prompt.ids: token for prompt, token in zip(replies.prompts, replies.first, strict=True) if token >= 0}

    def loss(logits: Tensor, batch: Prompts) -> Tensor:
        missing = [prompt for prompt in batch if prompt.ids not in begun]
        if missing:
            raise UsageError(f"prompt {_id(missing[0])} has no reply to begin with: give the prompts of the replies.")
        tokens = torch.tensor([begun[prompt.ids] for prompt in batch], device=logits.device)
        return -logits[:, -1].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    return loss


def _id(prompt: Prompt) -> str:
    return str(prompt.meta.get("id", "without an id"))
