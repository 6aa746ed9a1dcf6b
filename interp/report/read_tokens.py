"""The tokens that a view of written tokens reads, in words: which span, of which prompt, from which query."""

from collections import Counter
from collections.abc import Sequence

from interp.analyses.views.ov_tokens import OvTokens, Reading
from interp.report.words import cut

MAX_CHARACTERS = 60
"""characters of a span that are quoted"""


def span_words(view: OvTokens) -> str:
    """The span that was read, with its text, such as 'the answer "4711"'.

    Args:
        view: The view.
    """
    ids = view.ids[0]
    text = "".join(view.texts[str(token)] for token in ids[ids >= 0].tolist()).strip()
    name = f"the {view.span}" if view.span == "answer" or view.span.startswith("last ") else f"the span “{view.span}”"
    return f"{name} “{cut(text, MAX_CHARACTERS)}”" if text else name


def repeated_texts(readings: Sequence[Reading]) -> set[str]:
    """Texts of tokens that several readings have, so that only their positions differ.

    Args:
        readings: The readings that are shown for one head.
    """
    counts = Counter(reading.token.text for reading in readings)
    return {text for text, count in counts.items() if count > 1}


def query_words(view: OvTokens) -> str:
    """The token whose attention orders the tokens, with its position.

    Args:
        view: The view.
    """
    query = view.queries[0]
    which = "the last token" if view.from_last else "the token"
    return f"{which} (“{query.text.strip() or query.text}”, position {query.position:,})"
