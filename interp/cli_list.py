"""Tables and cards of analyses, edits and key selectors, for `interp list`."""

from typing import Any

from interp.analyses import registry
from interp.analyses.memory import REFERENCE, REFERENCE_LENGTH
from interp.analyses.registry import Entry
from interp.errors import UsageError
from interp.hooks.read.capture_cost import format_bytes

HEADINGS = {"analysis": "Analyses", "edit": "Edits", "selector": "Key selectors"}
SECTIONS = ("returns", "raises", "source", "differs", "limits")
SOURCE_WIDTH = 60


def table_data() -> list[dict[str, Any]]:
    """One row for each entry: kind, name, title, group, source, needs, sets, package."""
    return [
        {
            "kind": entry.kind, "name": entry.name, "title": entry.title, "group": entry.group,
            "source": first_sentence(entry.source), "needs": list(_needs(entry)),
            "sets": list(registry.sets_of(entry)) if isinstance(entry, registry.Analysis) else [],
            "package": entry.distribution,
        }
        for entry in registry.iterate()
    ]  # fmt: skip


def table() -> str:
    """All entries as text, a line each under the heading of their kind and group."""
    rows, lines = table_data(), []
    width = max(len(row["name"]) for row in rows)
    title_width = max(len(row["title"]) for row in rows)
    for kind in registry.KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        lines += ["", HEADINGS[kind]] if of_kind else []
        for group in dict.fromkeys(row["group"] for row in of_kind):
            lines += [f"  {group}"] if group else []
            for row in (row for row in of_kind if row["group"] == group):
                source = (
                    row["source"] if len(row["source"]) <= SOURCE_WIDTH else f"{row['source'][: SOURCE_WIDTH - 1]}…"
                )
                needs = f"  needs {', '.join(row['needs'])}" if row["needs"] else ""
                lines.append(f"    {row['name']:{width}s}  {row['title']:{title_width}s}  {source}{needs}".rstrip())
    sets = {name: [e.name for e in registry.entries() if name in registry.sets_of(e)] for name in registry.sets()}
    lines += ["", "Sets", *(f"    {name:{width}s}  {', '.join(names)}" for name, names in sets.items())]
    return "\n".join(lines).lstrip("\n") + "\n\nThe card and the settings of one: interp list NAME"


def card_data(name: str) -> list[dict[str, Any]]:
    """The card of every entry of a name: title, docstring sections and settings."""
    return [
        {
            "kind": entry.kind, "name": entry.name, "title": entry.title, "group": entry.group, **entry.sections,
            "memory": memory_at_reference(entry),
            "settings": [{"name": s.name, "default": _plain(s.default), "type": s.kind, "help": s.help}
                         for s in entry.settings.values()],
        }
        for entry in _found(name)
    ]  # fmt: skip


def card(name: str) -> str:
    """The card of every entry of a name, as text."""
    return "\n\n".join(_card(entry) for entry in _found(name))


def _card(entry: Entry) -> str:
    parts = entry.sections
    lines = [f"{entry.name}: {entry.title} ({entry.kind}, {entry.group})", "", parts.get("summary", "")]
    lines += ["", parts["text"]] if "text" in parts else []
    if entry.settings:
        lines += ["", "Settings (--set " + f"{entry.name}.NAME=VALUE)"]
        lines += [f"    {s.name} = {_plain(s.default)!r}{_in_run(entry, s.name)}  {s.help}".rstrip()
                  for s in entry.settings.values()]  # fmt: skip
    if memory := memory_at_reference(entry):
        lines += ["", f"Memory\n    {memory}"]
    if needs := _needs(entry):
        lines += ["", f"Needs\n    {', '.join(needs)}"]
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
    run = getattr(entry, "run_settings", {})
    if setting not in run:
        return ""
    value = run[setting]
    option = f"--{value[1:].replace('_', '-')}" if isinstance(value, str) and value.startswith("$") else repr(value)
    return f" (in a run: {option})"


def _found(name: str) -> list[Entry]:
    kinds = registry.kinds_of(name)
    if not kinds:
        known = [each for kind in registry.KINDS for each in registry.names(kind)]
        raise UsageError(f"unknown name {name!r}{registry.near(name, known)}; `interp list` has all names.")
    return [registry.get(name, kind) for kind in kinds]


def _needs(entry: Entry) -> tuple[str, ...]:
    needs = getattr(entry, "needs", ())
    if needs and not isinstance(needs[0], str):
        # alternatives, each a set of names
        return (" or ".join(" and ".join(each) for each in needs),)
    return needs


def first_sentence(text: str) -> str:
    """The first line of a section, for a table."""
    return " ".join(text.split("\n\n")[0].split())


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | list | tuple | dict | type(None)) else str(value)
