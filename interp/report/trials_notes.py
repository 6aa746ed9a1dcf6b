"""Notes on trials: what the names of conditions and measures mean, and which numbers have no interval."""

from typing import get_args

from interp.analyses import registry
from interp.analyses.causal.ablated_measures import NEUTRAL
from interp.analyses.results.trial import BY_DEPTH, KEPT, RANDOM, RANDOM_BY_LAYER, RANDOM_KEPT, TOP
from interp.analyses.results.trial_rows import sized
from interp.analyses.results.trials import Trials
from interp.hooks.edit.ablation import AblationKind

MIN_INTERVAL_PROMPTS = 3
"""prompts below which a mean without bounds, such as a loss, has no interval in a report"""


def is_ablation(result: Trials) -> bool:
    """Whether heads are ablated, and not edited in another way.

    Args:
        result: The trials.
    """
    return result.intervention in get_args(AblationKind) or result.intervention.startswith("ablations:")


def heads_column(result: Trials) -> str:
    """The heading of the column that lists the heads of each condition.

    Args:
        result: The trials.
    """
    return "Ablated heads" if is_ablation(result) else "Edited heads"


def condition_notes(result: Trials) -> list[str]:
    """A sentence for each part of the names of conditions that occurs.

    Args:
        result: The trials.
    """
    if result.size_name != "heads":
        return []
    names, ends = result.conditions, {name.partition(" (")[0].removeprefix(TOP).strip() for name in result.tested}
    tops = [name for name in result.tested if name.partition(" ")[0] == TOP]
    sizes = {size for name in tops for size in result.sizes(name)}
    first = sized(result, max(sizes)) if len(sizes) == 1 else "heads"
    from_scores = bool({KEPT, BY_DEPTH} & ends)
    others = [kind for kind in get_args(AblationKind) if any(name.endswith(f" ({kind})") for name in result.tested)]
    ablated = f"{result.intervention}-ablated" if result.intervention in get_args(AblationKind) else "ablated"
    found = []
    if tops and is_ablation(result):
        heads = f"the {first} with the highest scores" if from_scores else f"the {first} under test"
        found.append(f"{TOP}: {heads}, {ablated}.")
    if others and TOP in names:
        found.append(f"{', '.join(f'({kind})' for kind in others)}: the same heads under another ablation.")
    elif others:
        found.append(f"{', '.join(f'({kind})' for kind in others)}: the kind of ablation.")
    if any(name.partition(" (")[0].endswith(f" {KEPT}") for name in result.tested):
        found.append(f"{KEPT}: the tested heads stay, and the other heads {_of_role(result)}.")
    if by_depth := [name for name in result.tested if name.partition(" (")[0].endswith(f" {BY_DEPTH}")]:
        sizes = {size for name in by_depth for size in result.sizes(name)}
        first = sized(result, max(sizes)) if len(sizes) == 1 else "heads"
        found.append(
            f"{BY_DEPTH}: {first} chosen by layer. First come all heads of the layer with the highest mean score, then "
            "those of the layer with the next highest; of the last layer used, as many as are needed are chosen at "
            "random."
        )
    if RANDOM_BY_LAYER in names:
        found.append(
            f"{RANDOM_BY_LAYER}: random sets matched by layer, with as many heads of each layer as the tested heads."
        )
    if RANDOM in names and RANDOM_BY_LAYER in names:
        found.append(f"{RANDOM}: random sets of other heads, from all layers.")
    if RANDOM_KEPT in names:
        found.append(f"{RANDOM_KEPT}: random heads of the role stay in place of the tested ones.")
    return found


def _of_role(result: Trials) -> str:
    """The ablated heads where tested heads are kept: those above the threshold of the analysis, where it has one."""
    entry, lowest = registry.find(result.name), "above the lowest score"
    if entry is None:
        threshold = "above the threshold of the scores are ablated"
        return f"{threshold} ({lowest}, where the scores have no threshold)"
    setting = entry.settings.get("threshold")
    if entry.threshold is None and (setting is None or setting.default is None):
        return f"{lowest} are ablated, since the scores have no threshold"
    return "above the threshold of the scores are ablated"


def measure_notes(result: Trials) -> list[str]:
    """Which texts each loss is over, and which measures have too few prompts for an interval.

    Args:
        result: The trials.
    """
    found, measures = [], result.measures
    if NEUTRAL in measures and len(measures) > 1:
        n, first, others = n_prompts(result, NEUTRAL), measures[0], ""
        if first.startswith("loss"):
            items = "texts" if first == "loss" else "prompts"
            others = f" that {'is' if n == 1 else 'are'} not among the {items} of this test"
            found.append(
                f"{first[:1].upper()}{first[1:]}: mean over the {n_prompts(result, first)} {items} of this test."
            )
        texts = "that of 1 plain text" if n == 1 else f"mean over {n} plain texts"
        found.append(f"{NEUTRAL[:1].upper()}{NEUTRAL[1:]}: {texts}{others}, the same in all tests of the run.")
    for measure in measures:
        if not has_interval(result, measure):
            n = n_prompts(result, measure)
            items = "text" if measure == NEUTRAL else "prompt"
            too_few = f"a single {items} is" if n == 1 else f"{n} {items}s are"
            found.append(f"The table has no interval of the {measure}, since {too_few} too few for one.")
    return found


def has_interval(result: Trials, measure: str) -> bool:
    """Whether a report shows the interval of a measure: shares have bounds, other means need three prompts.

    Args:
        result: The trials.
        measure: One of its measures.
    """
    if measure in result.shares or any(measure in trial.intervals for trial in result.trials):
        return True
    return n_prompts(result, measure) >= MIN_INTERVAL_PROMPTS


def n_prompts(result: Trials, measure: str) -> int:
    """The smallest number of prompts of a measure in a trial.

    Args:
        result: The trials.
        measure: One of its measures.
    """
    return min(len(trial.values[measure]) for trial in result.trials if measure in trial.values)
