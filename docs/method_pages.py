"""Pages and tables of the methods, from the registry; the docstrings are left to mkdocstrings."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from inspect import getdoc, isclass, isroutine, unwrap
from typing import Any

from interp.analyses import registry
from interp.analyses.registry import Analysis, Entry
from interp.analyses.source_settings import setting_rows

PACKAGES = {"find": ("identify", "causal"), "steer": ("steer",), "kv": ("kv",), "views": ("views",)}
"""folder of the pages of methods -> packages that hold them"""
COLUMNS = "| name | title | measures | source | needs |\n|---|---|---|---|---|"


def methods(folder: str) -> list[Entry]:
    """The entries of the registry whose pages are in a folder."""
    places = tuple(f"interp.analyses.{package}." for package in PACKAGES[folder])
    return [entry for entry in registry.iterate() if entry.thing.__module__.startswith(places)]


def public(package: str, modules: Iterable[str]) -> Iterator[Any]:
    """Public functions and classes of some modules that are not methods of the registry."""
    for module in (import_module(f"{package}.{name}".rstrip(".")) for name in modules):
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for thing in (getattr(module, name) for name in getattr(module, "__all__", own) if not name.startswith("_")):
            if (isclass(thing) or isroutine(thing)) and registry.entry_of(unwrap(thing)) is None and getdoc(thing):
                yield thing


def shown(thing: Any) -> str:
    """The name by which a user knows a function or class, such as "interp.load", "identify.sinks" or "keep.mass"."""
    if getattr(import_module("interp"), thing.__name__, None) is thing:
        return f"interp.{thing.__name__}"
    parts = unwrap(thing).__module__.split(".")
    package = parts[2] if parts[1] in ("analyses", "hooks") else parts[1]
    return f"{'keep' if parts[-1] == 'keep' else package}.{thing.__name__}"


def path_of(thing: Any) -> str:
    """The identifier by which mkdocstrings finds a function or class."""
    return f"{unwrap(thing).__module__}.{thing.__qualname__}"


def directive(thing: Any) -> str:
    """The lines that mkdocstrings replaces by the documentation of a function or class."""
    return f"::: {path_of(thing)}\n    options:\n      heading: {shown(thing)}\n"


def group_of(entry: Entry) -> str:
    """The heading under which a method is listed."""
    group = entry.group or f"{entry.kind}s"
    return group.upper() if len(group) == 2 else group[0].upper() + group[1:]


def needs_of(entry: Entry) -> list[str]:
    """The results that a method needs; several sets of them, any of which will do, are one item joined by "or"."""
    needs = getattr(entry, "needs", ())
    return [" or ".join(", ".join(each) for each in needs)] if needs and not isinstance(needs[0], str) else [*needs]


def command_of(entry: Entry) -> str:
    """The command that runs a method."""
    if entry.kind == "edit":
        return f"interp steer MODEL --method {entry.name} --task TASK --out DIR"
    if isinstance(entry, Analysis) and entry.prompts is None and entry.inputs is None:
        return f"interp {entry.group} MODEL --out DIR"
    first = ", ".join(needs_of(entry)).split(" or ")[0].replace("heads", "retrieval").split(", ")
    named = [*filter(None, first), "kv" if entry.kind == "selector" else entry.name]
    return f"interp score {','.join(named)} MODEL --out DIR"


def method_page(entry: Entry) -> str:
    """Title, command and place of a method, its settings next to those of the source, then its docstring."""
    rows = {
        "Command": f"`{command_of(entry)}`",
        "Settings for `--set`": ", ".join(f"`{name}`" for name in entry.settings),
        "Group": group_of(entry),
        "Sets": ", ".join(registry.sets_of(entry)) if isinstance(entry, Analysis) else "",
        "Needs": ", ".join(needs_of(entry)),
        "Control": getattr(getattr(entry, "control", None), "title", ""),
        "File": f"`{entry.thing.__module__.replace('.', '/')}.py`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"# {entry.title}\n\n| | |\n|---|---|\n{table}\n\n{source_table(entry)}{directive(entry.thing)}"


def source_table(entry: Entry) -> str:
    """The settings of a run without options whose value in the source is known; "" for none. Differences are bold."""
    rows = [row for row in setting_rows(entry) if row.source]
    cells = [f"| `{row.name}` | {_bold(row.used, row.differs)} | {_bold(row.source, row.differs)} |" for row in rows]
    return "\n".join(["| setting | this run | source |", "|---|---|---|", *cells]) + "\n\n" if rows else ""


def method_tables(folder: str) -> str:
    """A table of methods for each group of a folder."""
    found, tables = methods(folder), []
    for group in dict.fromkeys(group_of(entry) for entry in found):
        rows = [
            f"| `{shown(entry.thing)}` | {entry.title} | {_cell(entry.sections['summary'])} | {_cell(entry.source)} "
            f"| {', '.join(needs_of(entry))} |"
            for entry in found
            if group_of(entry) == group
        ]
        tables.append("\n".join([f"### {group}\n", COLUMNS, *rows]))
    return "\n\n".join(tables)


def limits_table() -> str:
    """The limits of every method."""
    rows = [f"| `{shown(entry.thing)}` | {_cell(entry.sections.get('limits', ''))} |" for entry in registry.iterate()]
    return "\n".join(["| method | limits |", "|---|---|", *rows])


def sources_table() -> str:
    """The paper of every method."""
    rows = [f"| `{shown(entry.thing)}` | {entry.title} | {_cell(entry.source)} |" for entry in registry.iterate()]
    return "\n".join(["| method | title | source |", "|---|---|---|", *rows])


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _cell(text: str) -> str:
    """The first paragraph of a section of a docstring, as the cell of a table."""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
