"""The registry: analyses, edits and key selectors declare themselves in the files that define them.

A declaration is a decorator: `@analysis(...)`, `@edit(...)` or `@selector(...)`. Built-in ones are found by scanning
the text of the files below `interp/analyses`, so that names are known without importing anything; a module is imported
when its entry is first used. Other packages join through the entry point groups `interp.analyses`, `interp.edits` and
`interp.selectors`, whose names are the names of the entries.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib import import_module, metadata
from inspect import unwrap
from pathlib import Path
from typing import Any, TypeVar

from interp.analyses.entries import KINDS, Analysis, EditEntry, Entry, Kind, SelectorEntry, near
from interp.errors import UsageError
from interp.hooks.limits import parse_json

ENTRY_POINTS: dict[Kind, str] = {
    "analysis": "interp.analyses",
    "edit": "interp.edits",
    "selector": "interp.selectors",
}
T = TypeVar("T")
_DECLARATION = re.compile(r"^@(analysis|edit|selector)\(.*?^(?:def|class) (\w+)", re.M | re.S)
_DECLARED: dict[tuple[str, str], Any] = {}
"""(kind, name) -> what this process declared, such as an edit in a notebook; `get` knows it, lists do not"""
_NAME = re.compile(r'^@\w+\(\s*name="([\w-]+)"')


_ENTRY: dict[Kind, type[Entry]] = {"analysis": Analysis, "edit": EditEntry, "selector": SelectorEntry}


def analysis(*, title: str, group: str, name: str = "", **declared: Any) -> Callable[[T], T]:
    """Declare a function as an analysis that runs, the command line and reports know by its name.

    Args:
        title: Heading in reports and lists.
        group: Heading under which it is listed, such as "copying".
        name: Name in place of the function's; write it as the first argument, where the scan of the files looks for it.
        declared: Fields of `Analysis`.
    """
    return _declare("analysis", title, group, name, declared)


def edit(*, title: str, group: str = "attention", name: str = "", **declared: Any) -> Callable[[T], T]:
    """Declare a dataclass as an edit that `interp steer` knows by its name, by default the class name in lower case.

    Args:
        title: Heading in reports and lists.
        group: Heading under which it is listed.
        name: Name in place of the lower-case class name; write it as the first argument, as in `analysis`.
        declared: Fields of `EditEntry`.
    """
    return _declare("edit", title, group, name, declared)


def selector(*, title: str, group: str = "", name: str = "", **declared: Any) -> Callable[[T], T]:
    """Declare a dataclass as a key selector, by default under its class name in lower case.

    Args:
        title: Heading in reports and lists.
        group: Heading under which it is listed.
        name: Name in place of the lower-case class name; write it as the first argument, as in `analysis`.
        declared: Fields of `SelectorEntry`.
    """
    return _declare("selector", title, group, name, declared)


def _declare(kind: Kind, title: str, group: str, name: str, declared: Mapping[str, Any]) -> Callable[[T], T]:
    def mark(thing: T) -> T:
        own: Any = _with_own_defaults(thing) if kind == "analysis" else thing
        known = name or (own.__name__ if kind == "analysis" else own.__name__.lower())
        entry = _ENTRY[kind](kind=kind, name=known, thing=own, title=title, group=group, **declared)
        # on the thing itself, not inherited by subclasses: see `entry_of`
        for each in (own, unwrap(own)):
            each.__interp__ = entry
        _DECLARED[kind, known] = own
        return own

    return mark


def _with_own_defaults(function: Any) -> Any:
    """The function, which does not see the default dtype and device that a caller has set."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # this module is imported for `interp --help`, which does without torch
        from interp.hooks.model.torch_state import own_defaults

        with own_defaults():
            return function(*args, **kwargs)

    return run


def entry_of(thing: Any) -> Any:
    """The entry that a function or class declared, or None. A subclass does not inherit its parent's."""
    return vars(thing).get("__interp__") if hasattr(thing, "__dict__") else None


@dataclass(frozen=True)
class _Home:
    """Where a function or class is defined."""

    attribute: str
    load: Callable[[], Any]
    """imports it"""
    distribution: str = "interp"
    """the package that it comes from"""


@cache
def _homes(kind: Kind) -> dict[str, _Home]:
    """Name -> where it is defined, for the built-in entries and those of other packages."""
    found: dict[str, _Home] = {}
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.name == "registry.py":
            continue
        text = path.read_text(encoding="utf-8")
        for match in _DECLARATION.finditer(text):
            if match[1] != kind:
                continue
            named = _NAME.match(match[0])
            name = named[1] if named else match[2] if kind == "analysis" else match[2].lower()
            module = ".".join(("interp.analyses", *path.relative_to(root).with_suffix("").parts))
            found[name] = _Home(match[2], _importing(module, match[2]))
    for point in metadata.entry_points(group=ENTRY_POINTS[kind]):
        # a built-in name is never taken over by another package
        package = point.dist.name if point.dist is not None else ""
        found.setdefault(point.name, _Home(point.attr, point.load, package))
    return found


