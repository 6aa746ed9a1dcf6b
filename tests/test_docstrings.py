"""Docstrings of public names are whole and in order, their examples run, and all text is in plain English."""

import doctest
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import prose
import pytest
import tiny_chat_model
import torch

import interp
from interp.analyses import registry
from interp.analyses.docstrings import argument_lines, sections_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = tuple(
    f"interp.analyses.results.{name}"
    for name in (
        "codec",
        "comparison",
        "head_list_formats",
        "head_scores",
        "leading",
        "result",
        "statistics",
        "table_statistics",
        "trials",
    )
)
RUNS = tuple(f"interp.runs.{name}" for name in ("run", "plan", "results", "safety", "stage", "steer", "estimate"))
MODULES = ("interp", "interp.tasks", "interp.plots", "interp.keep", "interp.kv", "interp.testing", *RESULTS, *RUNS)
ORDER = ("args", "attributes", "returns", "yields", "raises", "examples", "source", "differs", "limits")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NOT_PARAMETERS = ("self", "cls")


def names_of(module: ModuleType) -> list[str]:
    """The public names of a module: those it lists, else those it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]


def public() -> dict[str, Any]:
    """Every public function and class by the place of its definition."""
    found = [entry.thing for entry in registry.iterate()]
    for module in map(import_module, MODULES):
        found += [getattr(module, name) for name in names_of(module)]
    things = (inspect.unwrap(thing) for thing in found if inspect.isclass(thing) or inspect.isroutine(thing))
    return {
        f"{thing.__module__}.{thing.__qualname__}": thing for thing in things if thing.__module__.startswith("interp")
    }


PUBLIC = public()
METHODS = {entry.name: entry for entry in registry.iterate()}


def members(thing: Any) -> Iterator[tuple[str, Any]]:
    """A function, or a class and the public methods and properties that it defines first, with their names."""
    yield "", thing
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(member, "__func__", member)
        if isinstance(member, property):
            function = member.fget
        inherited = any(name in vars(base) for base in thing.__mro__[1:])
        if not name.startswith("_") and isinstance(function, FunctionType) and not inherited:
            yield name, function


def faults_of(thing: Any, name: str) -> Iterator[str]:
    """The reasons why a docstring is not whole."""
    # the docstring of the thing itself, never an inherited one
    text = inspect.cleandoc(vars(thing).get("__doc__") or thing.__doc__ or "")
    if not text:
        yield f"{name}: has no docstring"
        return
    if not re.match(r"[^a-z].*?[.!?](\s|$)", text.split("\n\n")[0], flags=re.S):
        yield f"{name}: its first paragraph is no sentence with a full stop"
    sections = sections_of(thing)
    present = [section for section in sections if section in ORDER]
    if present != sorted(present, key=ORDER.index):
        yield f"{name}: its sections are in the order {', '.join(present)}"
    if inspect.isclass(thing):
        yield from _undescribed_fields(thing, name)
        return
    parameters = [p for p in inspect.signature(thing).parameters if p not in NOT_PARAMETERS]
    if len(parameters) < 2 and "\n\n" not in text:
        # a sentence is enough for a small helper
        return
    missing = [p for p in parameters if p not in argument_lines(thing) and f"*{p}" not in sections.get("args", "")]
    if missing:
        yield f"{name}: Args lacks {', '.join(missing)}"
    returned = inspect.signature(thing).return_annotation
    if (
        parameters
        and returned not in (None, inspect.Signature.empty, "None")
        and not {"returns", "yields"} & {*sections}
    ):
        yield f"{name}: has no Returns"


def _undescribed_fields(thing: Any, name: str) -> Iterator[str]:
    """A field of a dataclass is described in Args or Attributes, or by a text below it."""
    source = inspect.getsource(thing)
    if not is_dataclass(thing):
        return
    own = [field.name for field in fields(thing) if field.name in vars(thing).get("__annotations__", {}) and field.init]
    below = re.findall(r'^    (\w+):[^\n]*(?:\n(?!    \w+:)[^\n]*)*?\n    """', source, flags=re.M)
    described = {*argument_lines(thing), *below}
    if described and (missing := [field for field in own if field not in described and not field.startswith("_")]):
        yield f"{name}: describes some fields but not {', '.join(missing)}"


@pytest.mark.parametrize("path", PUBLIC)
def test_docstring_is_whole(path):
    faults = [fault for name, thing in members(PUBLIC[path]) for fault in faults_of(thing, name or path)]
    assert faults == []


@pytest.mark.parametrize("name", METHODS)
def test_method_names_its_source_and_limits(name):
    sections = METHODS[name].sections
    assert {"summary", "source", "limits"} <= {*sections}
    if METHODS[name].kind == "analysis":
        assert {"args", "returns", "examples"} <= {*sections}


@pytest.fixture(scope="module")
def namespace():
    """The names that examples may use, except for the folder."""
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = interp.tasks.repeated(tokenizer, n=8, batch=2, bos=True)
    scores = interp.identify.induction(model, prompts)
    return {
        "interp": interp, "torch": torch, "model": model, "tokenizer": tokenizer, "prompts": prompts, "scores": scores,
    }  # fmt: skip


def examples_of(path: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(PUBLIC[path], path, module=False)
    return [test for test in found if test.examples]


EXAMPLES = {path: tests for path in PUBLIC if (tests := examples_of(path))}


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    for test in EXAMPLES[path]:
        test.globs = namespace | {"folder": tmp_path}
        doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("habit", prose.HABITS, ids=lambda habit: habit.bad)
def test_habits_are_found(habit):
    assert prose.habits(habit.bad)
    assert not prose.habits(habit.instead) or habit.instead in prose.HABITS


def test_faults_of_markdown_are_found(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "# What it holds\n\nOne sentence. Another one.\nA sentence that goes\non below.\n\n"
        "By Wu et al. In 2024 `a. B` is code.\n\n```\nsaid. Told.\n```\n\n- an item, told\n\n# What is a head?\n"
        + "x"
        * 201
    )
    faults = [fault.split(";")[0] for fault in prose.markdown_faults(path)]
    assert faults == [
        "16: 201 characters",
        "1: a heading that begins with What",
        "3: two sentences on one line",
        "4: a sentence over two lines",
        "13: 'told'",
    ]


MARKDOWN = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob(".github/**/*.md"))]
PYTHON = sorted((ROOT / "interp").rglob("*.py"))
TEMPLATES = sorted((ROOT / "interp").rglob("*.j2"))


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MARKDOWN, ids=_relative)
def test_wording_of_markdown(path):
    assert prose.markdown_faults(path) == []


@pytest.mark.parametrize("path", PYTHON, ids=_relative)
def test_wording_of_docstrings_and_errors(path):
    assert prose.python_faults(path) == []


@pytest.mark.parametrize("path", TEMPLATES, ids=_relative)
def test_wording_of_templates(path):
    assert prose.template_faults(path) == []
