"""Needles in a user's own texts: which paragraphs are prose, and prompts that hide needles in them."""

import pytest
from tokenizers_tiny import byte_level

from interp.analyses.tasks import needle, standard
from interp.analyses.tasks.prose import paragraphs_of, prose, prose_name, sentences_of
from interp.analyses.tasks.standard import PromptSizes
from interp.errors import PromptError

SENTENCES = [f"Paragraph {n} begins here. Dr. Miller was not at home on that day." for n in ("one", "two", "three")]
PAGE = """# A heading that is long enough to be a paragraph of its own, and ends.

{0}

    indented = code(that, is, not, prose) and ends with a full stop, does it not.

```
{0} This is fenced and therefore code. It does not count.
```

| a | table | of | 1 | 2 | 3 | numbers | ends. |

- A list item that has eight words and ends.

{1}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.md").write_text(PAGE.format(*SENTENCES), encoding="utf-8")
    (tmp_path / "b" / "c.txt").write_text(f"Short.\n\n{SENTENCES[2]}\n\n{SENTENCES[0]}\n", encoding="utf-8-sig")
    (tmp_path / "ignored.py").write_text("This is a program and no text, although it is a sentence.")
    return tmp_path


def long_text(tmp_path, paragraphs=60):
    text = "\n\n".join(
        f"In the year {1800 + i} the river rose by {i} feet. Nobody in the village had seen\nit so high before."
        for i in range(paragraphs)
    )
    (tmp_path / "river.txt").write_text(text)
    return tmp_path / "river.txt"


def test_paragraphs_of_prose_are_taken_once_and_in_order(folder):
    assert [" ".join(sentences) for sentences in paragraphs_of(folder)] == SENTENCES
    assert paragraphs_of(folder)[0] == ("Paragraph one begins here.", "Dr. Miller was not at home on that day.")
    assert len(paragraphs_of(folder / "b" / "c.txt")) == 2


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("He came. She went.", 2),
        ("It cost 3.50 in all. 12 people paid.", 2),
        ('Mr. Smith and J. Brown left. "Why?" They did not say.', 3),
        ("No. 5 is here", 2),
        ("He asked. “Yes.” he said", 2),
    ],
)
def test_sentences(text, n):
    found = sentences_of(text)
    assert len(found) == n
    assert " ".join(found) == text


def test_texts_follow_one_another_from_a_random_paragraph(folder):
    starts = set()
    for seed in range(20):
        found = [" ".join(sentences) for sentences in prose(folder, seed)]
        assert sorted(found) == sorted(SENTENCES)
        place = SENTENCES.index(found[0])
        assert found == SENTENCES[place:] + SENTENCES[:place]
        starts.add(place)
    assert starts == {0, 1, 2}


def test_a_changed_file_is_read_again(folder):
    before = prose_name(folder)
    assert before.startswith(f"{folder.name} (")
    (folder / "d.rst").write_text("A new paragraph has been added to the texts today. It counts.")
    assert len(paragraphs_of(folder)) == 4
    assert prose_name(folder) != before


def test_needles_lie_between_sentences_of_the_texts(tmp_path):
    path, tokenizer = long_text(tmp_path), byte_level()
    prompts = needle(tokenizer, lengths=(1500,), depths=(0.2, 0.8), n=4, haystack=path)
    own = {sentence for sentences in paragraphs_of(path) for sentence in sentences}
    for prompt in prompts:
        assert prompt.meta["haystack"] == prose_name(path)
        (low, high), ranges = prompt.spans["context"][0], (*prompt.spans["needle"], *prompt.spans["distractor"])
        assert len(ranges) == 3
        context = str(tokenizer.decode(list(prompt.ids[low:high])))
        for start, stop in ranges:
            context = context.replace(str(tokenizer.decode(list(prompt.ids[start:stop]))).strip(), "")
        left = sentences_of(" ".join(context.split()))
        assert len(left) > 5
        assert set(left) <= own
    again = needle(tokenizer, lengths=(1500,), depths=(0.2, 0.8), n=2, haystack=path)
    assert again.items == prompts.items[:2]
    assert needle(tokenizer, lengths=(1500,))[0].meta["haystack"] == "grammar"


def test_a_run_takes_a_haystack_for_all_of_its_needles(tmp_path):
    sizes = PromptSizes(haystack=str(long_text(tmp_path)), n_needles=1, needle_length=700, long_length=700,
                        n_check_needles=1, check_length=700, sweep_lengths=(700,), explorer_tokens=700)  # fmt: skip
    for maker in ("needles", "long_needles", "inferred_needles", "check_needles", "explored"):
        for prompt in getattr(standard, maker)(sizes, byte_level()):
            assert prompt.meta["haystack"] == prose_name(sizes.haystack)


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    tokenizer = byte_level()
    with pytest.raises(PromptError, match=r"^the haystack .*/none does not exist; give a folder of texts"):
        needle(tokenizer, lengths=(900,), haystack=tmp_path / "none")
    with pytest.raises(PromptError, match=r"holds no \.txt, \.md, \.rst file; give a folder"):
        needle(tokenizer, lengths=(900,), haystack=tmp_path)
    (tmp_path / "a.txt").write_text("Too short.\n\nAnd without an end")
    with pytest.raises(PromptError, match="holds no prose; give texts whose paragraphs are whole sentences"):
        needle(tokenizer, lengths=(900,), haystack=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="cannot be read as UTF-8 text"):
        needle(tokenizer, lengths=(900,), haystack=tmp_path)
    path = long_text(tmp_path, 5)
    with pytest.raises(PromptError, match=r"tokens of prose, but prompts of 4,000 tokens need 4,800; add texts"):
        needle(tokenizer, lengths=(4000,), haystack=path)
