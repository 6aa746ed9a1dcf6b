"""Controls of head scores: how the top heads of an analysis are tested by ablation.

A declaration names one of `answers()`, `logit_difference()` and `loss()`. A control is called with the scores and
returns Trials, in which the top heads are compared with random heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, ClassVar

from torch import nn

from interp.analyses.causal.ablated_measures import NATS, Measure, accuracy
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.control_costs import cost_of, n_sets, n_tested
from interp.analyses.causal.curve import causal_curve
from interp.analyses.causal.further_conditions import of_top_heads
from interp.analyses.costs import Cost
from interp.analyses.measures.answer_logits import logit_differences
from interp.analyses.measures.losses import SpanLoss, token_losses
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.shown_behaviour import COUNTED
from interp.analyses.results.trials import Trials
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

OWN_PROMPTS = """The heads were chosen by this measure on these prompts, so their effect is overestimated, and there \
is no test against random heads."""
MAX_LOSS_LENGTH = 96
"""tokens of a prompt that a loss with a limit of tokens reads, where all tokens of a prompt count"""


@dataclass(frozen=True)
class Control:
    """Base class of the controls."""

    title: ClassVar[str]
    """heading in reports"""
    measure: ClassVar[str]
    """name of the measure, where the prompts do not change it"""
    unit: ClassVar[str] = ""
    """unit of the measure, where it has one"""
    own_prompts: ClassVar[bool] = True
    """whether the prompts are those of the analysis"""
    shown_above: ClassVar[float | None] = None
    """number that the measure exceeds on a prompt where the unmodified model shows the behaviour; None for any"""

    @property
    def chooses(self) -> bool:
        """Whether scores that name this control are made of its measure, so that it needs other prompts than they."""
        return True

    @property
    def new_tokens(self) -> int:
        """New tokens that must fit after a prompt."""
        return 0

    def with_sizes(self, sizes: standard.PromptSizes) -> "Control":
        """The control with the sizes of a run, such as the number of new tokens of a reply.

        Args:
            sizes: Number and length of the prompts of the run.
        """
        return self

    def prompts(self, sizes: standard.PromptSizes, tokenizer: Any) -> Prompts | None:
        """The prompts of the control, None where it takes those of the analysis.

        Args:
            sizes: Number and length of the prompts of the run.
            tokenizer: The tokenizer of the model.
        """
        return None

    def used(self, prompts: Prompts) -> Prompts:
        """Those of the prompts that are measured."""
        return prompts

    def shown(self, name: str) -> dict[str, float]:
        """The condition on the measure of this name under which a prompt counts, for `causal_curve`."""
        return {} if self.shown_above is None else {name: self.shown_above}

    def showing(self, model: nn.Module, prompts: Prompts, batch_size: int) -> tuple[Prompts, list[int]]:
        """The prompts on which the unmodified model shows the behaviour, all where there are none, and both counts.

        Args:
            model: The unmodified model.
            prompts: `used(prompts)`.
            batch_size: Number of prompts per forward pass.
        """
        if self.shown_above is None:
            return prompts, []
        values = self.measure_on(prompts, batch_size)[1](model)
        items = tuple(compress(prompts, (values > self.shown_above).tolist()))
        limit = self.n_prompts or len(prompts)
        return replace(prompts, items=items[:limit] or prompts.items), [len(items), len(prompts)]

    @property
    def n_prompts(self) -> int | None:
        """Number of prompts that are used at most, of those on which the model shows the behaviour; None for all."""
        return None

    def head_counts(self, n_heads: int, layout: HeadLayout) -> list[int]:
        """Numbers of heads that are ablated."""
        return sorted({max(1, n_heads // 3), n_heads})

    def __call__(
        self,
        model: nn.Module,
        prompts: Prompts,
        scores: HeadScores,
        *,
        n_heads: int,
        n_random_sets: int,
        ablation: AblationKind = "zero",
        kinds: Sequence[AblationKind] = (),
        reference: Prompts | None = None,
        neutral: Prompts | None = None,
        heads: HeadSet | None = None,
        batch_size: int = 8,
        held_out: bool = False,
        seed: int = 0,
        folder: Any = None,
        progress: bool = False,
    ) -> Trials:
        """Ablate the top heads of the scores, compared with random heads.

        Args:
            model: A transformers causal language model, or a TransformerBridge over one.
            prompts: `prompts(sizes, tokenizer)`, or the prompts of the analysis where that is None.
            scores: The scores under test.
            n_heads: Number of heads from the top of the scores.
            n_random_sets: Number of random sets that are matched by layer, for each size.
            ablation: The ablation, see `ablate`.
            kinds: Other ablations of the tested heads, without random sets.
            reference: Prompts that the ablations "mean" and "resample" take values from.
            neutral: Plain texts, whose loss is a further measure of the baseline and of tested heads.
            heads: Heads to test in place of the top ones.
            batch_size: Number of prompts per forward pass.
            held_out: Whether the scores come from other prompts; else a control with their own measure has no test.
            seed: Seed of the random heads and of the confidence intervals.
            folder: Where finished conditions are kept, so that an interrupted control continues.
            progress: Show a progress bar.

        Returns:
            Trials: Under the name of the scores.

        Raises:
            UsageError: If there are no heads to ablate, or too few other heads to draw from.
            PromptError: If the prompts lack what the measure needs.
        """
        used, counted = self.showing(model, self.used(prompts), batch_size)
        name, measure = self.measure_on(used, batch_size)
        # heads that share the lowest score are never ranked, so a table may rank fewer than are asked for
        n_ranked = len(scores.top(n_heads)) or n_heads
        counts = [len(heads)] if heads is not None else self.head_counts(min(n_heads, n_ranked), scores.layout)
        found = causal_curve(
            model,
            {scores.name: scores if heads is None else list(heads)},
            {name: measure},
            sizes=counts,
            shown=self.shown(name),
            ablation=ablation,
            kinds=kinds,
            reference=reference,
            neutral=neutral,
            sufficiency=True,
            n_random_sets=n_random_sets,
            seed=seed,
            folder=folder,
            about=None if folder is None else [type(self).__name__, used.fingerprint()],
            progress=progress,
        )
        return self.describe(replace(found, title=self.title), name, counted, held_out or heads is not None)

    def describe(self, found: Trials, name: str, counted: list[int], held_out: bool) -> Trials:
        """The trials with the unit of the measure and the prompts that count, and without a test where it has none.

        Args:
            found: Trials of this measure.
            name: Name of the measure.
            counted: As `showing` returns it.
            held_out: Whether the heads were chosen without these prompts.
        """
        own, found = self.chooses and not held_out, of_top_heads(found)
        return replace(
            found,
            claim=None if own else found.claim,
            claims={} if own else found.claims,
            units=found.units | ({name: self.unit} if self.unit else {}),
            notes=(*((OWN_PROMPTS,) if own else ()), *found.notes),
            settings=found.settings | ({COUNTED: {name: counted}} if counted else {}),
        )

    def measure_on(self, prompts: Prompts, batch_size: int) -> tuple[str, Measure]:
        """The name of the measure on these prompts, and the function of the model that takes it."""
        raise NotImplementedError

    def cost(
        self, model: nn.Module, prompts: Prompts, batch_size: int, *, n_heads: int, n_random_sets: int, n_kinds: int = 0
    ) -> Cost:
        """Cost of the control on one model and set of prompts, without running it.

        Args:
            model: The model.
            prompts: As in `__call__`.
            batch_size: Number of prompts per forward pass.
            n_heads: Number of heads from the top of the scores.
            n_random_sets: Number of random sets that are matched by layer, for each size.
            n_kinds: Number of other ablations.

        Returns:
            Cost: Of all sets. Draws that end early and passes that begin at a later layer cost less.
        """
        n_sizes = len(self.head_counts(n_heads, HeadLayout.of(model)))
        conditions = 1 + n_sizes * (n_tested(n_kinds) + n_sets(n_random_sets))
        return self.cost_of_conditions(model, prompts, batch_size, conditions)

    def cost_of_conditions(self, model: nn.Module, prompts: Prompts, batch_size: int, n: int) -> Cost:
        """Cost of the measure under several conditions.

        Args:
            model: As in `cost`.
            prompts: As in `cost`.
            batch_size: As in `cost`.
            n: Number of conditions.
        """
        return cost_of(model, self.used(prompts), batch_size, n, self.new_tokens)


@dataclass(frozen=True)
class Answers(Control):
    """Accuracy of greedy replies to needle prompts that were not used to score the heads, see `ablation_test`."""

    max_new_tokens: int = REPLY_TOKENS
    """number of new tokens of a reply, at most; in a run that of the analyses"""
    n_used: int | None = None
    """number of prompts that are used at most, of those that the model answers right; None for all"""

    title: ClassVar[str] = "Accuracy with heads ablated"
    measure: ClassVar[str] = "accuracy"
    own_prompts: ClassVar[bool] = False
    shown_above: ClassVar[float | None] = 0.5

    @property
    def n_prompts(self) -> int | None:
        return self.n_used

    @property
    def chooses(self) -> bool:
        return False

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    def with_sizes(self, sizes: standard.PromptSizes) -> "Control":
        return replace(self, max_new_tokens=sizes.reply_tokens, n_used=sizes.n_check_needles)

    def prompts(self, sizes: standard.PromptSizes, tokenizer: Any) -> Prompts | None:
        return standard.check_needles(sizes, tokenizer)

    def head_counts(self, n_heads: int, layout: HeadLayout) -> list[int]:
        return [n_heads]

    def __call__(
        self,
        model: nn.Module,
        prompts: Prompts,
        scores: HeadScores,
        *,
        n_heads: int,
        n_random_sets: int,
        ablation: AblationKind = "zero",
        kinds: Sequence[AblationKind] = (),
        reference: Prompts | None = None,
        neutral: Prompts | None = None,
        heads: HeadSet | None = None,
        batch_size: int = 8,
        held_out: bool = False,
        seed: int = 0,
        folder: Any = None,
        progress: bool = False,
    ) -> Trials:
        found = ablation_test(
            model,
            prompts,
            scores if heads is None else heads,
            n_heads=n_heads,
            n_random_sets=n_random_sets,
            ablation=ablation,
            kinds=kinds,
            reference=reference,
            neutral=neutral,
            n_prompts=self.n_used,
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            folder=folder,
            progress=progress,
        )
        return replace(found, name=scores.name, title=self.title)

    def cost_of_conditions(self, model: nn.Module, prompts: Prompts, batch_size: int, n: int) -> Cost:
        # all prompts once, to find those that the model answers right
        every = cost_of(model, prompts, batch_size, 1, self.new_tokens)
        return every + cost_of(model, prompts[: self.n_used], batch_size, n, self.new_tokens)

    def measure_on(self, prompts: Prompts, batch_size: int) -> tuple[str, Measure]:
        return self.measure, accuracy(prompts, max_new_tokens=self.max_new_tokens, batch_size=batch_size)


@dataclass(frozen=True)
class LogitDifference(Control):
    """Logit of the right answer minus logit of the wrong one, on the prompts of the analysis."""

    title: ClassVar[str] = "Logit difference with heads ablated"
    measure: ClassVar[str] = "logit difference"
    shown_above: ClassVar[float | None] = 0.0

    def measure_on(self, prompts: Prompts, batch_size: int) -> tuple[str, Measure]:
        return self.measure, lambda model: logit_differences(model, prompts, batch_size)


@dataclass(frozen=True)
class Loss(Control):
    """Mean next-token loss, on the prompts of the analysis or on some of them."""

    span: str = ""
    """span whose tokens count where every prompt has it; otherwise all tokens count"""
    n_tokens: int | None = None
    """the control takes the first prompts that have so many tokens together, at least two prompts, and ablates at most
    a quarter of the heads; where all tokens of a prompt count it reads at most 96 of each; None for all prompts"""

    title: ClassVar[str] = "Loss with heads ablated"
    measure: ClassVar[str] = "loss"
    unit: ClassVar[str] = NATS

    @property
    def chooses(self) -> bool:
        # with a limit of tokens it controls scores of attention, which are not made of the loss
        return self.n_tokens is None

    def used(self, prompts: Prompts) -> Prompts:
        if self.n_tokens is None:
            return prompts
        if not self._has_span(prompts) and max(prompts.lengths) > MAX_LOSS_LENGTH:
            cut = [prompt.ids[:MAX_LOSS_LENGTH] for prompt in prompts]
            prompts = Prompts.from_ids(cut, pad_id=prompts.pad_id, tokenizer=prompts.tokenizer)
        count, tokens = 0, 0
        # an interval needs two prompts
        while count < len(prompts) and (tokens < self.n_tokens or count < 2):
            tokens += prompts.lengths[count]
            count += 1
        return prompts[:count]

    def head_counts(self, n_heads: int, layout: HeadLayout) -> list[int]:
        if self.n_tokens is None:
            return super().head_counts(n_heads, layout)
        # the random sets of other heads need as many heads again, which small models hardly have
        return [min(n_heads, max(1, layout.size // 4))]

    def _has_span(self, prompts: Prompts) -> bool:
        return bool(self.span) and all(self.span in prompt.spans for prompt in prompts)

    def measure_on(self, prompts: Prompts, batch_size: int) -> tuple[str, Measure]:
        if not self._has_span(prompts):
            return self.measure, lambda model: token_losses(model, prompts, batch_size)
        name = "loss on the second copy of repeated tokens" if self.span == "second" else f"loss on {self.span}"
        return name, lambda model: token_losses(model, prompts, batch_size, loss=SpanLoss(self.span))


def answers() -> Answers:
    """Test heads by the accuracy of replies to needle prompts that were not used to score them."""
    return Answers()


def logit_difference() -> LogitDifference:
    """Test heads by the logit difference between the right and the wrong answer, on the prompts of the analysis."""
    return LogitDifference()


def loss(span: str = "", n_tokens: int | None = None) -> Loss:
    """Test heads by the mean next-token loss, on the prompts of the analysis.

    Args:
        span: Span whose tokens count where every prompt has it; otherwise all tokens count.
        n_tokens: Take the first prompts that have so many tokens together, and ablate at most a quarter of the heads.

    Raises:
        UsageError: If `n_tokens` is less than 1.
    """
    if n_tokens is not None and n_tokens < 1:
        raise UsageError(f"n_tokens={n_tokens} leaves no prompt; give at least 1, or None for all prompts.")
    return Loss(span, n_tokens)
