"""The evaluation of all selectors that the scores of a run can make."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from interp.analyses import registry
from interp.analyses.kv._shares import NO_GLOBAL_LAYERS
from interp.analyses.kv.kv_curve import KEEP_RATIOS, kv_curve
from interp.analyses.kv.kv_tasks import KVTask, kv_tasks
from interp.analyses.kv.selectors_of import condition_of, depth_of, has_global_layers, selectors_of
from interp.analyses.prompt_sizes import described
from interp.analyses.registry import SelectorEntry, analysis
from interp.analyses.results import codec
from interp.analyses.results.files import digest
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trials import Trials
from interp.errors import UsageError
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.writer import make_folder

SEED_OFFSET = 3_000_017
"""added to the seed of a run, so that no prompt is one on which heads were scored"""


@described("{n_texts} prompts of at most {needle_length} tokens for each of three tasks")
def _prompts(sizes: Any, tokenizer: Any) -> Prompts:
    """The prompts of all tasks, each with a context, a question and an answer."""
    tasks = kv_tasks(tokenizer, n=sizes.n_texts, length=sizes.needle_length, seed=sizes.seed + SEED_OFFSET)
    first = tasks[0].whole
    return replace(first, items=tuple(prompt for task in tasks for prompt in task.whole))


def _cost(model: nn.Module, prompts: Prompts, batch_size: int, settings: Mapping[str, Any]) -> Any:
    """A context is read once; its question and answer with all keys, and for each selector at each ratio.

    Selectors that need scores are counted too, so that the cost is that of all declared selectors by default.
    """
    from interp.analyses import costs

    passes, found = costs.Passes.of(model), costs.Cost()
    names = _names(settings.get("selectors") or ()) or registry.names("selector")
    entries: list[SelectorEntry] = [registry.get(name, "selector") for name in names]
    tested = [entry.thing() for entry in entries if not entry.baseline]
    # random keys run once for each number of first and last keys
    n_controls = len({selector.forced for selector in tested}) or 1
    times = 1 + (len(tested) + n_controls) * len(settings.get("keep_ratios") or KEEP_RATIOS)
    for task in KVTask.from_whole(prompts):
        for context, rest in zip(task.contexts.lengths, map(len, task.rest), strict=True):
            found += passes.prompts(1, context) + passes.cost(times, rest, context + rest / 2)
    return found


def _names(selectors: Sequence[str]) -> tuple[str, ...]:
    """Names given as a list, or as a text with commas."""
    return tuple(selectors.split(",")) if isinstance(selectors, str) else tuple(selectors)


def _inputs(run: Any) -> dict[str, Any]:
    """The scores of a run, and the settings that a user gave for selectors."""
    given = {name: settings for name, settings in run.settings.items() if registry.is_known(name, "selector")}
    return {"scores": run.scores, "selector_settings": given}


def check_global_layers(model: nn.Module) -> None:
    """Raise UsageError where every layer has a sliding window, so that no selector has keys to drop."""
    if not has_global_layers(model):
        raise UsageError(NO_GLOBAL_LAYERS)


@analysis(
    name="kv",
    title="KV selection",
    group="kv",
    order=40,
    prompts=_prompts,
    own_prompts=False,
    joint=True,
    resumable=True,
    check_model=check_global_layers,
    inputs=_inputs,
    cost=_cost,
)
def kv_selection(
    model: nn.Module,
    prompts: Prompts,
    *,
    selectors: Sequence[str] = (),
    selector_settings: Mapping[str, Mapping[str, Any]] | None = None,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    scores: Mapping[str, HeadScores] | None = None,
    depth: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Trials:
    """Evaluate key selectors: loss and accuracy of known answers with a share of the context's keys, see `kv_curve`.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts of one or several tasks, as `KVTask.whole` gives them.
        selectors: Names of selectors, as a list or separated by commas; by default all that the scores can make. Random
            keys are always evaluated.
        selector_settings: Selector -> settings, such as {"snapkv": {"window": 32}}.
        keep_ratios: Shares of the keys that are kept.
        scores: Analysis -> scores, by which selectors choose heads.
        depth: Add a baseline of each selector that chooses heads, which chooses them by the mean score of their layer.
        batch_size: Number of contexts per forward pass.
        seed: Seed of random keys and of the confidence intervals.
        folder: Finished tasks are stored here, so that a killed evaluation continues.
        progress: Show a progress bar.

    Returns:
        Trials: as `kv_curve`; `settings["selectors"]` holds the title and the scores of each condition.

    Raises:
        UsageError: For an unknown selector or setting, a selector whose scores are missing, or a model in which every
            layer has a sliding window.
        PromptError: If prompts have no context or answer, or do not fit into the context of the model.

    Examples:
        >>> from interp.analyses.kv import KVTask, kv_selection
        >>> task = KVTask.cut("copy", prompts, ends=[12, 12], answers=[[5], [6]])
        >>> trials = kv_selection(model, task.whole, selectors=("snapkv",), keep_ratios=(0.5,))
        >>> trials.conditions
        ('baseline', 'random', 'snapkv')

    Source:
        The protocol of kvpress, and the retrieval tests of the papers.

    Limits:
        Does not show the quality of long replies, nor speed. Selectors whose heads were scored on needles have an
        advantage on the task "needle".
    """
    check_global_layers(model)
    selectors = _names(selectors)
    given = dict(scores or {})
    made = selectors_of(given, seed, model, names=selectors, settings=selector_settings, depth=depth)
    about = _about(made, given, model)
    parts = []
    for task in KVTask.from_whole(prompts):
        path = None
        if folder is not None:
            make_folder(folder)
            path = Path(folder) / f"kv-{_key(model, task, about, given, selector_settings, keep_ratios, seed)}.json"
        if path is not None and path.is_file():
            parts.append(Trials.load(path))
            continue
        found = kv_curve(
            model, [task], made, keep_ratios=keep_ratios, batch_size=batch_size, seed=seed, progress=progress
        )
        found = replace(found, settings={"selectors": about, "selector_settings": _plain(selector_settings)})
        if path is not None:
            codec.save(found, path, is_step=True)
        parts.append(found)
    return Trials.concat(parts)


def _about(made: Mapping[str, Any], scores: Mapping[str, HeadScores], model: nn.Module) -> dict[str, dict[str, Any]]:
    """Condition -> title and scores of its selector."""
    counted = [name for name, table in scores.items() if table.counted]
    entries: tuple[SelectorEntry, ...] = registry.entries("selector")
    by_condition = {name(entry): entry for entry in entries for name in (condition_of, depth_of)}
    return {
        name: {"title": by_condition[name].title, "scores": list(by_condition[name].needed(counted) or ())}
        for name in made
    }


def _key(
    model: nn.Module, task: KVTask, about: Any, scores: Mapping[str, HeadScores], settings: Any, ratios: Any, seed: int
) -> str:
    """A hash of everything on which the numbers of a task depend."""
    made = Provenance.of(model, task.contexts.tokenizer)
    tables = {name: digest(scores[name].values.tolist()) for each in about.values() for name in each["scores"]}
    what = [made.config_hash, made.weights_hash, made.dtype, made.versions, task.whole.fingerprint(), about, tables]
    return digest([*what, _plain(settings), list(ratios), seed])


def _plain(settings: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    return {name: dict(values) for name, values in (settings or {}).items()}
