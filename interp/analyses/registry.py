"""The registry: analyses, edits and key selectors declare themselves in the files that define them.

A declaration is a decorator: `@analysis(...)`, `@edit(...)` or `@selector(...)`. Built-in ones are found by scanning
the text of the files below `interp/analyses`, so that names are known without importing anything; a module is imported
when its entry is first used. Other packages join through the entry point groups `interp.analyses`, `interp.edits` and
`interp.selectors`, whose names are the names of the entries.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from interp.analyses.docstrings import Setting, sections_of, settings_of
from interp.analyses.setting_types import fits
from interp.errors import UsageError

Kind = Literal["analysis", "edit", "selector"]
KINDS: tuple[Kind, ...] = ("analysis", "edit", "selector")
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A declared analysis, edit or key selector."""

    kind: Kind
    name: str
    thing: Any
    """the function or class"""
    title: str
    """heading in reports and lists"""
    group: str
    """heading under which it is listed"""
    order: float = 100.0
    """place within lists and reports, low ones first; ties by name"""
    distribution: str = "interp"
    """the package it comes from"""

    @property
    def sections(self) -> dict[str, str]:
        """Sections of its docstring, see `sections_of`."""
        return sections_of(self.thing)

    @property
    def source(self) -> str:
        """The paper it follows."""
        return self.sections.get("source", "")

    @property
    def settings(self) -> dict[str, Setting]:
        """Its settings with their defaults."""
        return settings_of(self.thing)

    def check_settings(self, given: Mapping[str, Any]) -> None:
        """Raise UsageError for a setting that it does not have, or a number or text where another type is expected."""
        settings = self.settings
        for name, value in given.items():
            if name not in settings:
                known = f"it has {', '.join(settings)}" if settings else "it has no settings"
                raise UsageError(f"{self.name} has no setting {name!r}{near(name, settings)}; {known}.")
            if not fits(value, settings[name].kind):
                default = settings[name].default
                example = "" if default is None or default == "" else f", as in {self.name}.{name}={default}"
                raise UsageError(
                    f"{self.name}.{name} is {value!r}, expected {settings[name].kind}; give such a value{example}."
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis(Entry):
    """How an analysis is asked in a run, and how its result is tested and shown."""

    prompts: Callable[[Any, Any], Any] | None = None
    """(sizes, tokenizer) -> Prompts, or a pair of Prompts where `paired`; see `tasks.standard`"""
    paired: bool = False
    """`prompts` gives (prompts, partners), and the function takes both"""
    partners_first: bool = False
    """the function takes all of the partners before the prompts"""
    joint: bool = False
    """its result cannot be joined from batches, so that all prompts are given at once"""
    own_prompts: bool | Callable[[Any, Any], Any] = True
    """whether a user's own prompts can take the place of the standard ones; a function (prompts, sizes) chooses some"""
    check: Callable[[Any], Any] | None = None
    """raises where the analysis would refuse the prompts, before a run begins"""
    check_model: Callable[[Any], Any] | None = None
    """raises where the analysis would refuse the model, before a run begins"""
    max_new_tokens: int | str = 0
    """new tokens that must fit after a prompt; a string names the size that holds the number"""
    resumable: bool = False
    """it takes `folder=` and keeps finished steps there"""
    needs: tuple[str, ...] = ()
    """analyses whose results `inputs` takes; "heads": any head scores of the run, or named heads"""
    named_heads: bool = False
    """heads that a user names can take the place of the results in `needs`"""
    automatic: bool = False
    """every run of head tables adds it, where its needs are met"""
    inputs: Callable[[Any], dict[str, Any]] | None = None
    """RunInputs -> further arguments of the function, made when the results in `needs` are there"""
    run_settings: Mapping[str, Any] = field(default_factory=dict)
    """settings that a run uses in place of the function's defaults; a string value "$name" takes a size of the run"""
    control: Any = None
    """how its top heads are tested, see `analyses.causal.controls`"""
    cost: Callable[..., Any] | None = None
    """(model, prompts, batch_size, settings) -> Cost; by default one forward pass a batch"""
    threshold: float | None = None
    """score above which a head has the role that the analysis measures, where its table states none"""
    role_order: float = 0.0
    """heads with several roles are sorted under the one with the lowest number"""
    color: str | None = None
    """its colour in every figure"""
    sets: tuple[str, ...] = ()
    """names that stand for several analyses and include this one, such as "all" """
    in_every: bool = True
    """whether "every" includes it"""


@dataclass(frozen=True, kw_only=True, eq=False)
class EditEntry(Entry):
    """How an edit is used by a steering run, see `steer.make_edit`."""

    tuned: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """settings that the dev split chooses where they are not given, with their candidates"""
    fitted: Callable[..., Any] | None = None
    """(model, prompts, *, span, heads, **settings) -> edit, for an edit that is estimated from prompts of the profile
    split where a field without a default is not given; its keyword arguments are settings of the edit too"""

    @property
    def settings(self) -> dict[str, Setting]:
        """Its fields and the settings of `fitted`; `heads` is an option of the command, `spans` of the task."""
        fit = settings_of(self.fitted) if self.fitted else {}
        fit = {name: each for name, each in fit.items() if name not in ("span", "heads")}
        return {**{name: each for name, each in settings_of(self.thing).items() if name != "heads"}, **fit}


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectorEntry(Entry):
    """How a key selector is made for a curve over kept keys, see `kv.selectors_of`."""

    needs: tuple[str, ...] | tuple[tuple[str, ...], ...] = ()
    """analyses whose scores make it; several tuples are alternatives, the first of which has precedence"""
    from_scores: Callable[..., Any] | None = None
    """(scores of `needs` ..., keep_ratio, **settings) -> selector; by default the class method `from_scores` where
    there are needs, else the class itself, which takes the ratio alone"""
    baseline: bool = False
    """the control of all others"""

    @property
    def alternatives(self) -> tuple[tuple[str, ...], ...]:
        """The sets of scores that make it, each of which is enough; empty where it needs none."""
        several = [each for each in self.needs if not isinstance(each, str)]
        single = tuple(each for each in self.needs if isinstance(each, str))
        return (*several, single) if single else tuple(several)

    def needed(self, names: Iterable[str]) -> tuple[str, ...] | None:
        """The scores that make it among those of these names; None where they are not enough."""
        given = set(names)
        if not self.needs:
            return ()
        return next((each for each in self.alternatives if given.issuperset(each)), None)

    @property
    def maker(self) -> Callable[..., Any]:
        """The function or class that makes it."""
        return self.from_scores or (self.thing.from_scores if self.needs else self.thing)

    @property
    def settings(self) -> dict[str, Setting]:
        """Its fields and the keyword arguments of its maker; the share of keys comes from the curve."""
        made = settings_of(self.maker) if self.needs else {}
        fields = {name: each for name, each in settings_of(self.thing).items() if name not in ("heads", "keep_ratio")}
        return {**fields, **made}


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
        own: Any = thing
        known = name or (own.__name__ if kind == "analysis" else own.__name__.lower())
        entry = _ENTRY[kind](kind=kind, name=known, thing=thing, title=title, group=group, **declared)
        # on the thing itself, not inherited by subclasses: see `entry_of`
        own.__interp__ = entry
        _DECLARED[kind, known] = own
        return thing

    return mark


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
        # a name of ours is never taken over by another package
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
    """Whether a name, with hyphens or capitals allowed, is that of an entry."""
    return _canonical(name, kind) is not None


def kinds_of(name: str) -> list[Kind]:
    """The kinds that have an entry of a name."""
    return [kind for kind in KINDS if is_known(name, kind) or (kind, name) in _DECLARED]


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
    """The analyses in "retrieval,sinks" or "all", each once, in the order of a report.

    Args:
        text: Names separated by commas; a name of a set stands for several, "every" for all that declare it.

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
    return (*entry.sets, "every") if entry.in_every else entry.sets


@cache
def sets() -> tuple[str, ...]:
    """Names that stand for several analyses."""
    return tuple(dict.fromkeys(name for entry in entries() for name in sets_of(entry)))


def near(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known name, for an error message; "" where none is near."""
    found = get_close_matches(name, list(known), 1)
    return f", did you mean {found[0]!r}?" if found else ""


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
        return entry, setting, json.loads(value)
    except ValueError:
        return entry, setting, value.strip()


def iterate() -> Iterator[Entry]:
    """Every entry of every kind."""
    for kind in KINDS:
        yield from entries(kind)
