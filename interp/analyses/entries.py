"""Declarations of analyses, edits and key selectors, see `interp.analyses.registry`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from interp.analyses.docstrings import Setting, sections_of, settings_of
from interp.analyses.setting_types import fits
from interp.errors import UsageError
from interp.hooks.limits import shortened

Kind = Literal["analysis", "edit", "selector"]
KINDS: tuple[Kind, ...] = ("analysis", "edit", "selector")


def near(name: str, known: Iterable[str]) -> str:
    """The nearest known name in parentheses, for the middle of an error message; "" where none is near."""
    found = get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


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
    source_settings: Mapping[str, Any] = field(default_factory=dict)
    """values that its source states: name of a setting, of a size in `PromptSizes`, or of a task's parameter, such as
    "relations.shots" -> a value, or words where there are several"""

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
                    f"{self.name}.{name} is {shortened(repr(value))}, expected {settings[name].kind}; give such a "
                    f"value{example}."
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis(Entry):
    """How a run calls an analysis, and how its result is tested and shown."""

    prompts: Callable[[Any, Any], Any] | None = None
    """(sizes, tokenizer) -> Prompts, or a tuple of Prompts where `paired`; see `tasks.standard`"""
    paired: bool = False
    """`prompts` gives (prompts, partners), or further partners, and the function takes them all"""
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
    control_extras: Mapping[str, str] = field(default_factory=dict)
    """extras `[n l h]` of its scores that are the same score where nothing should be found, such as on distractors ->
    heading of the column that a report prints next to the score"""
    shown_extras: Mapping[str, str] = field(default_factory=dict)
    """other extras `[n l h]` that a report prints next to the score -> heading of the column"""
    sets: tuple[str, ...] = ()
    """names that stand for several analyses and include this one, such as "basic" """
    in_all: bool = True
    """whether the set "all" includes it"""


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
