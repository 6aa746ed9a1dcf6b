"""Does steering help: a task as the model is, steered, and with the same edit in random heads."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from interp.analyses.causal import CausalCheck, Condition, Judge, Outcome, conditions
from interp.analyses.tasks.generate import Reply, generate
from interp.hooks.edit import Edit, Edits, steering
from interp.hooks.heads import HeadLayout, HeadSet
from interp.hooks.prompts import Prompts


def steer_conditions(edit: Edit | Edits, layout: HeadLayout, draws: int = 3, seed: int = 0) -> tuple[Condition, ...]:
    """As loaded, the edit's own heads, and `draws` times as many random heads of the rest, drawn freely and by layer.

    Edits of more than half of the heads leave too few to draw from and have no random control.
    """
    heads = HeadSet(())
    for part in Edits(()) + edit:
        heads = heads | (HeadSet.parse(part.heads, layout) if part.heads else HeadSet(()))
    if not len(heads) or 2 * len(heads) > layout.size or draws < 1:
        return Condition("as loaded", "as loaded", HeadSet(())), Condition(f"steered {len(heads)}", "steered", heads)
    made = conditions(heads, layout, draws, seed)
    return made[0], Condition(f"steered {len(heads)}", "steered", heads), *made[2:]


def steered(edit: Edit | Edits, condition: Condition) -> Edits:
    """The edit in the heads of a condition: its own where it is the steered one, else all parts in the drawn ones."""
    if condition.group == "steered":
        return Edits(()) + edit
    return Edits(tuple(replace(part, heads=str(condition.heads)) for part in Edits(()) + edit if len(condition.heads)))


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
    draws for the random groups ("random": of all other heads, "random by layer": as many from each layer). Use prompts
    that neither the heads nor the settings were chosen on: the test split of a task.
    Cannot show: whether a gain is what the method claims to do; a judge sees the reply alone.
    """
    from tqdm.auto import tqdm

    rows = steer_conditions(edit, HeadLayout.of(model), draws, seed)
    outcomes = []
    for condition in tqdm(rows, desc="steering check", disable=not progress, delay=2, leave=False):
        edits = steered(edit, condition)
        asked = ask_steered(model, prompts, edits, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)
        outcomes.append(outcome(condition, prompts, [reply.text for reply in asked], judge))
    return CausalCheck(tuple(outcomes), kind_of(edit), len(rows[1].heads), seed)


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
        settings = {k: v for k, v in part.to_dict().items() if k not in ("edit", "heads", "spans", "vectors")}
        defaults = {k: f.default for k, f in type(part).__dataclass_fields__.items()}
        shown = [f"{k}={v}" for k, v in settings.items() if v != defaults.get(k) or isinstance(v, float)]
        said.append(f"{type(part).__name__}({', '.join(shown)})")
    return " + ".join(said)
