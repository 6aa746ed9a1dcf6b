"""What each analysis is asked on in a run: prompts of its own, their partners where it takes pairs, and settings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from interp.analyses import tasks
from interp.analyses.identify._prompt_pairs import answer_tokens
from interp.analyses.identify._replies import REPLY, one_place
from interp.analyses.identify._targets import check_targets, earlier
from interp.analyses.identify.induction import after
from interp.analyses.identify.lookback import REPLY as LOOKED
from interp.analyses.identify.qada import check_lengths
from interp.analyses.identify.razor_attention import check_copies
from interp.hooks.prompts.prompts import Prompts

Make = Callable[[Any, Any], Any]
"""of a Plan and a tokenizer: prompts, or two sets of prompts of one order"""
Check = Callable[[Prompts], Any]
"""raises where an analysis would refuse the prompts, before a run begins"""


@dataclass(frozen=True)
class Dish:
    """One analysis as a run asks for it."""

    make: Make
    paired: bool = False
    """`make` gives (prompts, partners), and the analysis takes both"""
    first: bool = False
    """it takes all of the partners, before the prompts"""
    whole: bool = False
    """its scores cannot be joined from parts, so all prompts are one cell"""
    own: bool = True
    """a user's own prompts can take the place of the made ones"""
    check: Check | None = None
    reply: int = 0
    """new tokens that must fit after a prompt"""
    resumes: bool = False
    """it keeps its own steps in a folder"""
    settings: dict[str, Any] = field(default_factory=dict)


def passages(plan: Any, tokenizer: Any) -> Prompts:
    """Plain texts."""
    return tasks.passages(tokenizer, n=plan.texts, length=plan.text_length, seed=plan.seed)


def needles(plan: Any, tokenizer: Any) -> Prompts:
    """The prompts of retrieval."""
    return tasks.needle(tokenizer, lengths=(plan.length,), depths=plan.depths, n=plan.needles, seed=plan.seed)


def repeated(copies: int = 2, times: int = 1) -> Make:
    """Random tokens, `times` as many as a plan repeats, in so many copies."""

    def make(plan: Any, tokenizer: Any) -> Prompts:
        return tasks.repeated(tokenizer, n=times * plan.repeat, copies=copies, batch=plan.texts, seed=plan.seed)

    return make


def _ioi(plan: Any, tokenizer: Any) -> tuple[Prompts, Prompts]:
    return tasks.ioi(tokenizer, n=plan.pairs, seed=plan.seed)


def _documents(plan: Any, tokenizer: Any) -> tuple[Prompts, Prompts]:
    return tasks.documents(tokenizer, n=plan.needles, seed=plan.seed)


def _entities(plan: Any, tokenizer: Any) -> tuple[Prompts, Prompts]:
    real, random = (tasks.entities(tokenizer, n=plan.pairs, random=r, seed=plan.seed) for r in (False, True))
    return real, random


def _injection(plan: Any, tokenizer: Any) -> tuple[Prompts, Prompts]:
    normal, attacked = (
        tasks.injection(tokenizer, kind, n=plan.pairs, seed=plan.seed) for kind in ("normal", "attacked")
    )
    return normal, attacked


def _relations(plan: Any, tokenizer: Any) -> tuple[Prompts, Prompts]:
    few = max(2, plan.pairs // 4)
    shuffled, clean = (tasks.relations(tokenizer, n=few, shuffled=s, seed=plan.seed) for s in (True, False))
    return shuffled, clean


MENU: dict[str, Dish] = {
    "retrieval": Dish(needles, check=one_place),
    "induction": Dish(repeated(), check=partial(check_targets, name="induction", targets=after)),
    "previous_token": Dish(passages),
    "duplicate_token": Dish(repeated(), check=partial(check_targets, name="duplicate_token", targets=earlier)),
    "sinks": Dish(passages),
    "razor_induction": Dish(repeated(copies=4), check=partial(check_copies, name="razor_induction")),
    "razor_echo": Dish(repeated(copies=4), check=partial(check_copies, name="razor_echo")),
    "positional": Dish(repeated(copies=1, times=2)),
    "semantic_retrieval": Dish(needles, check=one_place, reply=REPLY),
    "retrieval_reasoning": Dish(needles, check=one_place, reply=REPLY),
    "lookback": Dish(needles, reply=LOOKED),
    "task_kv": Dish(needles),
    "qada": Dish(needles, check=check_lengths),
    "qrhead": Dish(_documents, paired=True, own=False),
    "qk_score": Dish(lambda plan, tokenizer: tasks.get("choice").prompts(tokenizer, "all", plan.pairs), own=False),
    "concept_induction": Dish(_entities, paired=True, own=False),
    "context_entropy": Dish(lambda plan, tokenizer: tasks.contexts(tokenizer, seed=plan.seed), whole=True, own=False),
    # with k above 0 a head's spread is of all prompts, and batches could not be joined
    "attention_tracker": Dish(_injection, paired=True, own=False, settings={"k": 0.0}),
    "function_vectors": Dish(_relations, paired=True, first=True, own=False),
    "duo_gates": Dish(
        lambda plan, tokenizer: tasks.passkeys(tokenizer, seed=plan.seed), whole=True, own=False, resumes=True,
        settings={"batch_size": 1},
    ),
    # shares of a layer could not be joined batch by batch
    "gradient_importance": Dish(passages, settings={"normalize": None}),
    "activation_patching": Dish(_ioi, paired=True, own=False),
    "path_patching": Dish(_ioi, paired=True, own=False),
    "attribution_patching": Dish(_ioi, paired=True, own=False),
    "logit_attribution": Dish(lambda plan, tokenizer: _ioi(plan, tokenizer)[0], check=answer_tokens),
}  # fmt: skip
"""in the order of a report"""
