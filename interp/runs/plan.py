"""Plans: the settings of a run, and the recipe that lists its stages.

Nothing heavy is imported until a plan is used, so that the command line can print its options at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from interp.analyses import registry
from interp.analyses.prompt_sizes import LENGTHS, PromptSizes, doubling, sizes_used
from interp.analyses.registry import Analysis
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.errors import PromptError, UsageError
from interp.hooks.limits import check_counts

if TYPE_CHECKING:
    from torch import nn

    from interp.hooks.prompts.prompts import Prompts
    from interp.runs.stage import Stage

Settings = Mapping[str, Mapping[str, Any]]
Ablation = Literal["zero", "uniform", "first"]
ABLATIONS: tuple[str, ...] = get_args(Ablation)
"""ablations that need no reference prompts"""
ALL_ABLATIONS = ("zero", "mean", "resample", "uniform", "first")


class Plan(Protocol):
    """The settings of a run: with one model, machine and set of versions they fix every number of it."""

    recipe: ClassVar[str]

    @property
    def seed(self) -> int:
        """Seed of prompts, random head sets and confidence intervals."""
        ...

    def stages(self, model: "nn.Module", tokenizer: Any, own: "Prompts | None" = None) -> "Sequence[Stage]":
        """The stages of a run, in the order in which they are made.

        Args:
            model: The model that is run.
            tokenizer: Its tokenizer.
            own: Prompts that take the place of the standard ones.

        Returns:
            The stages.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """A run that scores heads, tests the top ones, and adds the views of a report.

    Attributes:
        analyses: Names of the analyses, or of sets of them.
        sizes: Number and length of the prompts.
        settings: Settings by analysis, edit or selector, as {"qada": {"tau": 0.9}}.
        check: Test the top heads by ablation against random heads, for some analyses, such as retrieval and induction.
        heads: Heads to test instead of the top ones, such as L18H6,L17H3 or L8-L12.
        n_heads: Number of top heads that a test ablates; in small models some tests use fewer, at most a quarter of
            all heads.
        n_random_sets: Largest number of random head sets, matched by layer, that a test compares with. A value below
            39 gives no verdict. Drawing ends early where no further set could make p <= 0.05, or after 39 sets if none
            had as large an effect. Up to 3 more sets, of heads from any layer, are shown; the test does not use them.
        ablation: How heads are ablated: zero (output set to 0), uniform (attend evenly) or first (attend to the first
            token).
        kinds: Ablations under which the tested heads are shown, in addition to that of `--ablation`; a repeated name
            counts once. Choose from zero, mean, resample, uniform and first. Without `--thorough`, only the ablation
            of `--ablation` is compared with random head sets. Mean and resample take values from other prompts of the
            same form.
        thorough: Add a section to the report for each tested analysis. It tests three sets: the top head, the top third
            of the tested heads, and all of them. Under each ablation of `--kinds`, a set is either ablated, or kept
            while all other heads above the threshold are ablated. Each case is compared with at most 39 random head
            sets.
        batch_size: Number of prompts per forward pass.
    """

    recipe: ClassVar[str] = "score"
    analyses: tuple[str, ...] = ("basic",)
    sizes: PromptSizes = field(default_factory=PromptSizes)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    check: bool = True
    heads: str = ""
    n_heads: int = 10
    n_random_sets: int = N_RANDOM_SETS
    ablation: Ablation = "zero"
    kinds: tuple[str, ...] = ("zero", "mean", "resample")
    thorough: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "analyses", tuple(entry.name for entry in registry.analyses_named(",".join(self.analyses)))
        )
        if self.ablation not in ABLATIONS:
            raise UsageError(f"unknown ablation {self.ablation!r}; choose from {', '.join(ABLATIONS)}.")
        if other := [kind for kind in self.kinds if kind not in ALL_ABLATIONS]:
            raise UsageError(f"unknown ablation {other[0]!r} in kinds; choose from {', '.join(ALL_ABLATIONS)}.")
        if self.thorough and not (self.kinds and self.check):
            raise UsageError(
                "a thorough run tests heads under several ablations; give kinds, and leave out --no-check."
            )
        at_least_one(self, "n_heads", "n_random_sets", "batch_size")
        check_settings(self.settings)
        for entry in self.entries:
            if entry.prompts is None and entry.inputs is None:
                raise UsageError(f"{entry.name} is part of the run `interp {entry.group}`; use that command.")
            missing = [need for need in entry.needs if not self._has(need)]
            if missing and not (entry.named_heads and self.heads):
                wanted = "an analysis that finds heads" if missing == ["heads"] else ", ".join(missing)
                more = ", or name heads" if entry.named_heads or missing == ["heads"] else ""
                raise UsageError(f"{entry.name} needs the heads of other analyses; add {wanted} to the analyses{more}.")

    def _has(self, need: str) -> bool:
        if need == "heads":
            return bool(self.heads) or any(not entry.needs and entry.inputs is None for entry in self.entries)
        return need in self.analyses

    @property
    def seed(self) -> int:
        """Seed of prompts, random head sets and confidence intervals."""
        return self.sizes.seed

    @property
    def entries(self) -> tuple[Analysis, ...]:
        """The analyses that the plan names, in the order of a report."""
        return tuple(registry.get(name) for name in self.analyses)

    def stages(self, model: "nn.Module", tokenizer: Any, own: "Prompts | None" = None) -> "Sequence[Stage]":
        """Head tables, their controls, then what is made of the heads that were found.

        Args:
            model: The model that is run.
            tokenizer: Its tokenizer.
            own: Prompts that take the place of the standard ones.

        Returns:
            The stages.
        """
        from interp.runs.stages.analyses import analysis_stage
        from interp.runs.stages.control_stages import control_stage, named_heads_stage, profile_stage

        plan = self._fitted(model)
        if own is None:
            plan._check_lengths(model)
        tables = [entry for entry in self.entries if entry.inputs is None]
        tested = [entry for entry in tables if entry.control is not None] if self.check else []
        if self.check:
            _check_control_sizes(model, self.heads, self.n_heads, [entry.control for entry in tested])
        others = [entry for entry in self.entries if entry.inputs is not None]
        if tables:
            others += [e for e in registry.entries() if e.automatic and e not in others and plan._wanted(e)]
        found = [analysis_stage(entry, plan, model, tokenizer, own) for entry in tables]
        if self.check:
            answered = any(not entry.control.own_prompts for entry in tested)
            found += [control_stage(entry, plan, tokenizer, own) for entry in tested]
            found += [profile_stage(entry, plan, tokenizer, own) for entry in tested if self.thorough]
            found += [named_heads_stage(plan, tokenizer)] if self.heads and not answered else []
        return [*found, *(analysis_stage(entry, plan, model, tokenizer, own) for entry in others)]

    def _wanted(self, entry: Analysis) -> bool:
        """Whether an automatic view is part of the run."""
        from interp.analyses.tasks import standard

        explored = entry.prompts in (standard.explored, standard.explored_passage)
        return (self.sizes.explorer_tokens > 0 or not explored) and all(self._has(need) for need in entry.needs)

    def _check_lengths(self, model: "nn.Module") -> None:
        """Refuse lengths beyond the context of the model, before texts of these lengths are made."""
        from interp.hooks.model.context import context_length

        limit, makers = context_length(model), [entry.prompts for entry in self.entries]
        used = {name for maker in makers for name in sizes_used(maker) or ()}
        for name in LENGTHS:
            length = getattr(self.sizes, name)
            if limit is not None and name in used and length > limit:
                raise PromptError(f"{name}={length:,} is too long: the context of this model is {limit:,}; shorten it.")

    def _fitted(self, model: "nn.Module") -> "ScorePlan":
        """The plan with texts of the explorer and of the needle sweep no longer than the context of the model."""
        from interp.hooks.model.context import usual_context

        context, sizes = usual_context(model), self.sizes
        if context:
            lengths = sizes.sweep_lengths or doubling(max(1, context - sizes.reply_tokens))
            sizes = replace(sizes, explorer_tokens=min(sizes.explorer_tokens, context), sweep_lengths=lengths)
        return replace(self, sizes=sizes)