def _importing(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(import_module(module), name)


def class_named(name: str, kind: Kind) -> Any:
    """The declared class of a class name such as "ZeroTuning", which saved edits hold; None for an unknown one."""
    own = (thing for (of, _), thing in _DECLARED.items() if of == kind and thing.__name__ == name)
    return next((home.load() for home in _homes(kind).values() if home.attribute == name), next(own, None))


def names(kind: Kind = "analysis") -> tuple[str, ...]:
    """All names of a kind, sorted; nothing is imported."""
    return tuple(sorted(_homes(kind)))


def get(name: str, kind: Kind = "analysis") -> Any:
    """The entry of a name, with hyphens or capitals allowed.

    Raises:
        UsageError: For an unknown name, with the nearest known one, or an entry point that declares nothing.
    """
    wanted = _canonical(name, kind)
    if wanted is None and (kind, name) in _DECLARED:
        return entry_of(_DECLARED[kind, name])
    if wanted is None:
        known = names(kind)
        raise UsageError(f"unknown {kind} {name!r}{near(name, known)}; choose from {', '.join(known)}.")
    return _loaded(kind, wanted)


def find(name: str, kind: Kind = "analysis") -> Any:
    """The entry of a name, or of the entry whose variant it is ("retrieval_forced", "sahara:mean"); None for neither.

    An entry whose package cannot be imported counts as unknown.
    """
    stem = re.split(r"[:.]", name, maxsplit=1)[0]
    variants = [known for known in names(kind) if stem == known or stem.startswith(f"{known}_")]
    try:
        return _loaded(kind, max(variants, key=len)) if variants else None
    except UsageError:
        return None


def is_known(name: str, kind: Kind = "analysis") -> bool:
    """Whether a name is that of an entry (hyphens or capitals allowed), or was declared in this process."""
    return _canonical(name, kind) is not None or (kind, name) in _DECLARED


def kinds_of(name: str) -> list[Kind]:
    """The kinds that have an entry of a name."""
    return [kind for kind in KINDS if is_known(name, kind)]


def _canonical(name: str, kind: Kind) -> str | None:
    """The declared form of a name: case, hyphens and underscores do not matter."""
    known = _homes(kind)
    if name in known:
        return name

    def bare(text: str) -> str:
        return text.strip().lower().replace("-", "").replace("_", "")

    return {bare(each): each for each in known}.get(bare(name))


@cache
def _loaded(kind: Kind, name: str) -> Any:
    try:
        thing = _homes(kind)[name].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{kind} {name!r} cannot be imported ({error}); mend or remove its package.") from error
    entry = entry_of(thing)
    if entry is None or entry.kind != kind:
        raise UsageError(f"the entry point {name!r} does not declare itself; decorate it with @{kind}(...).")
    return replace(entry, distribution=_homes(kind)[name].distribution)


def entries(kind: Kind = "analysis") -> tuple[Any, ...]:
    """All entries of a kind, imported, by `order` and name."""
    return tuple(sorted((_loaded(kind, name) for name in names(kind)), key=lambda entry: (entry.order, entry.name)))


def analyses_named(text: str) -> tuple[Analysis, ...]:
    """The analyses in "retrieval,sinks" or "basic", each once, in the order of a report.

    Args:
        text: Names separated by commas; the name of a set stands for its analyses, see `sets`.

    Raises:
        UsageError: For an unknown name, with the nearest known one.
    """
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    if not wanted:
        raise UsageError(f"no analysis is named in {text!r}; choose from {', '.join((*sets(), *names()))}.")
    found: dict[str, Analysis] = {}
    for part in wanted:
        if is_known(part):
            entry = get(part)
            found[entry.name] = entry
        elif part in sets():
            found |= {entry.name: entry for entry in entries() if part in sets_of(entry)}
        else:
            known = (*sets(), *names())
            raise UsageError(f"unknown analysis {part!r}{near(part, known)}; choose from {', '.join(known)}.")
    return tuple(sorted(found.values(), key=lambda entry: (entry.order, entry.name)))


def sets_of(entry: Analysis) -> tuple[str, ...]:
    """The names of sets that include an analysis."""
    return (*entry.sets, "all") if entry.in_all else entry.sets


@cache
def sets() -> tuple[str, ...]:
    """Names that stand for several analyses: "basic", "long", "all", and those that other packages declare."""
    return tuple(dict.fromkeys(name for entry in entries() for name in sets_of(entry)))


def parse_setting(text: str) -> tuple[str, str, Any]:
    """(entry, setting, value) of "qada.tau=0.9"; the value is read as JSON where it is JSON, else as text.

    Raises:
        UsageError: Where the text has no dot, no equals sign or no name.
    """
    path, sign, value = text.partition("=")
    entry, dot, setting = path.strip().rpartition(".")
    if not sign or not dot or not entry or not setting:
        raise UsageError(f"cannot read the setting {text!r}; write name.setting=value, as in qada.tau=0.9.")
    try:
        return entry, setting, parse_json(value)
    except ValueError:
        return entry, setting, value.strip()


def iterate() -> Iterator[Entry]:
    """Every entry of every kind."""
    for kind in KINDS:
        yield from entries(kind)
