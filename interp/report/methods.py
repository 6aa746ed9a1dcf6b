"""The method behind each section of a report: its documentation, and its settings next to those of the source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interp.analyses import registry
from interp.analyses.entries import Analysis
from interp.analyses.measures.refusals import RefusalResult
from interp.analyses.prompt_sizes import description
from interp.analyses.source_settings import SettingRow, setting_rows
from interp.analyses.steer.result import SteeringResult
from interp.analyses.views.explore import Explored
from interp.report.page import about
from interp.report.words import CONTROL, named_settings
from interp.runs.results import RunResults

HASHES = ("prompts", "counted")
"""stored entries that are no settings: a hash, and numbers that sentences state"""


@dataclass(frozen=True)
class Method:
    """Documentation and settings that a section prints."""

    about: list[tuple[str, str]]
    """headings and texts of the documentation"""
    settings: list[SettingRow]
    """settings whose value in the source is known, then all others that are set"""
    stored: str = ""
    """settings in one line, for a result that no entry of the registry made"""


def method_of(results: RunResults, name: str) -> Method:
    """The method of a result; empty where no entry of the registry made it.

    Args:
        results: The results of a run.
        name: One of its names.
    """
    result = results[name]
    named, kind = _entry_name(name, result)
    entry = registry.find(named.rpartition("/")[2], kind)
    table, dot, _ = name.rpartition(".")
    # a further test of a table, such as "retrieval.profile", whose method the section of the table prints
    if entry is None or (dot and table in results):
        return Method([], [], settings_words(result, name))
    # the plan is that of the outer run
    plan: Mapping[str, Any] = {} if "/" in name else results.settings
    rows = setting_rows(entry, _used(entry, plan, result), plan.get("sizes", {}), own=results.own_prompts)
    rows = [row for row in rows if row.source or row.is_set]
    texts = about(named, kind)
    if prompts := prompts_words(entry, plan.get("sizes", {}), own=results.own_prompts):
        texts.insert(1, ("Prompts", prompts))
    return Method(texts, sorted(rows, key=lambda row: not row.source))


def prompts_words(entry: registry.Entry, sizes: Mapping[str, Any], own: bool = False) -> str:
    """The prompts of an analysis in a run, in words; empty where they are not known.

    Args:
        entry: The entry of the analysis.
        sizes: Fields of the `PromptSizes` of the run.
        own: Whether the user's own prompts took the place of the standard ones.
    """
    if not isinstance(entry, Analysis) or not sizes:
        return ""
    if own and entry.own_prompts:
        return "Your own prompts."
    words = description(entry.prompts, sizes)
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def settings_words(result: Any, name: str) -> str:
    """The settings that a result stores, in one line; empty where it stores none.

    Args:
        result: A result, such as a control.
        name: Its name in the run.
    """
    stored = {key: value for key, value in getattr(result, "settings", {}).items() if key not in HASHES}
    shown = [f"{key}\u00a0= {value}" for key, value in named_settings(stored, tested=name.endswith(CONTROL))]
    return f"Settings: {'; '.join(shown)}." if shown else ""


def _entry_name(name: str, result: Any) -> tuple[str, registry.Kind]:
    """The entry that a section is about; requests are shown with the groups of Sahara."""
    if isinstance(result, SteeringResult):
        return result.method, "edit"
    return ("sahara" if isinstance(result, RefusalResult) else name), "analysis"


def _used(entry: registry.Entry, plan: Mapping[str, Any], result: Any) -> dict[str, Any]:
    """Settings that the run gave, and those that the result stores."""
    given = dict(plan.get("settings") or {}).get(entry.name, {})
    stored = dict(getattr(result, "settings", {}))
    if (threshold := getattr(result, "threshold", None)) is not None:
        stored["threshold"] = threshold
    if isinstance(result, SteeringResult):
        stored |= {name: getattr(edit, name) for edit in result.edits for name in entry.settings if hasattr(edit, name)}
    if isinstance(result, Explored) and stored.get("heads") == "given":
        n = f"{len(result.heads)} head{'' if len(result.heads) == 1 else 's'}"
        stored["heads"] = f"{n} (named)" if plan.get("heads") else f"{n} (those of the section Heads)"
    if isinstance(result, RefusalResult):
        stored |= {"size": plan["group_size"]} if "group_size" in plan else {}
        stored |= {"ablation": list(result.groups)} if result.groups else {}
    return {name: value for name, value in (given | stored).items() if name in entry.settings}
