"""Refusals of a model, and measures for causal curves: refusals, right answers, and losses of neutral texts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.measures.losses import Loss, token_losses
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.analyses.results.trials import Trials
from interp.analyses.tasks.judges import contains
from interp.analyses.tasks.refused import refused
from interp.analyses.tasks.task import Judge
from interp.errors import UsageError
from interp.hooks.generate import generate
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts

Measure = Callable[[nn.Module], Tensor]
"""a function of the model that returns `[p]` numbers, one for each prompt of the measure"""
MIN_REFUSED = 8
"""number of refused requests below which no refusal is attributed to heads"""
SHOWN_CHARACTERS = 40
"""characters of a reply that are kept where the whole text is not"""


@dataclass(frozen=True)
class Replies:
    """Greedy replies to requests, and which of them refuse."""

    prompts: Prompts
    texts: tuple[str, ...]
    """the replies, or their first characters"""
    refused: tuple[bool, ...]
    first_tokens: tuple[int, ...] = ()
    """first token of each reply, -1 for an empty reply"""

    @property
    def rate(self) -> float:
        """Share of the requests that are refused."""
        return sum(self.refused) / len(self.refused)

    def select(self, numbers: list[int]) -> "Replies":
        """The replies to some of the requests.

        Args:
            numbers: Which requests, in the order wanted.
        """

        def pick(values: Any) -> Any:
            return tuple(values[i] for i in numbers)

        prompts = replace(self.prompts, items=pick(self.prompts.items))
        return Replies(prompts, pick(self.texts), pick(self.refused), pick(self.first_tokens))

    def record(self, keep_text: bool = False) -> "RefusalReplies":
        """The part of the replies that a result stores.

        Args:
            keep_text: Keep the whole replies in place of their first 40 characters.
        """
        return RefusalReplies(
            ids=tuple(str(prompt.meta.get("id", number)) for number, prompt in enumerate(self.prompts)),
            refused=self.refused,
            begins=tuple(text if keep_text else text[:SHOWN_CHARACTERS] for text in self.texts),
            first_tokens=self.first_tokens,
        )


@result
@dataclass(frozen=True)
class RefusalReplies:
    """Verdicts on the replies to a set of requests."""

    ids: tuple[str, ...]
    """id of each request"""
    refused: tuple[bool, ...]
    """whether the model refuses it"""
    begins: tuple[str, ...]
    """the first 40 characters of the reply, or all of it"""
    first_tokens: tuple[int, ...] = ()
    """first token of each reply, -1 for an empty reply"""


@result
@dataclass(frozen=True, eq=False)
class RefusalResult(Result):
    """Refusals of a model, and how they depend on heads."""

    replies: dict[str, RefusalReplies]
    """"harmful" and "harmless" -> replies of the unmodified model"""
    groups: dict[str, Trials] = field(default_factory=dict)
    """ablation -> the groups of `sahara`, compared with random heads"""
    curves: dict[str, Trials] = field(default_factory=dict)
    """ablation -> refusals and other measures with heads ablated, see `causal_curve`"""
    provenance: Provenance | None = None
    """the model, tokenizer and versions that the numbers come from"""

    def to_frame(self) -> Any:
        """The long tables of all curves and groups as one pandas DataFrame, with the columns "ablation" and "part"."""
        import pandas as pd

        parts = [(kind, "curve", found) for kind, found in self.curves.items()]
        parts += [(kind, "group", found) for kind, found in self.groups.items()]
        frames = [found.to_frame().assign(ablation=kind, part=part) for kind, part, found in parts]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def summary(self, top: int = 10) -> str:
        """Number of refusals of each set of requests, then each curve.

        Args:
            top: Not used, since no heads are listed.
        """
        lines = [
            f"{name} requests: {sum(found.refused)} of {len(found.refused)} refused"
            for name, found in self.replies.items()
        ]
        for kind, found in self.curves.items():
            lines += [f"{kind} ablation:", found.summary(top)]
        return "\n".join(lines)


def reply_to_requests(
    model: nn.Module,
    prompts: Prompts,
    *,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    progress: bool = False,
) -> Replies:
    """Greedy replies to requests, and whether each refuses, by `tasks.refused`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one, with any context open on it.
        prompts: Requests, such as `tasks.refusal.requests`.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Returns:
        Replies: Texts, verdicts and first tokens.

    Examples:
        >>> from interp.analyses.measures.refusals import reply_to_requests
        >>> replies = reply_to_requests(model, prompts, max_new_tokens=2)
        >>> replies.refused
        (False, False)
    """
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


def refused_numbers(
    model: nn.Module,
    prompts: Prompts,
    judge: Judge | None,
    *,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    progress: bool = False,
) -> list[int]:
    """Numbers of the requests that the model refuses, which are those that an analysis of refusals may use.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The requests.
        judge: Function of a reply and its prompt that returns whether it refuses; None takes all requests.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.
        progress: Show a progress bar.

    Raises:
        UsageError: If there is a judge, and the prompts have no tokenizer that makes a text of a reply.
    """
    if judge is None:
        return list(range(len(prompts)))
    if prompts.tokenizer is None:
        raise UsageError(
            "the prompts have no tokenizer, so replies have no text that could be a refusal; give prompts with a "
            "tokenizer, or judge=None for requests that the model is known to refuse."
        )
    replies = reply_to_requests(
        model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    ).texts
    return [number for number, text in enumerate(replies) if judge(text, prompts[number])]


def check_contrast(harmful: Replies, harmless: Replies, min_refused: int = MIN_REFUSED, level: float = 0.01) -> None:
    """Raise where a model shows no refusals that could be attributed to heads.

    It must refuse at least `min_refused` harmful requests, and a larger share of them than of harmless ones, by the
    one-sided exact test of Fisher.

    Args:
        harmful: Replies to harmful requests.
        harmless: Replies to harmless requests.
        min_refused: Least number of refused harmful requests.
        level: Level of the test.

    Raises:
        UsageError: If the model does not refuse in this sense.

    Limits:
        Does not show that the model refuses requests because they are harmful.
    """
    from scipy.stats import fisher_exact

    rows = [[sum(r.refused), len(r.refused) - sum(r.refused)] for r in (harmful, harmless)]
    found: Any = fisher_exact(rows, alternative="greater")
    if rows[0][0] < min_refused or found.pvalue >= level:
        raise UsageError(
            f"this model refuses {rows[0][0]} of {len(harmful.refused)} harmful and {rows[1][0]} of "
            f"{len(harmless.refused)} harmless requests, so it shows no refusal to attribute to heads; use a model "
            "that refuses, or requests of your own."
        )


def refusals(prompts: Prompts, *, max_new_tokens: int = REPLY_TOKENS, batch_size: int = 8) -> Measure:
    """A measure for `causal_curve`: 1 for each request that the model refuses, otherwise 0.

    Args:
        prompts: The requests.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.

    Returns:
        Measure: A function of the model that returns `[p]`.
    """

    def measure(model: nn.Module) -> Tensor:
        found = reply_to_requests(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        return torch.tensor(found.refused).float()

    return measure


def right_answers(
    prompts: Prompts, judge: Judge = contains, *, max_new_tokens: int = 16, batch_size: int = 8
) -> Measure:
    """A measure for `causal_curve`: 1 for each question that the model answers right, otherwise 0.

    Args:
        prompts: The questions.
        judge: Function of a reply and its prompt that returns whether the reply is right.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.

    Returns:
        Measure: A function of the model that returns `[p]`.
    """

    def measure(model: nn.Module) -> Tensor:
        verdicts: list[bool] = []
        for batch in prompts.batches(batch_size):
            replies = generate(model, batch, max_new_tokens=max_new_tokens)
            verdicts += [judge(reply.text, prompt) for reply, prompt in zip(replies, batch, strict=True)]
        return torch.tensor(verdicts).float()

    return measure


def losses(prompts: Prompts, *, batch_size: int = 8) -> Measure:
    """A measure for `causal_curve`: the mean next-token loss of each text, in nats per token.

    Args:
        prompts: The texts.
        batch_size: Number of prompts per forward pass.

    Returns:
        Measure: A function of the model that returns `[p]`.
    """
    return lambda model: token_losses(model, prompts, batch_size)


def first_token_loss(replies: Replies) -> Loss:
    """A loss for `gradient_importance`: -log P of the token with which the model began its reply.

    Its gradient shows which heads support the beginning of a refusal, to first order.

    Args:
        replies: Replies of the unmodified model.

    Returns:
        Loss: A function of logits and batch that finds the reply of a prompt by its token ids. It raises UsageError for
        a prompt that has none.
    """
    pairs = zip(replies.prompts, replies.first_tokens, strict=True)
    begun = {prompt.ids: token for prompt, token in pairs if token >= 0}

    def loss(logits: Tensor, batch: Prompts) -> Tensor:
        missing = [prompt for prompt in batch if prompt.ids not in begun]
        if missing:
            raise UsageError(f"prompt {_id(missing[0])} has no reply to begin with; give the prompts of the replies.")
        tokens = torch.tensor([begun[prompt.ids] for prompt in batch], device=logits.device)
        return -logits[:, -1].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    return loss


def _id(prompt: Prompt) -> str:
    return str(prompt.meta.get("id", "without an id"))
