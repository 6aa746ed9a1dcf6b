"""Documents with a query, and the options of multiple choice: where the spans are, and that pairs are aligned."""

from typing import Any

import pytest
from tokenizers_tiny import byte_fallback, byte_level

from interp.analyses import tasks
from interp.analyses.tasks import documents
from interp.errors import UsageError

TOKENIZERS: dict[str, Any] = {
    "chat": byte_level(bos=True),
    "plain": byte_level(chat=False),
    "trimmed": byte_level(trim=True),
    "fallback": byte_fallback(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["literal", "inferred"])
def test_spans_hold_what_they_say(name, kind):
    tokenizer = TOKENIZERS[name]
    prompts, null = documents(tokenizer, n=5, count=4, kind=kind)
    assert len({prompt.meta["gold"] for prompt in documents(tokenizer, n=20, count=4)[0]}) == 4
    for prompt, other in zip(prompts, null, strict=True):
        said = {key: [tokenizer.decode(prompt.ids[a:b]) for a, b in where] for key, where in prompt.spans.items()}
        assert len(said["documents"]) == 4
        gold = prompt.meta["gold"]
        assert prompt.spans["gold"] == (prompt.spans["documents"][gold],)
        if name != "fallback":
            assert said["answer"][0].strip() == prompt.meta["answer"]
            assert [text.strip()[:4] for text in said["documents"]] == [f"[{d}] " for d in range(1, 5)]
            assert [prompt.meta["answer"] in text for text in said["documents"]] == [d == gold for d in range(4)]
            assert prompt.meta["question"] in said["query"][0]
        # the query is all that is left, and the documents are the same without it
        assert prompt.spans["query"][0][1] == len(prompt)
        end = prompt.spans["documents"][-1][1]
        assert prompt.ids[:end] == other.ids[:end]
        assert "N/A" in other.text
        assert prompt.meta["question"] not in other.text
        assert {key: prompt.spans[key] for key in ("documents", "gold", "answer")} == {
            key: other.spans[key] for key in ("documents", "gold", "answer")
        }
        assert prompt.meta["id"] == other.meta["id"]


def test_pairs_are_fixed_by_seed_and_number():
    tokenizer = TOKENIZERS["chat"]
    few, many = documents(tokenizer, n=2, count=3), documents(tokenizer, n=4, count=3)
    assert few == (many[0][:2], many[1][:2])
    assert documents(tokenizer, n=2, count=3, seed=1)[0] != few[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 0}, r"n=0, count=6 are out of range; ask for at least one pair, of 2 to \d+ documents"),
        ({"count": 1}, "count=1 are out of range"),
        ({"kind": "easy"}, "unknown kind of query 'easy'"),
    ],
)
def test_errors(settings, said):
    with pytest.raises(UsageError, match=said):
        documents(TOKENIZERS["plain"], **settings)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_options_of_multiple_choice_end_with_their_lines(name):
    tokenizer = TOKENIZERS[name]
    prompts = tasks.get("choice").prompts(tokenizer, "all", n=12)
    for prompt in prompts:
        options = prompt.spans["options"]
        assert len(options) == 4
        texts = [tokenizer.decode(prompt.ids[start:stop]) for start, stop in options]
        ends = [tokenizer.decode(prompt.ids[stop - 1 : stop]) for _, stop in options]
        assert all("\n" in end for end in ends), ends
        right = prompt.meta["option"]
        assert prompt.meta["right"][0].strip() == "ABCD"[right]
        if name != "fallback":
            assert [text.strip()[:2] for text in texts] == ["A.", "B.", "C.", "D."]
            assert texts[right].strip() == f"{'ABCD'[right]}. {prompt.meta['answer']}"
