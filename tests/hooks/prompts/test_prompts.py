import json
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_tiny import byte_fallback, byte_level, words

from interp.errors import PromptError, SpanError
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.prompts.spans import nearest_text

TOKENIZERS = {
    "plain": byte_level(),
    "bos": byte_level(bos=True, eos=True),
    "trimmed": byte_level(trim=True),
    "trimmed, bos": byte_level(trim=True, bos=True, eos=True),
    "fallback": byte_fallback(),
}
CHAT = [{"role": "user", "content": "Where? Paris."}]


def decode(tokenizer: Any, ids) -> str:
    return tokenizer.decode(list(ids))


def span_texts(tokenizer, prompt, name):
    return [decode(tokenizer, prompt.ids[start:stop]) for start, stop in prompt.spans[name]]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("in Paris.", "Paris"),
        ("in Paris.", "ari"),
        ("in Paris.", " "),
        ("Paris is in it", "Paris"),
        ("a 👩‍🚀 b", "👩‍🚀"),
        ("a 👩‍🚀 b", "🚀"),
        ("a é漢 b", "漢"),
        ("a\n   b", "\n"),
        ("a\n   b", "   "),
        ("a     b", "     "),
        ("a b    ", "    "),
        ("   the end", "   "),
    ],
)
def test_the_tokens_of_a_span_hold_its_text(name, text, span):
    tokenizer = TOKENIZERS[name]
    (prompt,) = Prompts.encode(tokenizer, [text], spans={"x": span})
    assert span.strip() in "".join(span_texts(tokenizer, prompt, "x"))
    ((start, stop),) = prompt.spans["x"]
    inside = decode(tokenizer, prompt.ids[start + 1 : stop - 1])
    assert len(inside.replace("�", "")) <= len(span)


def test_a_word_after_a_space_is_the_token_that_holds_it():
    tokenizer = TOKENIZERS["trimmed, bos"]
    (prompt,) = Prompts.encode(tokenizer, ["in Paris."], spans={"x": "Paris", "y": "aris", "z": " Paris"})
    assert span_texts(tokenizer, prompt, "x") == [" Paris"]
    assert prompt.spans["x"] == prompt.spans["y"] == prompt.spans["z"]


def test_trimmed_offsets_give_the_same_spans_as_exact_ones():
    text = "the  end\n     in Paris   the\n   a    "
    spans = {f"{i}": (i, i + 1) for i in range(len(text))}
    exact, trimmed = (Prompts.encode(byte_level(trim=trim), [text], spans=spans)[0] for trim in (False, True))
    assert exact.ids == trimmed.ids
    assert exact.spans == trimmed.spans


def tokens_of_bytes(tokenizer, prompt, start, stop):
    """Token bounds computed without offsets: each symbol of a byte-level token is one byte."""
    inner = [i for i, token in enumerate(prompt.ids) if token not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    ends = list(accumulate(len(token) for token in tokenizer.convert_ids_to_tokens([prompt.ids[i] for i in inner])))
    first, last = (len(prompt.text[:at].encode()) for at in (start, stop))
    held = [i for i, begin, end in zip(inner, [0, *ends], ends, strict=False) if begin < last and end > first]
    return held[0], held[-1] + 1


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(["plain", "bos", "trimmed", "trimmed, bos"]))
def test_any_span_of_any_text_is_held_by_its_tokens(data, name):
    tokenizer = TOKENIZERS[name]
    letters = st.one_of(
        st.sampled_from(list(" \n aPristhe.é漢👩🚀\u200d\u0301")), st.characters(codec="utf-8", exclude_characters="<")
    )
    text = "".join(data.draw(st.lists(letters, min_size=1, max_size=30)))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    (prompt,) = Prompts.encode(tokenizer, [text], spans={"x": (start, stop)})
    assert text[start:stop] in "".join(span_texts(tokenizer, prompt, "x"))
    assert prompt.spans["x"] == (tokens_of_bytes(tokenizer, prompt, start, stop),)


def test_characters_that_the_tokenizer_drops_have_no_span():
    with pytest.raises(SpanError, match=r'span "x" of prompt 0: no token holds " "'):
        Prompts.encode(words(), ["the cat sat"], spans={"x": (3, 4)})
    (prompt,) = Prompts.encode(words(), ["the cat sat"], spans={"x": "cat"})
    assert prompt.spans["x"] == ((1, 2),)


