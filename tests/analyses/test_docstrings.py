"""Docstrings read as data: sections, and the help text of each setting."""

from dataclasses import dataclass

from interp.analyses.docstrings import sections_of, settings_of


def method(model, prompts, *, span: str = "answer", top: int, batch_size=8, seed=0):
    """Score each head by something.

    A longer text
    of two lines.

    Args:
        model: A model.
        span: Span that is read;
            "needle" for a sentence.
        top: Number of keys.

    Source:
        Somebody 2024.

    Limits:
        Does not show much.
    """


@dataclass
class Settings:
    """Some fields.

    Args:
        share: Share of the keys.
    """

    share: float = 0.5


def test_sections_end_where_the_next_begins():
    found = sections_of(method)
    assert found["summary"] == "Score each head by something."
    assert found["text"] == "A longer text\nof two lines."
    assert found["source"] == "Somebody 2024."
    assert found["limits"] == "Does not show much."
    assert "differs" not in found


def test_settings_are_keyword_parameters_with_their_help():
    found = settings_of(method)
    assert list(found) == ["span", "top"]
    assert found["span"].help == 'Span that is read; "needle" for a sentence.'
    assert (found["span"].default, found["span"].kind) == ("answer", "str")
    assert (found["top"].default, found["top"].help) == (None, "Number of keys.")


def test_settings_of_a_dataclass_are_its_fields():
    found = settings_of(Settings)
    assert (found["share"].default, found["share"].help) == (0.5, "Share of the keys.")


def test_a_thing_without_a_docstring_has_no_sections():
    assert sections_of(lambda: None) == {}
