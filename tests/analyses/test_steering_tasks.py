"""The tasks that steering is measured on: what every item promises, what each judge accepts, and files of one's own."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from tokenizers_tiny import byte_fallback, byte_level

from interp.analyses import tasks
from interp.analyses.tasks import judges, needles
from interp.analyses.tasks.task import following, split_of
from interp.errors import PromptError, UsageError
from interp.hooks.generate import generate

NAMES = ("json", "pronoun", "counterfact", "sentiment", "topic", "choice", "needle")
TOKENIZERS = {"chat": byte_level(), "plain": byte_level(chat=False), "bos": byte_level(chat=False, bos=True, trim=True)}
PARTS = ("profile", "dev", "test")
HOSTILE = [
    "",
    " \n\t ",
    '{"name": "A", "occupation": ',
    "{" * 5000,
    '{"occupation":' * 3000,
    "}{}{",
    '{"occupation": {"occupation": [1, null]}}',
    '{"occupation": 7, "OCCUPATION": null}',
    '{"a": ' + "1" * 5000 + "}",
    "THE ANSWER IS A",
    "Ǆ ﬁ 🦉 \u2028 \u202e e\u0301 ١٢",
    "\x00\ufffd",
    "'’\"",
]


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return tasks.get(request.param)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids))


def holds(task, prompts):
    """Whether the judge accepts every right text and no wrong one."""
    return all(
        task.judge(text, p) is (key == "right") for p in prompts for key in ("right", "wrong") for text in p.meta[key]
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_item_keeps_the_promises(task, kind):
    tokenizer = TOKENIZERS[kind]
    prompts = task.prompts(tokenizer, "all")
    items = {item["id"]: item for item in task.items()}
    assert len(prompts) == len(items) == len(task.items()) >= 120
    assert len({p.text for p in prompts}) == len(prompts)
    for p in prompts:
        item = items[p.meta["id"]]
        assert p.meta["task"] == task.name
        assert p.meta["split"] == split_of(p.meta["id"])
        assert p.meta["right"]
        assert p.meta["wrong"]
        assert not set(p.meta["right"]) & set(p.meta["wrong"])
        ((start, stop),) = p.spans[task.span]
        marked = item["fact"] if task.name == "needle" else item["spans"]["mark"]
        assert decoded(tokenizer, p.ids[start:stop]).strip() == marked
        assert p.text.endswith(p.meta["prefix"] or (":" if kind == "chat" else "Answer:"))
        assert ("assistant:" in p.text) is (kind == "chat")
        head = decoded(tokenizer, p.ids)
        for text in (*p.meta["right"], *p.meta["wrong"]):
            both = [*p.ids, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert decoded(tokenizer, both) == head + text
            assert text.startswith(" ")
    assert holds(task, prompts)


def test_spans_are_found_without_bytes_for_spaces(task):
    tokenizer = byte_fallback()
    for p in task.prompts(tokenizer, "dev", 3):
        ((start, stop),) = p.spans["mark"]
        said = decoded(tokenizer, p.ids[start:stop]).strip()
        assert said in p.text
        assert len(said) > 10


def test_splits_are_disjoint_and_fixed(task):
    tokenizer = TOKENIZERS["plain"]
    parts = {part: {p.meta["id"] for p in task.prompts(tokenizer, part)} for part in PARTS}
    assert all(len(ids) >= 20 for ids in parts.values())
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == len(task.items())
    for part, ids in parts.items():
        for id in ids:
            byte = hashlib.sha256(id.encode()).digest()[0] % 10
            assert part == ("profile" if byte < 4 else "dev" if byte < 6 else "test")
    assert task.prompts(tokenizer, "dev", 5).items == task.prompts(tokenizer, "dev")[:5].items
    assert {p.meta["split"] for p in task.prompts(tokenizer)} == {"test"}


def test_the_first_few_are_a_mixture():
    tokenizer = TOKENIZERS["plain"]
    for name, least in (("topic", 3), ("sentiment", 2), ("choice", 3)):
        assert len({p.meta["right"][0] for p in tasks.get(name).prompts(tokenizer, "test", 12)}) >= least
    ids = [p.meta["id"] for p in tasks.get("json").prompts(tokenizer, "all")]
    assert ids != sorted(ids, key=lambda id: int(id.split("/")[1]))


def test_classes_are_balanced():
    for name, least in (("sentiment", 0.49), ("topic", 0.24), ("choice", 0.24)):
        counts = Counter(item["right"][0] for item in tasks.get(name).items())
        assert min(counts.values()) >= least * counts.total()
    # a longest or first option that is always right would be a way to guess
    words = Counter(item["messages"][0]["content"].split()[0] for item in tasks.get("choice").items())
    assert len(words) > 8


def test_nothing_but_the_mark_gives_the_answer_of_a_changed_fact():
    for item in tasks.get("counterfact").items():
        said = item["messages"][0]["content"].replace(item["spans"]["mark"], "") + item["prefix"]
        assert item["answer"].casefold() not in said.casefold()
        assert all(text not in item["spans"]["mark"] for text in item["wrong"])


def test_pronoun_sentences_are_whole():
    for item in tasks.get("pronoun").items():
        (old,), (new,) = item["wrong"], item["right"]
        assert not set("<>[]{}|/") & set(old + new)
        assert set(judges.split(old)) & {"she", "he", "her", "his", "him", "hers", "herself", "himself"}
        assert len(old.split()) == len(new.split())
        assert {"they", "them", "their", "theirs", "themselves"} & set(judges.split(new))


def test_biographies_are_whole_and_of_different_people():
    people = []
    for item in tasks.get("json").items():
        bio = item["messages"][0]["content"].removesuffix(item["spans"]["mark"])
        name = json.loads(item["right"][0])["name"]
        people.append(name)
        assert name in bio
        assert item["answer"] in bio.casefold()
        assert "{" not in bio
    assert len(set(people)) == len(people)


def test_reviews_and_news_do_not_name_their_label():
    for name in ("sentiment", "topic"):
        for item in tasks.get(name).items():
            labels = {*item["right"], *item["wrong"]}
            assert not labels & set(judges.split(item["spans"]["mark"])), item


def test_needles_are_made_for_the_prompts_that_are_asked_for(monkeypatch):
    made = []
    hide = needles.hide
    monkeypatch.setattr(needles, "hide", lambda *args: made.append(1) or hide(*args))
    prompts = tasks.get("needle").prompts(TOKENIZERS["chat"], "dev", 3)
    assert len(prompts) == len(made) == 3
    for p in prompts:
        assert p.spans["mark"] == p.spans["needle"]
        assert {"answer", "context", "question"} <= set(p.spans)
        (low, high), (start, _) = p.spans["context"][0], p.spans["mark"][0]
        assert 0.15 < (start - low) / (high - low) < 0.85
        assert all(len(wrong.split()) == len(p.meta["right"][0].split()) for wrong in p.meta["wrong"])


def test_hostile_replies_are_judged(task):
    (p,) = task.prompts(TOKENIZERS["plain"], "dev", 1)
    for reply in HOSTILE:
        verdict = task.judge(reply, p)
        assert isinstance(verdict, bool)
        assert not verdict or task.name == "choice"
    for judge in judges.JUDGES.values():
        assert all(isinstance(judge(reply, p), bool) for reply in HOSTILE)


def test_a_judge_that_is_changed_does_not_pass(task):
    prompts = task.prompts(TOKENIZERS["plain"], "test", 20)
    assert holds(task, prompts)
    for changed in (
        lambda reply, p: True,
        lambda reply, p: False,
        lambda reply, p: not task.judge(reply, p),
        lambda reply, p: task.judge(reply, prompts[0]),
        lambda reply, p: task.judge(reply[: len(reply) // 2 - 1], p),
    ):
        assert not holds(replace(task, judge=changed), prompts)


def test_names_and_get(tmp_path):
    assert tasks.names() == NAMES
    assert all(tasks.get(name).name == name for name in NAMES)
    assert all(tasks.get(name).description and "\n" not in tasks.get(name).description for name in NAMES)
    with pytest.raises(UsageError, match=r"unknown task 'jsn'; choose from json, pronoun, .*needle, or give a file"):
        tasks.get("jsn")
    with pytest.raises(PromptError, match=r"none.jsonl cannot be read as UTF-8 text \(No such file"):
        tasks.get(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "train"}, "unknown split 'train'; choose from profile, dev, test, all"),
        ({"n": 0}, r"n=0 is out of range; \"test\" of choice has \d+ items, so use 1 to \d+"),
        ({"n": 10_000}, "n=10000"),
    ],
)
def test_prompts_refuse(settings, message):
    with pytest.raises(UsageError, match=message):
        tasks.get("choice").prompts(TOKENIZERS["plain"], **settings)


@pytest.mark.parametrize(
    ("text", "given", "spaced"),
    [
        ("The city is", "Rome", " Rome"),
        ("The city is", " Rome", " Rome"),
        ("assistant\n", " Rome", "Rome"),
        ("Answer: ", "Rome", "Rome"),
        ("Answer:", '{"a": 1}', ' {"a": 1}'),
        ('says: "', "Rome", "Rome"),
        ("The city is Rome", ", Italy", ", Italy"),
        ("(", " x", " x"),
    ],
)
def test_following(text, given, spaced):
    assert following(text, given) == spaced


@pytest.mark.slow
def test_the_demo_tokenizer_has_no_token_across_the_border(demo, task):
    _, tokenizer = demo
    for p in task.prompts(tokenizer, "all"):
        for text in (*p.meta["right"], *p.meta["wrong"]):
            following = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer(p.text + text, add_special_tokens=False)["input_ids"] == [*p.ids, *following]


@pytest.mark.slow
def test_the_demo_model_has_something_to_gain_and_to_lose(demo):
    model, tokenizer = demo
    right = {}
    for name in NAMES:
        task = tasks.get(name)
        prompts = task.prompts(tokenizer, "dev", 8)
        replies = generate(model, prompts, max_new_tokens=task.max_new_tokens, stop=task.stop)
        right[name] = sum(task.judge(reply.text, p) for reply, p in zip(replies, prompts, strict=True))
    assert right["needle"] >= 6, right
    assert sum(0 < right[name] < 8 for name in NAMES) >= 5, right
