"""Tasks of one's own, from a JSONL file."""

import json

import pytest
from tokenizers_tiny import byte_level

from interp.analyses import tasks
from interp.analyses.tasks.task import Task, split_of
from interp.errors import InterpError, PromptError, UsageError

GOOD = {
    "text": "In Rome it rains. It rains in",
    "spans": {"mark": "In Rome it rains."},
    "right": ["Rome"],
    "wrong": ["Bonn"],
}
CHAT = {
    "id": "one",
    "messages": [{"role": "user", "content": "Say yes. Well?"}],
    "spans": {"mark": {"text": "Say yes.", "occurrence": 0}},
    "prefix": "I say",
    "right": ["yes"],
    "wrong": ["no"],
    "judge": "starts",
    "source": "me",
}


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_file_of_ones_own(tmp_path):
    open_turn = {**CHAT, "id": "two", "prefix": "", "judge": "first"}
    open_turn["messages"] = [*CHAT["messages"], {"role": "assistant", "content": "So I say"}]
    path = written(tmp_path / "mine.jsonl", GOOD, "", CHAT, open_turn)
    mine = tasks.get(str(path))
    assert (mine.name, mine.description, len(mine.items())) == ("mine", "3 items of mine.jsonl", 3)
    for tokenizer in (byte_level(), byte_level(chat=False)):
        prompts = {p.meta["id"]: p for p in mine.prompts(tokenizer, "all")}
        plain, one, two = (prompts[item["id"]] for item in mine.items())
        assert plain.text == GOOD["text"]
        assert plain.meta["right"] == [" Rome"]
        assert one.text.endswith("I say")
        assert one.text.count("I say") == 1
        assert two.text.endswith("So I say")
        assert one.meta["source"] == "me"
        assert [tokenizer.decode(list(one.ids[a:b])) for a, b in one.spans["mark"]] == ["Say yes."]
        assert mine.judge("not Rome, Bonn", plain)
        assert not mine.judge("well, yes", one)
        assert mine.judge("well, yes", two)
        for p in prompts.values():
            assert all(mine.judge(text, p) for text in p.meta["right"])
            assert not any(mine.judge(text, p) for text in p.meta["wrong"])
    assert not Task.from_jsonl(path, judge="starts").judge("in Rome", plain)
    assert Task.from_jsonl(path, judge=lambda reply, p: reply == "x").judge("x", plain)
    # an id that is made for a line stays when lines move
    moved = tasks.get(str(written(tmp_path / "moved.jsonl", CHAT, GOOD)))
    assert moved.items()[1]["id"] == mine.items()[0]["id"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 of .*bad.jsonl is not JSON"),
        ("[" * 100_000, "line 2 of .*bad.jsonl is not JSON"),
        ('{"text": "\\ud800"}', "is not JSON in UTF-8"),
        ([1], 'line 2 of .*bad.jsonl has no prompt; write an object with either "text" or "messages"'),
        ({**GOOD, "messages": []}, "has no prompt"),
        ({**GOOD, "text": ""}, "\"text\" is ''; give a text"),
        ({**GOOD, "task": "x"}, 'has the entry "task", which the task sets itself'),
        ({**GOOD, "right": "Rome"}, "line 2 of .*: \"right\" is 'Rome'; give a list"),
        ({**GOOD, "right": []}, '"right" is'),
        ({**GOOD, "wrong": [" "]}, '"wrong" is'),
        ({key: GOOD[key] for key in ("text", "spans", "right")}, '"wrong" is None'),
        ({**GOOD, "spans": {}}, r'"spans" is {}; give {"mark": ...}'),
        ({**GOOD, "spans": {"mark": "In Bonn"}}, 'line 2 of .*: span "mark"'),
        ({**GOOD, "spans": {"mark": "in"}}, "occurs 3 times"),
        ({**GOOD, "prefix": 3}, '"prefix" is 3; give the text'),
        ({**GOOD, "judge": "exact"}, "\"judge\" is 'exact'; use one of contains, starts, first, letter, json"),
        ({**GOOD, "judge": ["json"]}, '"judge" is'),
        ({**GOOD, "id": 3}, '"id" is 3; give a text'),
        ({**CHAT, "messages": []}, '"messages" is'),
        ({**CHAT, "messages": [{"role": "user"}]}, '"messages" is'),
        ({**CHAT, "messages": [*CHAT["messages"], {"role": "assistant", "content": "I"}]}, "so give one"),
        (GOOD, r"line 2 of .*bad.jsonl has the id \"\w+\" of line 1; give each line a different id"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = written(tmp_path / "bad.jsonl", GOOD, row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(InterpError, match=message):
        Task.from_jsonl(path)


def test_bad_files(tmp_path):
    with pytest.raises(PromptError, match="holds no items; write one JSON object in each line"):
        Task.from_jsonl(written(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(PromptError, match="cannot be read as UTF-8 text"):
        Task.from_jsonl(tmp_path / "latin.jsonl")
    path = written(tmp_path / "one.jsonl", GOOD)
    with pytest.raises(UsageError, match="unknown judge 'exact'; use a function, or one of contains, starts"):
        Task.from_jsonl(path, judge="exact")
    one = Task.from_jsonl(path)
    empty = next(part for part in ("profile", "dev", "test") if part != split_of(one.items()[0]["id"]))
    with pytest.raises(UsageError, match=f'one has 1 items and none in "{empty}"; add items, or use split="all"'):
        one.prompts(byte_level(chat=False), empty)
