"""Prose from a folder of a user's texts, as the text in which needles are hidden; none of it is part of the package."""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

from interp.errors import PromptError
from interp.hooks.limits import read_text
from interp.hooks.model.portable import last_part

ENDINGS = (".txt", ".md", ".rst")
"""files that are read"""
MIN_WORDS = 8
"""words of a paragraph, below which it is left out as a heading or a list item"""
MIN_LETTERS = 0.7
"""share of letters and spaces, below which a paragraph is left out as a table or code"""


def prose(folder: str | Path, seed: int | str = 0) -> Iterator[list[str]]:
    """Yield the paragraphs of the texts in a folder, each a list of sentences, beginning at a random one.

    The texts follow one another in the order of their names, and the first follows the last; no paragraph comes twice.

    Args:
        folder: A folder with .txt, .md or .rst files in UTF-8, also in folders below it, or one such file.
        seed: Seed of the paragraph that comes first.

    Raises:
        PromptError: If there is no such folder, a file is not UTF-8, or no paragraph is prose.
    """
    found = paragraphs_of(folder)
    start = Random(f"prose/{seed}").randrange(len(found))
    yield from (list(sentences) for sentences in (*found[start:], *found[:start]))


def prose_name(folder: str | Path) -> str:
    """The name of a folder of texts with a hash of their paragraphs, for the meta of prompts.

    Args:
        folder: As in `prose`.
    """
    digest = hashlib.sha256(repr(paragraphs_of(folder)).encode()).hexdigest()[:8]
    return f"{last_part(str(Path(folder).expanduser().resolve()))} ({digest})"


def paragraphs_of(folder: str | Path) -> tuple[tuple[str, ...], ...]:
    """All paragraphs of prose in the texts of a folder, each a tuple of sentences; read again where a file changed."""
    place = Path(folder).expanduser()
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix.lower() in ENDINGS]
    if not texts:
        reason = f"holds no {', '.join(ENDINGS)} file" if place.exists() else "does not exist"
        raise PromptError(f"the haystack {place} {reason}; give a folder of texts in UTF-8.")
    found = _read(tuple((path, path.stat().st_mtime_ns) for path in texts))
    if not found:
        raise PromptError(
            f"the haystack {place} holds no prose; give texts whose paragraphs are whole sentences with blank lines "
            "between them."
        )
    return found


@cache
def _read(files: tuple[tuple[Path, int], ...]) -> tuple[tuple[str, ...], ...]:
    found: dict[tuple[str, ...], None] = {}
    for path, _ in files:
        text = read_text(path, PromptError)
        # what is fenced or indented is code
        text = re.sub(r"^(```|~~~).*?^\1", "\n", text, flags=re.M | re.S)
        for block in re.split(r"\n\s*\n", text):
            if block.startswith(("    ", "\t", "#", "|", "- ", "* ", ".. ")) or "\n    " in block:
                continue
            paragraph = " ".join(block.split())
            if _is_prose(paragraph):
                found[tuple(sentences_of(paragraph))] = None
    return tuple(found)


def sentences_of(paragraph: str) -> list[str]:
    """The sentences of a paragraph: a sentence ends before white space and a capital letter, quotation mark or digit.

    Args:
        paragraph: Text without line breaks.
    """
    return re.split(
        r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)\s+(?=[A-Z\"'“‘(\d])",
        paragraph,
    )


def _is_prose(paragraph: str) -> bool:
    letters = sum(letter.isalpha() or letter == " " for letter in paragraph)
    ends = paragraph.rstrip("\"'”’)").endswith((".", "!", "?"))
    return ends and len(paragraph.split()) >= MIN_WORDS and letters >= MIN_LETTERS * len(paragraph)
