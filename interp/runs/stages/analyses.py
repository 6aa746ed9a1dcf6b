"""A stage for each analysis, and one for each control."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from interp.analyses.registry import Analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.runs.inputs import RunInputs
from interp.runs.stage import Cell, Stage, cell_key

if TYPE_CHECKING:
    from interp.runs.plan import ScorePlan
    from interp.runs.run import Run

BRIEF_TOKENS = 32
NEEDS_HEADS = "heads"
"""a need that any head table meets, and heads that the user names"""


def analysis_stage(
    entry: Analysis, plan: "ScorePlan", model: nn.Module, tokenizer: Any, own: Prompts | None = None
) -> Stage:
    """The stage of an analysis: its prompts cut into batches, one cell each.

    Raises:
        UsageError: For own prompts where the analysis takes prompts of a form that only it makes.
        PromptError: For prompts without the parts or the length that it needs.
    """
    if entry.check_model is not None:
        entry.check_model(model)
    given: Any = own_prompts(entry, plan, own)
    if given is None and entry.prompts is not None:
        given = _maker(entry, plan)(plan.sizes, tokenizer)
    sides: Any = given if entry.paired else (given,)
    made, *partners = sides
    if entry.check is not None:
        entry.check(made)
    batches = _batches(entry, made, plan.batch_size)
    new_tokens: Any = entry.max_new_tokens
    if isinstance(new_tokens, str):
        new_tokens = getattr(plan.sizes, new_tokens)
    settings, cost = settings_of(entry, plan), entry.cost

    def cells(run: "Run") -> Sequence[Cell]:
        extra = entry.inputs(run_inputs(run)) if entry.inputs is not None else {}
        return [
            Cell(
                cell_key(number),
                partial(_called, entry, run, batch, made, partners, settings | extra),
                tuple(brief(prompt, tokenizer) for prompt in batch) if isinstance(batch, Prompts) else (),
            )
            for number, batch in enumerate(batches)
        ]

    return Stage(
        entry.name,
        cells,
        needs=tuple(need for need in entry.needs if need != NEEDS_HEADS and not (entry.named_heads and plan.heads)),
        ready=partial(_ready, entry),
        prompts=tuple((each, new_tokens) for each in _read(made, partners)),
        n_cells=len(batches),
        optional=entry.automatic,
        cost=None if cost is None else lambda model: cost(model, given, plan.batch_size, settings),
    )  # fmt: skip


def settings_of(entry: Analysis, plan: "ScorePlan") -> dict[str, Any]:
    """Settings of an analysis in a run: the user's, else the run's, else the function's own."""
    run = {
        name: getattr(plan.sizes, value[1:]) if isinstance(value, str) and value.startswith("$") else value
        for name, value in entry.run_settings.items()
    }
    given = {"batch_size": plan.batch_size, "seed": plan.seed}
    known = inspect.signature(entry.thing).parameters
    return {name: value for name, value in given.items() if name in known} | run | plan.settings.get(entry.name, {})


def run_inputs(run: "Run") -> RunInputs:
    """The inputs of an analysis that builds on other results."""
    plan: Any = run.plan
    return RunInputs(
        run.model, run.tokenizer, run.layout, run.scores, run.named_heads, run.leading, plan.sizes, plan.settings,
        plan.n_heads, plan.n_random_sets, plan.ablation, plan.seed, plan.batch_size,
    )  # fmt: skip


def brief(prompt: Prompt, tokenizer: Any) -> str:
    """The question of a prompt, or how it begins."""
    begin = tokenizer.decode(prompt.ids[:BRIEF_TOKENS], skip_special_tokens=True)
    return str(prompt.meta.get("question") or begin).strip()


def _called(
    entry: Analysis,
    run: "Run",
    batch: Any,
    made: Any,
    partners: Sequence[Prompts],
    settings: dict[str, Any],
    steps: Path,
) -> Result:
    """The result of an analysis on one batch."""
    more = {"folder": steps} if entry.resumable else {}
    if entry.partners_first:
        return entry.thing(run.model, *partners, batch, **settings, **more)
    place = {id(prompt): number for number, prompt in enumerate(made)} if partners else {}
    theirs = [replace(side, items=tuple(side.items[place[id(prompt)]] for prompt in batch)) for side in partners]
    return entry.thing(run.model, *(() if batch is None else (batch,)), *theirs, **settings, **more)


def own_prompts(entry: Analysis, plan: "ScorePlan", own: Prompts | None) -> Any:
    """The user's prompts as an analysis takes them; None where there are none.

    Raises:
        UsageError: Where the analysis takes prompts of a form that only it makes.
    """
    if own is None:
        return None
    if not entry.own_prompts:
        raise UsageError(
            f"{entry.name} takes prompts that are made for it, in pairs or with parts; leave --prompts out, or leave "
            "out this analysis."
        )
    return entry.own_prompts(own, plan.sizes) if callable(entry.own_prompts) else own


def _maker(entry: Analysis, plan: "ScorePlan") -> Any:
    """The standard prompts of an analysis; the explorer shows a plain text where no analysis reads needles."""
    if entry.prompts is standard.explored and not any(each.prompts is standard.needles for each in plan.entries):
        return standard.explored_passage
    return entry.prompts


def _batches(entry: Analysis, made: Any, size: int) -> list[Any]:
    if made is None:
        return [None]
    if isinstance(made, Prompts):
        return list(made.batches(len(made) if entry.joint else size))
    # tasks and the like: one at a time
    return [made] if entry.joint else [[each] for each in made]


def _read(made: Any, partners: Sequence[Prompts]) -> list[Prompts]:
    """All prompts that the model reads."""
    if made is None:
        return []
    if not isinstance(made, Prompts):
        return [each.whole for each in made]
    return [made, *partners]


def _ready(entry: Analysis, run: "Run") -> str:
    """Why an analysis that needs heads cannot run; "" where it can."""
    if entry.named_heads and len(run.named_heads):
        return ""
    for need in entry.needs:
        if need == NEEDS_HEADS:
            if not run.leading:
                return "it shows heads that other analyses find, and none found any."
        elif reason := heads_missing(run, need):
            return reason
    return ""


def heads_missing(run: "Run", name: str) -> str:
    """Why the top heads of a table cannot be taken; "" where they can."""
    table = run.result(name)
    if isinstance(table, HeadScores) and not table.heads(top=1, above=0.0):
        return f"no head scores above 0 in {name!r}: no prompt counted, as where the model answers none."
    return ""