def test_places_are_texts_occurrences_ranges_and_lists():
    text = "a Paris, b Paris, c"
    places = {
        "first": {"text": "Paris", "occurrence": 0},
        "last": {"text": "Paris", "occurrence": -1},
        "each": {"text": "Paris", "occurrence": "all"},
        "range": (2, 7),
        "json": [2, 7],
        "list": ["c", (0, 1), (2, 7), [3, 5]],
        "one": {"text": "c"},
    }
    spans = Prompts.encode(TOKENIZERS["plain"], [text], spans=places)[0].spans
    assert spans["range"] == spans["json"] == spans["first"]
    assert spans["each"] == (*spans["first"], *spans["last"])
    assert spans["list"] == ((0, 1), *spans["first"], *spans["one"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("Pariss", r'^span "x" of prompt 1: "Pariss" is not in the prompt; the nearest text is "Paris"\.$'),
        ("Paris", r'"Paris" occurs 2 times; give \{"text"'),
        ("", "empty text"),
        ("漢", "nothing in the prompt is similar"),
        ({"text": "Paris", "occurrence": 2}, r"no occurrence 2; it occurs 2 times; give 0 to 1"),
        ({"text": "Paris", "nth": 2}, "is not a place"),
        ((3, 3), "characters 3 to 3 are not a range within a text of 15 characters"),
        ((0, 99), "characters 0 to 99"),
        ([], "is not a place"),
        (5, "is not a place"),
        (None, "is not a place"),
    ],
)
def test_errors_of_places_that_are_not_in_the_text(where, message):
    with pytest.raises(SpanError, match=message):
        Prompts.encode(TOKENIZERS["plain"], ["fine", "Paris and Paris"], spans=[{}, {"x": where}])


def test_overlapping_occurrences_are_more_than_one():
    with pytest.raises(SpanError, match="occurs 2 times"):
        Prompts.encode(TOKENIZERS["plain"], ["aaa"], spans={"x": "aa"})


def test_the_nearest_text_is_found_late_in_a_long_prompt():
    text = "word " * 20_000 + "The special magic number is 7. " + "word " * 100
    assert nearest_text(text, "the special magical number") == "The special magic number is"
    assert nearest_text("abc", "xyz") == ""


def test_chats_are_rendered_once_and_spans_found_in_the_rendering():
    tokenizer = TOKENIZERS["bos"]
    (prompt,) = Prompts.encode(tokenizer, [{"messages": CHAT, "spans": {"x": "Paris"}, "meta": {"key": 1}}])
    assert prompt.text == "<s>user:Where? Paris.</s><s>assistant:"
    assert prompt.ids.count(tokenizer.bos_token_id) == 2
    assert prompt.ids[-1] != tokenizer.eos_token_id
    assert span_texts(tokenizer, prompt, "x") == [" Paris"]
    assert prompt.meta == {"key": 1}
    assert Prompts.encode(tokenizer, ["Where? Paris."], chat=True)[0].ids == prompt.ids


def test_an_answer_is_continued_only_with_continue_final():
    chat = [*CHAT, {"role": "assistant", "content": "It is"}]
    asked: list[dict[str, Any]] = [{}, {"continue_final": True}, {"add_generation_prompt": True}]
    texts = [Prompts.encode(TOKENIZERS["plain"], [chat], **options)[0].text for options in asked]
    assert texts[0].endswith("<s>assistant:It is</s>")
    assert texts[1].endswith("<s>assistant:It is")
    assert texts[2].endswith("It is</s><s>assistant:")
    assert Prompts.encode(TOKENIZERS["plain"], [CHAT], continue_final=True)[0].text.endswith("<s>assistant:")


