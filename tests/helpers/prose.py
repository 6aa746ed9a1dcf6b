"""Text that people read, taken from Markdown, templates and Python files, and the habits that it must not have."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Habit(NamedTuple):
    """A habit of wording to avoid."""

    pattern: str
    bad: str
    """an example that the pattern finds"""
    instead: str


HABITS = (
    Habit(r"\bbeside\b", "stands beside random heads", "compared with, alongside, next to"),
    Habit(r"\bis none: \w+", "measure 'x' is none: take 'loss'", "unknown measure 'x'; choose from ..."),
    Habit(r"\bof (ours|its own)\b", "a parser of ours", "our parser; separate, its"),
    Habit(r"\bdraws of the bootstrap\b", "draws of the bootstrap", "number of bootstrap resamples"),
    Habit(r"\bheads? out\b", "with the top ten heads out", "ablated"),
    Habit(r"\bas loaded\b", "accuracy as loaded", "unmodified, baseline"),
    Habit(r"\bas (it stands|they stand)\b", "the model as it stands", "unmodified"),
    Habit(r"\b(let|lets) (it |them )?go\b", "keys that are let go", "evicted"),
    Habit(r"\b(tell|tells|told) apart\b", "heads that are told apart", "distinguished"),
    Habit(r"\bmail(s|ed)?\b", "a file one can mail", "one HTML file you can share"),
    Habit(r"\b(said|told|heard|asked)\b", "what each analysis is asked on", "return, print, generate, store, request"),
    Habit(r"\bhangs? on\b", "refusals hang on", "depend on"),
    Habit(r"\bdoes it help\b", "Does it help", "evaluate the effect"),
    Habit(r"\bstands? (in(?! for)|at|there|here|open)\b", "the number stands in the card", "is"),
)
NOUN_WHAT = re.compile(r"What\b(?!.*\?)")
"""a name or a first sentence that begins with "What" and is no question"""
ABBREVIATION = re.compile(r"\b(al|e\.g|i\.e|cf|vs|Fig|Eq|Sec|etc|No|St|Dr|approx)\.")
TWO_SENTENCES = re.compile(r"[\w)\]\"'*][.!?][\"')]? +[A-Z*\"\[(]")
ENDS = re.compile(r"[.!?:;][\"')*_]*$")
LIST_ITEM = re.compile(r"([-*+]|\d+\.) +")
MAX_LINE, MAX_ROW = 200, 300


class Line(NamedTuple):
    """A line of prose, with code replaced by "x"."""

    number: int
    text: str
    kind: str
    """heading, table, item or text"""


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "x", text)


def markdown_lines(text: str) -> Iterator[Line]:
    """The lines of a Markdown file that hold prose; blank ones have no text."""
    fenced = False
    text = re.sub(r"<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare.startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and not (line.startswith("    ") and not LIST_ITEM.match(bare)) and not bare.startswith("!!!"):
            kind = "heading" if bare.startswith("#") else "table" if bare.startswith("|") else "text"
            kind = "item" if LIST_ITEM.match(bare) else kind
            bare = LIST_ITEM.sub("", bare.lstrip("#> "), count=1) if kind in ("item", "heading") else bare
            yield Line(number, without_code(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", bare)), kind)


def markdown_faults(path: Path) -> list[str]:
    """The faults of a Markdown file, each with its line."""
    text = path.read_text(encoding="utf-8")
    faults = [
        f"{number}: {len(line)} characters"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > (MAX_ROW if line.startswith("|") else MAX_LINE)
    ]
    lines = [*markdown_lines(text), Line(0, "", "text")]
    for line, following in pairwise(lines):
        faults += [f"{line.number}: {fault}" for fault in habits(line.text)]
        if line.kind == "heading" and NOUN_WHAT.match(line.text):
            faults.append(f"{line.number}: a heading that begins with What; name the thing")
        if line.kind in ("text", "item"):
            if TWO_SENTENCES.search(ABBREVIATION.sub("x", line.text)):
                faults.append(f"{line.number}: two sentences on one line")
            goes_on = following.kind == "text" and following.text and following.number == line.number + 1
            if goes_on and line.text and not ENDS.search(line.text):
                faults.append(f"{line.number}: a sentence over two lines")
    return faults


def python_texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a docstring) of the docstrings, error messages and help texts of a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value, True
        elif isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value, False
        elif isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield node.value.lineno, str(node.value.value), False


def python_faults(path: Path) -> list[str]:
    """The faults in the wording of a Python file, each with the line where its text begins."""
    faults = []
    for number, text, is_docstring in python_texts(path):
        prose = without_code(re.sub(r"^ *(>>>|\.\.\.) .*$", "", text, flags=re.M))
        faults += [f"{number}: {fault}" for fault in habits(" ".join(prose.split()))]
        if is_docstring and NOUN_WHAT.match(text):
            faults.append(f"{number}: a docstring that begins with What; name the thing")
    return faults


def template_faults(path: Path) -> list[str]:
    """The faults in the wording of a Jinja template."""
    text = re.sub(
        r"\{[{%#].*?[}%#]\}|<(script|style).*?</\1>|<[^>]*>", " ", path.read_text(encoding="utf-8"), flags=re.S
    )
    return [fault for line in text.splitlines() for fault in habits(line)]


def habits(text: str) -> list[str]:
    """The habits that a text has, with the words and their replacement."""
    return [
        f"{match[0]!r}; write {habit.instead}"
        for habit in HABITS
        for match in re.finditer(habit.pattern, text, flags=re.IGNORECASE)
    ]
