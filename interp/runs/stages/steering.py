"""The stages of a steering run."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from interp.analyses import registry, tasks
from interp.analyses.steer.check import steer_check
from interp.analyses.steer.choose import choose
from interp.analyses.steer.make_edit import make_edit, tuned_edits
from interp.analyses.steer.profile import Profile, profile
from interp.analyses.steer.result import SettingComparisons, SteeringResult
from interp.analyses.tasks.task import Task
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, Edits
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.runs.stage import Stage, single

if TYPE_CHECKING:
    from interp.runs.run import Run
    from interp.runs.steer import SteerPlan

NAMED, ALL_HEADS, HELPFUL = "named", "all heads", "all that gain"


@dataclass(frozen=True, eq=False)
class Steering:
    """Task, prompts and candidates that the stages of one steering run share."""

    plan: "SteerPlan"
    model: nn.Module
    task: Task
    prompts: dict[str, Prompts]
    """by split"""
    given: Profile | None
    candidates: dict[str, Edit]
    """edits with the settings that the dev split chooses from; empty where none is left open"""

    @classmethod
    def of(cls, plan: "SteerPlan", model: nn.Module, tokenizer: Any) -> "Steering":
        """Read the task and check the plan against the model, before anything is computed.

        Raises:
            UsageError: For settings that the edit does not take, or a profile of another edit.
            ScoreError: For a profile of another model.
            HeadError: For heads that the model does not have.
        """
        layout, task = HeadLayout.of(model), tasks.get(plan.task)
        if plan.heads:
            layout.check(HeadSet.parse(plan.heads, layout))
        given = _given(plan, model)
        candidates = {} if given else tuned_edits(plan.method, plan.settings, task.span)
        sizes = {"dev": plan.n_dev_items, "test": plan.n_test_items}
        if is_fitted(plan) or not (plan.heads or given):
            # a task of few items must not be asked for more than the run reads
            sizes["profile"] = plan.n_profile_items
        prompts = {split: task.prompts(tokenizer, split, n) for split, n in sizes.items()}
        steering = cls(plan, model, task, prompts, given, candidates)
        if not candidates and not is_fitted(plan):
            make_edit(plan.method, plan.settings, task.span)
        return steering

    @property
    def profiled(self) -> bool:
        """Whether heads are profiled and chosen: neither named, nor those of an edit of head outputs."""
        if self.plan.heads:
            return False
        if self.candidates:
            return True
        return self.given is not None or (not is_fitted(self.plan) and self.edit().gate is None)

    def edit(self, run: "Run | None" = None, heads: str = "all") -> Edit:
        """The edit in some heads; settings that were left open are those of the given profile, or the best ones."""
        if self.given is not None:
            stored = dict(self.given.scores.settings["edit"][0])
            settings = {name: stored[name] for name in stored if name not in ("edit", "heads")} | self.plan.settings
            return make_edit(self.plan.method, settings, self.task.span, heads)
        if self.candidates:
            tuning: Any = run.result("tuning") if run is not None else None
            assert tuning is not None
            return replace(self.candidates[tuning.best], heads=heads)
        return make_edit(
            self.plan.method, self.plan.settings, self.task.span, heads, self.model, self.prompts.get("profile")
        )

    def tuning(self) -> Stage:
        """Settings that are left open, compared in all heads on the dev split."""

        def work(run: "Run", steps: Path) -> SettingComparisons:
            found = choose(self.model, self.prompts["dev"], self.candidates, seed=self.plan.seed)
            return SettingComparisons(tuple(found))

        return single("tuning", work, prompts=self._asked("dev"), shown=False)

    def profile(self) -> Stage:
        """The gain of each head alone, or the profile that was given."""

        def work(run: "Run", steps: Path) -> Profile:
            if self.given is not None:
                return self.given
            return profile(
                self.model, self.prompts["profile"], self.edit(run), keep=self.plan.n_profiled_heads,
                seed=self.plan.seed, folder=steps,
            )  # fmt: skip

        needs = ("tuning",) if self.candidates else ()
        asked = () if self.given is not None else self._asked("profile")
        return single("profile", work, needs=needs, prompts=asked, shown=False)

    def choice(self) -> Stage:
        """Head sets of several sizes, compared by their replies on the dev split."""

        def work(run: "Run", steps: Path) -> SettingComparisons:
            made: Any = run.result("profile")
            sets = {f"top {k}": str(made.heads(k)) for k in self.plan.head_set_sizes if k <= len(made.ranking)}
            helpful = made.helpful()
            sets |= {HELPFUL: str(helpful)} if len(helpful) else {}
            edits = {name: self.edit(run, heads) for name, heads in {**sets, ALL_HEADS: "all"}.items()}
            found = choose(
                self.model, self.prompts["dev"], edits, judge=self.task.judge,
                max_new_tokens=self.task.max_new_tokens, stop=self.task.stop, reply_batch_size=self.plan.batch_size,
                seed=self.plan.seed, folder=steps,
            )  # fmt: skip
            return SettingComparisons(tuple(found))

        return single("choice", work, needs=("profile",), prompts=self._asked("dev"), shown=False)

    def test(self) -> Stage:
        """Replies to the test split: unmodified, steered, and with the same edit in random heads."""

        def work(run: "Run", steps: Path) -> SteeringResult:
            choice: Any = run.result("choice")
            made: Any = run.result("profile")
            if choice is None:
                chosen = NAMED if self.plan.heads else ALL_HEADS
                edits = Edits(()) + self.edit(run, self.plan.heads or "all")
            else:
                chosen, edits = choice.best, choice[choice.best].edits
            trials = steer_check(
                self.model, self.prompts["test"], edits, judge=self.task.judge,
                max_new_tokens=self.task.max_new_tokens, stop=self.task.stop, n_random_sets=self.plan.n_random_sets,
                batch_size=self.plan.batch_size, seed=self.plan.seed, folder=steps,
            )  # fmt: skip
            return SteeringResult(
                method=self.plan.method,
                edit=tuple(part.to_dict() for part in edits),
                task=Path(self.plan.task).stem if self.plan.task.endswith(".jsonl") else self.plan.task,
                chosen=chosen,
                trials=trials,
                tried=() if choice is None else choice.comparisons,
                profile=None if made is None else made.scores,
            )

        needs = ("choice", "profile") if self.profiled else ("tuning",) if self.candidates else ()
        fit = self._asked("profile") if is_fitted(self.plan) else ()
        return single("steering", work, needs=needs, prompts=(*self._asked("test"), *fit))

    def _asked(self, split: str) -> tuple[tuple[Prompts, int], ...]:
        return ((self.prompts[split], self.task.max_new_tokens),)


def is_fitted(plan: "SteerPlan") -> bool:
    """Whether the edit of a plan is estimated from prompts: a field without a default is not given."""
    entry = registry.get(plan.method, "edit")
    needed = [
        f.name for f in fields(entry.thing)
        if f.init and f.default is MISSING and f.default_factory is MISSING and f.name != "spans"
    ]  # fmt: skip
    return entry.fitted is not None and any(name not in plan.settings for name in needed)


def _given(plan: "SteerPlan", model: nn.Module) -> Profile | None:
    """The profile that a plan names. Raises ScoreError for one of another model, UsageError for another edit."""
    if not plan.profile or plan.heads:
        return None
    found = Profile.load(plan.profile, model)
    parts: list[Mapping[str, Any]] = found.scores.settings["edit"]
    kinds = [str(part["edit"]) for part in parts]
    if [registry.class_named(kind, "edit") for kind in kinds] != [registry.get(plan.method, "edit").thing]:
        raise UsageError(f"{plan.profile} is a profile of {' + '.join(kinds)}, not of {plan.method}; give another.")
    return found
