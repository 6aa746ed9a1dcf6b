"""The recipe of `interp steer`: heads from one split of a task, settings from another, replies to a third."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.errors import UsageError
from interp.runs.plan import at_least_one

if TYPE_CHECKING:
    from torch import nn

    from interp.hooks.prompts.prompts import Prompts
    from interp.runs.stage import Stage


@dataclass(frozen=True, kw_only=True)
class SteerPlan:
    """A run that steers a task and judges the replies.

    Attributes:
        method: Name of an edit, see `interp list`.
        task: Name of a task, see `interp list tasks`, or a .jsonl file of your own items.
        settings: Settings of the edit, as {"alpha": 0.01}.
        heads: Heads to steer; by default heads are profiled and the best are chosen.
        profile: File of an earlier profile, from which heads are taken.
        head_set_sizes: Sizes of the sets of top heads that are compared on the dev items. Two further sets are
            compared: all heads of the model, and the heads that improve the result when steered alone (only heads
            profiled on all items, see `--n-profiled-heads`). The set with the best replies is used.
        n_profile_items: Number of items of the task on which heads are profiled.
        n_dev_items: Number of other items, the dev items, on which the head set is chosen.
        n_test_items: Number of further items whose replies are judged in the end.
        n_profiled_heads: Number of heads that are profiled on all items; the others are eliminated after fewer items.
        n_random_sets: Largest number of random head sets, matched by layer, to which the edit is applied for
            comparison. A value below 39 gives no verdict. Drawing ends early where no further set could make
            p <= 0.05, or after 39 sets if none had as large an effect.
        seed: Seed of the order of prompts, of random head sets and of confidence intervals.
        batch_size: Number of replies per forward pass.
    """

    recipe: ClassVar[str] = "steer"
    method: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    heads: str = ""
    profile: str = ""
    head_set_sizes: tuple[int, ...] = (5, 10, 25, 50)
    n_profile_items: int = 32
    n_dev_items: int = 20
    n_test_items: int = 40
    n_profiled_heads: int = 50
    n_random_sets: int = N_RANDOM_SETS
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        from interp.analyses import registry

        entry = registry.get(self.method, "edit")
        object.__setattr__(self, "method", entry.name)
        entry.check_settings(self.settings)
        at_least_one(
            self, "n_profile_items", "n_dev_items", "n_test_items", "n_profiled_heads", "n_random_sets", "batch_size"
        )
        if not self.head_set_sizes or min(self.head_set_sizes) < 1:
            raise UsageError(f"head_set_sizes={self.head_set_sizes} is not valid; give sizes of at least 1.")

    def stages(self, model: "nn.Module", tokenizer: Any, own: "Prompts | None" = None) -> "Sequence[Stage]":
        """Settings that are left open, a profile of the heads, the choice of a head set, and the test.

        Args:
            model: The model that is run.
            tokenizer: Its tokenizer.
            own: Prompts that take the place of the standard ones.

        Returns:
            The stages.
        """
        from interp.runs.stages.steering import Steering

        steering = Steering.of(self, model, tokenizer)
        found = [steering.tuning()] if steering.candidates else []
        found += [steering.profile(), steering.choice()] if steering.profiled else []
        return [*found, steering.test()]
