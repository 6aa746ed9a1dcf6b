"""Tables and cards of analyses, edits, key selectors and tasks, for `interp list`."""

import re
from typing import Any

from interp.analyses import registry, tasks
from interp.analyses.docstrings import argument_lines
from interp.analyses.memory import REFERENCE, REFERENCE_LENGTH
from interp.analyses.registry import Entry
from interp.analyses.source_settings import setting_rows
from interp.analyses.tasks.task import Task
from interp.errors import UsageError
from interp.hooks.read.capture_cost import format_bytes

HEADINGS = {
    "analysis": "Analyses (interp score NAMES MODEL)",
    "edit": "Edits (interp steer MODEL --method NAME)",
    "selector": "Key selectors (interp score kv MODEL)",
}
GIVEN_BY = {"edit": {"heads": "--heads"}, "selector": {"keep_ratio": "--set kv.keep_ratios"}}
"""kind -> fields that are not settings, and the option or setting of a run that gives them"""
SECTIONS = ("returns", "raises", "source", "differs", "limits")
SOURCE_WIDTH = 70
ANY_HEADS = "heads"
"""the need of an analysis that takes the heads of any other"""
SETS = {
    "basic": "the five analyses of `interp report`",
    "long": "analyses of the group `long context` that need no results of another, without needle_sweep",
    "all": "every analysis that needs no results of another, without needle_sweep and those of `interp safety`",
}
"""the sets of this package in words"""
TASKS = "tasks"
"""the name under which `interp list` prints all tasks"""


def table_data() -> list[dict[str, Any]]:
    """One row for each entry and task: kind, name, title, group, source, needs, command, sets, package."""
    rows = [
        {
            "kind": entry.kind, "name": entry.name, "title": entry.title, "group": entry.group,
            "source": citation(entry.source), "needs": list(_needs(entry)), "command": _command(entry),
            "sets": list(registry.sets_of(entry)) if isinstance(entry, registry.Analysis) else [],
            "package": entry.distribution,
        }
        for entry in registry.iterate()
    ]  # fmt: skip
    blank = {"group": "", "source": "", "needs": [], "command": "steer", "sets": [], "package": "interp"}
    return rows + [{"kind": "task", "name": task.name, "title": task.description, **blank} for task in _tasks()]


def table() -> str:
    """All entries and tasks as text, a line each under the heading of their kind and group."""
    rows, lines = table_data(), []
    width = max(len(row["name"]) for row in rows)
    title_width = max(len(row["title"]) for row in rows if row["kind"] in registry.KINDS)
    for kind in registry.KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        columns = f"    {'Name':{width}s}  {'Title':{title_width}s}  Source"
        lines += ["", HEADINGS[kind], columns] if of_kind else []
        for group in dict.fromkeys(row["group"] for row in of_kind):
            lines += [f"  {group}"] if group else []
            for row in (row for row in of_kind if row["group"] == group):
                notes = f"  needs {_needs_text(row['needs'])}" if row["needs"] else ""
                if kind == "analysis" and row["command"] != "score":
                    notes += f"  part of interp {row['command']}"
                lines.append(
                    f"    {row['name']:{width}s}  {row['title']:{title_width}s}  {row['source']}{notes}".rstrip()
                )
    lines += ["", *_task_lines(width)]
    sets = {name: [e.name for e in registry.entries() if name in registry.sets_of(e)] for name in registry.sets()}
    lines += ["", "Sets of analyses (interp score SET MODEL)"]
    for name, members in sets.items():
        about = f"{SETS[name]}: " if name in SETS else ""
        lines.append(f"    {name:{width}s}  {about}{', '.join(members)}")
    return "\n".join(lines).lstrip("\n") + "\n\nDocumentation and settings of one entry: interp list NAME"


def card_data(name: str) -> list[dict[str, Any]]:
    """The card of every entry of a name: title, docstring sections and settings; of a task, or of all tasks."""
    if found := _tasks_named(name):
        return [{"kind": "task", "name": task.name, "summary": task.description, "settings": []} for task in found]
    return [
        {
            "kind": entry.kind, "name": entry.name, "title": entry.title, "group": entry.group, **entry.sections,
            "memory": memory_at_reference(entry),
            "settings": [{"name": s.name, "default": _plain(s.default), "type": s.kind, "help": s.help}
                         for s in entry.settings.values()],
            "source_settings": [{"name": row.name, "run": row.used, "source": row.source}
                                for row in setting_rows(entry) if row.source],
        }
        for entry in _found(name)
    ]  # fmt: skip


def card(name: str) -> str:
    """The card of every entry of a name, as text; of a task, or of all tasks."""
    if found := _tasks_named(name):
        return "\n".join(_task_lines(max(len(task.name) for task in found), found))
    return "\n\n".join(_card(entry) for entry in _found(name))


