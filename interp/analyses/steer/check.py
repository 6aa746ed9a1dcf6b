"""Does steering help: a task as the model is, steered, and with the same edit in random heads."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from interp.analyses.causal.ablation_test import CausalCheck, Condition, Judge, Outcome
from interp.errors import HeadError, UsageError
from interp.hooks.edit.edit import Edit, Edits, steering
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts


@dataclass(frozen=True)
class Arm:
    """One way to run the task, and the edits that make it."""

    condition: Condition
    edits: Edits


def arms(edit: Edit | Edits, layout: HeadLayout, draws: int = 3, seed: int = 0) -> tuple[Arm, ...]:
    """As loaded, steered, and `draws` times each part of the edit in as many random heads, drawn freely and by layer.

    Heads of no part are drawn. There is no random control where too few heads are left, or where an edit holds
    vectors of its own heads (Offset).
    """
    parts = list(Edits(()) + edit)
    if draws < 1:
        raise UsageError(f"draws={draws}: a control needs at least one draw of random heads.")
    own = [part.chosen(layout) if part.heads else HeadSet(()) for part in parts]
    united = HeadSet(tuple({head for heads in own for head in heads}))
    made = [
        Arm(Condition("as loaded", "as loaded", HeadSet(())), Edits(())),
        Arm(Condition(f"steered {len(united)}", "steered", united), Edits(tuple(parts))),
    ]
    if not all(part.transferable for part in parts) or not len(united):
        return tuple(made)
    ways: tuple[tuple[str, Literal["free", "layer"]], ...] = (("random", "free"), ("random by layer", "layer"))
    for group, match in ways:
        for i in range(draws):
            try:
                drawn = [heads.random_like(layout, seed + i, match, exclude=united - heads) for heads in own]
            except HeadError:
                return tuple(made)
            moved = Edits(tuple(replace(p, heads=str(heads)) for p, heads in zip(parts, drawn, strict=True)))
            heads = HeadSet(tuple({head for part in drawn for head in part}))
            made.append(Arm(Condition(f"{group} {i + 1}", group, heads), moved))
    return tuple(made)


def ask_steered(
    model: nn.Module, prompts: Prompts, edits: Edits, *, max_new_tokens: int, stop: str | None, batch_size: int = 8
) -> Iterator[Reply]:
    """Greedy replies under edits, one a prompt."""
    for batch in prompts.batches(batch_size):
        with steering(model, edits, batch) if len(edits.edits) else contextlib.nullcontext():
            yield from generate(model, batch, max_new_tokens=max_new_tokens, stop=stop)


def steer_check(
    model: nn.Module,
    prompts: Prompts,
    edit: Edit | Edits,
    *,
    judge: Judge,
    max_new_tokens: int = 32,
    stop: str | None = None,
    draws: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> CausalCheck:
    """Accuracy of greedy replies: as loaded, steered, and with the same edit in as many random heads.

    accuracy[condition] = mean over prompts of judge(reply, prompt); intervals are over prompts, and over prompts and
    draws for the random groups ("random": of all other heads, "random by layer": as many from each layer), which are
    left out where no others are left. `gain` compares conditions prompt by prompt. Use prompts that neither the heads
    nor the settings were chosen on: the test split of a task.
    Source: ours, after the masking control of Wu et al. 2404.15574.
    Cannot show: whether a gain is what the method claims to do; a judge sees the reply alone.
    """
    from tqdm.auto import tqdm

    rows = arms(edit, HeadLayout.of(model), draws, seed)
    outcomes = []
    for arm in tqdm(rows, desc="steering check", disable=not progress, delay=2, leave=False):
        asked = ask_steered(model, prompts, arm.edits, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)
        outcomes.append(outcome(arm.condition, prompts, [reply.text for reply in asked], judge))
    return CausalCheck(tuple(outcomes), kind_of(edit), len(rows[1].condition.heads), seed)


def outcome(condition: Condition, prompts: Prompts, replies: list[str], judge: Judge) -> Outcome:
    """The verdicts on replies, with what was asked and expected."""
    verdicts = tuple(judge(text, prompt) for text, prompt in zip(replies, prompts, strict=True))
    answers = tuple(str(prompt.meta.get("answer", "")) for prompt in prompts)
    questions = tuple(str(prompt.meta.get("question", "")) for prompt in prompts)
    return Outcome(condition, verdicts, tuple(replies), answers, questions)


def kind_of(edit: Edit | Edits) -> str:
    """An edit in words, its heads left out: "Pasta(alpha=0.01)"."""
    said = []
    for part in Edits(()) + edit:
        settings = {k: v for k, v in part.to_dict().items() if k not in ("edit", "heads", "spans", "vectors", "bias")}
        defaults = {k: f.default for k, f in type(part).__dataclass_fields__.items()}
        shown = [f"{k}={v}" for k, v in settings.items() if v != defaults.get(k) or isinstance(v, float)]
        said.append(f"{type(part).__name__}({', '.join(shown)})")
    return " + ".join(said)
