"""Text from outside, such as names in files, in a form in which no character acts on what shows it."""

import re

# would change or hide the text around them: controls, line separators, marks of writing direction, half characters
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Write characters that are invisible, that reorder others or that act on a terminal, as symbols or \\u codes.

    Args:
        text: Any text.

    Returns:
        The text.
    """
    return _UNSEEN.sub(lambda found: _symbol(ord(found[0])), text)


def _symbol(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\u{code:04x}"
