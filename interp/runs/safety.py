"""The recipe of `interp safety`: which heads refusals depend on, and what refuses without them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.errors import UsageError
from interp.runs.plan import at_least_one

if TYPE_CHECKING:
    from torch import nn

    from interp.hooks.prompts.prompts import Prompts
    from interp.runs.stage import Stage

ABLATIONS = ("uniform", "zero")


@dataclass(frozen=True, kw_only=True)
class SafetyPlan:
    """A run that finds the heads that refusals depend on, and tests them.

    Attributes:
        requests: A CSV file of your own harmful requests, with a header; by default those of the package.
        column: Column of the requests; by default goal, prompt, input or the like.
        n_harmful: Number of harmful requests to answer.
        n_harmless: Number of harmless requests to answer.
        n_scored: Number of refused requests that heads are scored on.
        n_tested: Number of further refused requests on which the ablation curves are measured.
        n_neutral: Number of neutral texts whose loss is measured.
        n_easy: Number of easy questions.
        ablations: Ablations: uniform, zero, or both.
        group_size: Number of heads of the largest Sahara group.
        head_set_sizes: Numbers of heads that the curves ablate.
        stop_below: Stop ablating more heads of a ranking once the share of refusals falls to this.
        reply_tokens: Number of new tokens of a reply.
        n_random_sets: Number of random head sets, matched by layer, for each ranking and size; a verdict needs 39,
            and more where few of the rankings and sizes have an effect. Up to 3 more, of heads from any layer, are
            shown; the test does not use them.
        seed: Seed of random head sets and confidence intervals.
        batch_size: Number of prompts per forward pass.
        keep_text: Store whole replies rather than their first 40 characters.
    """

    recipe: ClassVar[str] = "safety"
    requests: str = ""
    column: str | None = None
    n_harmful: int = 100
    n_harmless: int = 50
    n_scored: int = 32
    n_tested: int = 32
    n_neutral: int = 10
    n_easy: int = 20
    ablations: tuple[str, ...] = ABLATIONS
    group_size: int = 5
    head_set_sizes: tuple[int, ...] = (1, 3, 5, 10, 20, 33)
    stop_below: float = 0.5
    reply_tokens: int = REPLY_TOKENS
    n_random_sets: int = N_RANDOM_SETS
    seed: int = 0
    batch_size: int = 8
    keep_text: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.ablations if name not in ABLATIONS]
        if unknown or not self.ablations:
            raise UsageError(f"unknown ablation {', '.join(unknown) or 'none'}; choose uniform, zero, or both.")
        at_least_one(
            self, "n_harmful", "n_harmless", "n_scored", "n_tested", "n_neutral", "n_easy", "group_size",
            "reply_tokens", "n_random_sets", "batch_size",
        )  # fmt: skip
        if not self.head_set_sizes or min(self.head_set_sizes) < 1:
            raise UsageError(f"head_set_sizes={self.head_set_sizes} is not valid; give sizes of at least 1.")
        if self.n_scored < 2:
            raise UsageError("n_scored=1 is too small; Sahara turns a subspace of prompts, so give at least 2.")

    def stages(self, model: "nn.Module", tokenizer: Any, own: "Prompts | None" = None) -> "Sequence[Stage]":
        """Replies, head scores by gradient, Ships and Sahara, curves of all rankings, and the whole of it.

        Args:
            model: The model that is run.
            tokenizer: Its tokenizer.
            own: Prompts that take the place of the standard ones.

        Returns:
            The stages.
        """
        from interp.hooks.model.heads import HeadLayout
        from interp.runs.stages.refusals import Refusals

        n_heads = HeadLayout.of(model).size
        if 2 * min(self.head_set_sizes) > n_heads:
            raise UsageError(
                f"head_set_sizes={self.head_set_sizes} are all more than half of the {n_heads} heads of this model, "
                "which leaves no random control; give smaller sizes."
            )
        refusals = Refusals.of(self, model, tokenizer)
        found = [refusals.replies("harmful"), refusals.replies("harmless"), refusals.importance()]
        for ablation in self.ablations:
            found += [refusals.ships(ablation), refusals.sahara(ablation), refusals.curve(ablation)]
        return [*found, refusals.whole()]