def test_special_tokens_are_added_to_texts_and_shift_no_span():
    tokenizer = TOKENIZERS["trimmed, bos"]
    (prompt,) = Prompts.encode(tokenizer, ["a b"], spans={"x": "b", "all": (0, 3)})
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert prompt.spans == {"x": ((3, 4),), "all": ((1, 4),)}


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "no prompts given"),
        ("text", {}, r"give a list of prompts"),
        ([""], {}, "prompt 0 is empty"),
        (["fine", "<s>text"], {}, 'prompt 1 begins with "<s>", which the tokenizer adds as well'),
        ([CHAT], {"chat": False}, "chat=False"),
        ([[]], {}, "no messages"),
        ([[{"role": "user"}]], {}, "which is not a message"),
        ([{"text": "a", "messages": CHAT}], {}, "neither a text nor a chat"),
        ([{"text": "a", "span": {}}], {}, r"unknown entries \['span'\]"),
        ([{"text": "a", "spans": ["a"]}], {}, '"spans" of prompt 0'),
        ([3], {}, "neither a text nor a chat"),
        ([[{"role": "user", "content": None}]], {}, "the chat template refuses prompt 0"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_are_refused(items, options, message):
    with pytest.raises(PromptError, match=message):
        Prompts.encode(TOKENIZERS["bos"], items, **options)


def test_tokenizers_must_be_fast_and_chats_need_a_template():
    with pytest.raises(PromptError, match="no chat template"):
        Prompts.encode(byte_level(chat=False), [CHAT])
    with pytest.raises(PromptError, match="no character offsets"):
        Prompts.encode(object(), ["a"])


def test_a_bos_in_the_text_is_fine_where_the_tokenizer_adds_none():
    assert Prompts.encode(TOKENIZERS["plain"], ["<s>a"])[0].ids[0] == 0


def test_batches_are_padded_on_the_left():
    prompts = Prompts.encode(byte_level(pad=True), ["abc", "a"])
    batch = prompts.tensors()
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["input_ids"][1, :2].tolist() == [2, 2]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert Prompts.encode(byte_level(), ["a"]).pad_id == 1
    assert Prompts.encode(words(), ["the"]).pad_id == 0


def test_prompts_slice_join_and_print_like_a_sequence():
    prompts = Prompts.encode(TOKENIZERS["plain"], ["abc", "a", "ab"], spans={"x": "a"})
    assert prompts.lengths == (3, 1, 2)
    assert [len(batch) for batch in prompts.batches(2)] == [2, 1]
    assert prompts[:1] + prompts[1:] == prompts
    assert prompts[1].text == "a"
    assert repr(prompts) == "Prompts(3, 1 to 3 tokens, spans x)"
    assert len({*prompts}) == 3
    with pytest.raises(PromptError, match="two tokenizers"):
        _ = prompts + Prompts.encode(TOKENIZERS["fallback"], ["a"])
    with pytest.raises(PromptError, match="at least 1"):
        prompts.batches(0)
    with pytest.raises(PromptError, match="empty"):
        prompts[:0].tensors()


def test_span_masks_count_positions_not_columns():
    prompts = Prompts.from_ids([[5, 6, 7, 8], [5]], spans=[{"x": [(0, 1), (2, 4)]}, {"x": (0, 1)}])
    assert prompts.span_mask("x", 5).tolist() == [[True, False, True, True, False], [True, False, False, False, False]]
    assert prompts.span("x") == [((0, 1), (2, 4)), ((0, 1),)]
    with pytest.raises(SpanError, match=r'^prompt 0 has no span "y" \(it has "x"\); name it when encoding\.$'):
        prompts.span("y")
    with pytest.raises(SpanError, match="at least 4"):
        prompts.span_mask("x", 3)


@pytest.mark.parametrize(
    ("ids", "options", "error"),
    [
        ([], {}, PromptError),
        ([[]], {}, PromptError),
        ([[-1]], {}, PromptError),
        ([[1]], {"spans": []}, PromptError),
        ([[1]], {"spans": [{"x": (0, 2)}]}, SpanError),
        ([[1]], {"spans": [{"x": "a"}]}, SpanError),
    ],
)
def test_ids_that_cannot_be_used_are_refused(ids, options, error):
    with pytest.raises(error):
        Prompts.from_ids(ids, **options)


def test_length_is_checked_against_the_context():
    prompts = Prompts.from_ids([[1], [1] * 9000])
    prompts.check_length(9000)
    with pytest.raises(
        PromptError, match=r"^prompt 1 has 9,000 tokens, but the context of this model is 8,192; shorten it\.$"
    ):
        prompts.check_length(8192)


def test_fingerprints_follow_ids_spans_and_meta():
    same = [
        Prompts.from_ids(torch.tensor([[1, 2]]), spans=[{"x": (0, 1), "y": (1, 2)}]).fingerprint() for _ in range(2)
    ]
    other = [
        Prompts.from_ids([[1, 2]], spans=[{"x": (0, 2), "y": (1, 2)}]).fingerprint(),
        Prompts.from_ids([[1, 3]], spans=[{"x": (0, 1), "y": (1, 2)}]).fingerprint(),
        Prompts.from_ids([[1], [2]]).fingerprint(),
        # the answer in meta is part of the fingerprint
        Prompts.from_ids([[1, 2]], spans=[{"x": (0, 1), "y": (1, 2)}], meta=[{"answer": "no"}]).fingerprint(),
    ]
    assert same == ["2bd49d2ae52bc319"] * 2
    assert len({*same, *other}) == 5


def test_files_of_lines_and_of_objects(tmp_path):
    lines, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("\ufeffin Paris\n\nthe\u2028end\r\n", encoding="utf-8")
    objects.write_text(
        json.dumps({"text": "in Paris", "spans": {"x": "Paris", "y": [0, 2]}, "meta": {"n": 1}})
        + "\n" + json.dumps({"messages": CHAT, "spans": {"x": {"text": "Paris", "occurrence": 0}}}) + "\n"
    )  # fmt: skip
    assert [prompt.text for prompt in Prompts.from_file(lines, TOKENIZERS["plain"])] == ["in Paris", "the\u2028end"]
    read = Prompts.from_file(str(objects), TOKENIZERS["plain"])
    assert len(read.span("x")) == 2
    assert read[0].meta == {"n": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'"text"', "line 1 of .* is not an object"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", None, "No such file"),
        ("a.csv", b"a", "neither a .txt"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        Prompts.from_file(tmp_path / name, TOKENIZERS["plain"])
    assert name in str(caught.value)
