"""Cards: the docstring of a public method taken apart, for the report and for the pages of the docs."""

import re
from dataclasses import dataclass
from inspect import getdoc
from typing import Any

# a full stop that ends a sentence, not that of "et al." or of a product of vectors
_END = re.compile(r"(?<=\S)(?<!\bal)(?<!\bEq)(?<!\be\.g)(?<!\bi\.e)\.\s+")
_PART = re.compile(r"(?:^|(?<=\s))(?:(Source|Differs|Cannot show): |Raises (?=\w*Error))")
_EQUATION = re.compile(r"(?<![<>=!])\s=\s")


@dataclass(frozen=True)
class Card:
    """What a docstring says, part by part; "" for a part that it does not have."""

    sentence: str
    """what is measured or done"""
    formulas: tuple[str, ...] = ()
    """sentences that hold an equation"""
    notes: tuple[str, ...] = ()
    """all other sentences, in order"""
    raises: str = ""
    source: str = ""
    differs: str = ""
    cannot_show: str = ""


def card(method: Any) -> Card:
    """The card of a function or class, from its docstring: the first sentence, then parts by their labels.

    Labels are "Raises ...Error", "Source:", "Differs:" and "Cannot show:"; a part goes on to the next label.
    """
    text = " ".join((getdoc(method) or "").split())
    # the text before the first label, then a label (None for Raises) and its text in turn
    body, *labelled = _PART.split(text)
    parts: dict[str, str] = {}
    for label, said in zip(labelled[::2], labelled[1::2], strict=True):
        key = (label or "raises").lower().replace(" ", "_")
        parts[key] = " ".join(part for part in (parts.get(key), said.strip()) if part)
    sentence, *rest = sentences(body) or [""]
    return Card(
        sentence=sentence,
        formulas=tuple(said for said in rest if _EQUATION.search(said)),
        notes=tuple(said for said in rest if not _EQUATION.search(said)),
        **parts,
    )


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its full stop."""
    return [f"{said.strip().rstrip('.')}." for said in _END.split(text) if said.strip()]
