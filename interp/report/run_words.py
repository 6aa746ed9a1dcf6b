"""The settings of a run in words: those that it used, by their lines in the documentation."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from interp.analyses import registry
from interp.analyses.docstrings import argument_lines
from interp.analyses.prompt_sizes import PromptSizes, sizes_used
from interp.analyses.source_settings import is_set, text
from interp.analyses.tasks import standard
from interp.runs.plan import ScorePlan
from interp.runs.results import RunResults
from interp.runs.safety import SafetyPlan
from interp.runs.steer import SteerPlan

CONTROL = ".control"
"""ending of the name of a control, after the name of its analysis"""
NAMES = {
    "analyses": "analyses",
    "check": "ablation tests",
    "heads": "tested heads",
    "kinds": "further ablations",
    "thorough": "extra ablation section for each analysis, with different numbers of ablated heads (--thorough)",
}
"""settings of a run whose lines in the documentation are too long for a name"""
OF_TESTS = {"n_heads", "n_random_sets", "ablation", "kinds", "thorough"}
"""settings of a run that only its ablation tests use"""


def run_settings(results: RunResults) -> list[tuple[str, str]]:
    """The settings of a run as names and values, without those that it did not use.

    Args:
        results: The results of a run.
    """
    plan = results.settings
    made = next((kind for kind in (ScorePlan, SteerPlan, SafetyPlan) if _has(kind, plan)), None)
    lines = {} if made is None else argument_lines(made)
    rows = []
    for name, value in plan.items():
        if name == "sizes" and isinstance(value, Mapping):
            rows += _sizes(results, value)
        elif name == "settings" and isinstance(value, Mapping):
            rows += [(each, _value(given)) for each, given in _flat(value)]
        elif isinstance(value, Mapping):
            rows += [(f"{name}.{each}", _value(given)) for each, given in _flat(value) if is_set(given)]
        elif is_set(value) and not (name in OF_TESTS and plan.get("check") is False):
            given = [kind for kind in value if kind != plan.get("ablation")] if name == "kinds" else value
            rows += [(NAMES.get(name) or _name(lines, name), _value(given))] if is_set(given) else []
    return rows


def _sizes(results: RunResults, sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    used, lines = _used(results), argument_lines(PromptSizes)
    known = [name for name, value in sizes.items() if is_set(value) and (used is None or name in used)]
    return [(_name(lines, name), _value(sizes[name])) for name in known]


def _used(results: RunResults) -> set[str] | None:
    """The sizes that the prompts and tests of these results use; None where a function does not name its sizes."""
    found = {"seed", "haystack"}
    for name in results:
        entry = registry.find(name.removesuffix(CONTROL)) if "/" not in name else None
        if entry is None:
            continue
        makers = [entry.prompts] if entry.prompts is not None else []
        if name.endswith(CONTROL):
            makers = [standard.neutral_texts, *([] if entry.control.own_prompts else [standard.check_needles])]
            found |= {"reply_tokens"} if entry.control.new_tokens else set()
        for maker in makers:
            used = sizes_used(maker)
            if used is None:
                return None
            found |= used
        found |= {value[1:] for value in entry.run_settings.values() if str(value).startswith("$")}
    return found


def _has(plan: type, settings: Mapping[str, Any]) -> bool:
    return bool(settings) and set(settings) <= {field.name for field in fields(plan)}


def _name(lines: Mapping[str, str], name: str) -> str:
    """The line of a setting up to its first colon, semicolon or full stop, else its name."""
    line = re.split(r"[:;]|\.(?= |$)", lines.get(name, ""), maxsplit=1)[0].replace("`", "")
    return f"{line[:1].lower()}{line[1:]}" or name


def _value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else text(value)


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else [(f"{before}{name}", value)]
    return found