def check_settings(settings: Settings) -> None:
    """Raise UsageError for a name that nothing declares, or a setting that it does not have."""
    for name, given in settings.items():
        known = registry.kinds_of(name)
        if not known:
            # the message names the nearest analysis
            registry.get(name)
        for kind in known:
            registry.get(name, kind).check_settings(given)


def at_least_one(plan: Any, *names: str) -> None:
    """Raise UsageError for a number below 1.

    Args:
        plan: The plan.
        names: Fields that are checked.
    """
    check_counts(vars(plan))
    for name in names:
        if getattr(plan, name) < 1:
            raise UsageError(f"{name}={getattr(plan, name)} is too small; give at least 1.")


def _check_control_sizes(model: "nn.Module", heads: str, n_heads: int, controls: "Sequence[Any]") -> None:
    """Refuse more ablated heads than leave a random control, before anything is scored.

    Args:
        model: The model.
        heads: Heads that the user names.
        n_heads: Number of heads from the top of the scores.
        controls: The controls of the run.
    """
    from interp.hooks.model.heads import HeadLayout, HeadSet

    layout = HeadLayout.of(model)
    named = HeadSet.parse(heads, layout) if heads else HeadSet(())
    counts = [count for control in controls for count in control.head_counts(n_heads, layout)]
    # named heads take the place of the top ones where prompts do not depend on the analysis
    own = [count for control in controls if control.own_prompts for count in control.head_counts(n_heads, layout)]
    ablated = max([len(named), *own], default=0) if named else max(counts, default=0)
    if 2 * ablated > layout.size:
        raise UsageError(
            f"{ablated} ablated heads of {layout.size} leave too few for a random control; ablate at most half of them "
            f"(--n-heads {layout.size // 2} on the command line)."
        )