def _card(entry: Entry) -> str:
    parts = entry.sections
    kind = ", ".join(part for part in (entry.kind, entry.group) if part)
    lines = [f"{entry.name}: {entry.title} ({kind})", "", parts.get("summary", "")]
    lines += ["", parts["text"]] if "text" in parts else []
    if entry.settings:
        lines += ["", "Settings (--set " + f"{entry.name}.NAME=VALUE)"]
        lines += [f"    {s.name} = {_plain(s.default)!r}{_in_run(entry, s.name)}  {s.help}".rstrip()
                  for s in entry.settings.values()]  # fmt: skip
    if rows := [row for row in setting_rows(entry) if row.source]:
        cells = [("Setting", "Default", "Source"), *((row.name, row.used, row.source) for row in rows)]
        widths = [max(len(row[place]) for row in cells) for place in (0, 1)]
        lines += ["", "Default settings of `interp score`, and those of the source"]
        lines += [f"    {one:{widths[0]}s}  {two:{widths[1]}s}  {three}" for one, two, three in cells]
    helps = argument_lines(entry.thing)
    if given := {name: by for name, by in GIVEN_BY.get(entry.kind, {}).items() if name in helps}:
        lines += ["", "Set by a separate option"]
        lines += [f"    {name} (in a run: {by})  {helps[name]}" for name, by in given.items()]
    if memory := memory_at_reference(entry):
        lines += ["", f"Memory\n    {memory}"]
    if needs := _needs(entry):
        lines += ["", f"Needs\n    {_needs_text(needs)}"]
    for section in SECTIONS:
        if parts.get(section):
            lines += ["", section.capitalize(), *(f"    {line}" for line in parts[section].splitlines())]
    return "\n".join(lines)


def memory_at_reference(entry: Entry) -> str:
    """The memory of activations of one prompt on a model of 8B parameters; "" where a forward pass is all."""
    model = getattr(getattr(entry, "cost", None), "activations", None)
    if model is None:
        return ""
    size = format_bytes(model(REFERENCE, 1, REFERENCE_LENGTH, {}))
    return (
        f"{size} of activations for one prompt of {REFERENCE_LENGTH:,} tokens on a model of the shape of Llama 3.1 8B "
        "in bfloat16, in addition to the weights; --dry-run computes it for your model and prompts."
    )


def _in_run(entry: Entry, setting: str) -> str:
    """The value that a run uses in place of the default."""
    if entry.kind == "edit" and setting == "spans":
        return " (in a run: the span of the task)"
    run = getattr(entry, "run_settings", {})
    if setting not in run:
        return ""
    value = run[setting]
    option = f"--{value[1:].replace('_', '-')}" if isinstance(value, str) and value.startswith("$") else repr(value)
    return f" (in a run: {option})"


def _found(name: str) -> list[Entry]:
    kinds = registry.kinds_of(name)
    if not kinds:
        known = [*(each for kind in registry.KINDS for each in registry.names(kind)), *tasks.names(), TASKS]
        raise UsageError(f"unknown name {name!r}{registry.near(name, known)}; `interp list` has all names.")
    return [registry.get(name, kind) for kind in kinds]


def _needs(entry: Entry) -> tuple[str, ...]:
    needs = getattr(entry, "needs", ())
    if needs and not isinstance(needs[0], str):
        # alternatives, each a set of names
        return (" or ".join(" and ".join(each) for each in needs),)
    return needs


def _command(entry: Entry) -> str:
    """The command that uses an entry."""
    if isinstance(entry, registry.Analysis):
        return entry.group if entry.prompts is None and entry.inputs is None else "score"
    return "steer" if entry.kind == "edit" else "score"


def _needs_text(needs: list[str] | tuple[str, ...]) -> str:
    """The results that an entry needs, in words."""
    others = [name for name in needs if name != ANY_HEADS]
    parts = ["heads from any other analysis"] if ANY_HEADS in needs else []
    return " and ".join([*parts, *([f"scores of {' and '.join(others)}"] if others else [])])


def _tasks() -> list[Task]:
    return [tasks.get(name) for name in tasks.names()]


def _tasks_named(name: str) -> list[Task]:
    """All tasks for "tasks", else the task of a name that no entry has."""
    if name == TASKS:
        return _tasks()
    return [task for task in _tasks() if task.name == name and not registry.kinds_of(name)]


def _task_lines(width: int, found: list[Task] | None = None) -> list[str]:
    lines = [f"    {task.name:{width}s}  {task.description}" for task in (_tasks() if found is None else found)]
    return ["Tasks (interp steer MODEL --task NAME, or a .jsonl file of your own items)", *lines]


def citation(text: str) -> str:
    """The beginning of a section "Source" for a table: its first sentence or part of one, without clauses at its end
    that make it too long."""
    line = re.split(r"[;:](?= )|(?<!\bal)\.(?= [A-Z]|$)", " ".join(text.split()), maxsplit=1)[0]
    while len(line) > SOURCE_WIDTH and ", " in line:
        line = line.rpartition(", ")[0]
    return line


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | list | tuple | dict | type(None)) else str(value)
