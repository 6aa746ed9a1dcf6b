"""Every declared edit, made from its name and plain settings as the command line gives them."""

import json
from dataclasses import dataclass, replace

import pytest
import tiny_chat_model
import torch
from safetensors.torch import save_file

from interp import steer
from interp.analyses import registry, tasks
from interp.errors import HeadError, UsageError
from interp.hooks.edit.edit import Edit, Edits, steering
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs

DOCUMENTS = '["first", "second"]'
# name -> settings as JSON; "" where the edit is estimated
SETTINGS = {
    "pasta": '{"alpha": 0.05}',
    "boost": '{"factor": 3}',
    "spotlight": '{"target": 0.4}',
    "knockout": "{}",
    "redistribute": '{"least": 0.0, "share": 0.0, "sinks": [0, [1, 3]]}',
    "act": '{"threshold": 0.02}',
    "zerotuning": '{"gamma": 3.0}',
    "keyscale": '{"factor": 1.5}',
    "temperature": '{"temperature": 0.5}',
    "gate": '{"factor": 0}',
    "offset": '{"k": 3, "alpha": 5, "folds": 2}',
    "found_in_the_middle": f'{{"spans": {DOCUMENTS}, "temperature": 0.001}}',
}


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = tiny_chat_model.tokenizer()
    rows = [
        {
            "text": f"Say yes. One: the sky is blue {i}. Two: grass is green. Which of them is true?",
            "spans": {"mark": "sky is blue", "first": f"the sky is blue {i}.", "second": "grass is green."},
            "meta": {"right": [" yes"], "wrong": [" no", " maybe"]},
        }
        for i in range(6)
    ]
    return Prompts.encode(tokenizer, rows)


def logits(model, prompts):
    with torch.no_grad():
        return model(**model_inputs(model, prompts), use_cache=False).logits


def test_names_agree_with_files():
    assert set(SETTINGS) <= set(registry.names("edit"))
    for entry in registry.entries("edit"):
        assert entry.thing.__module__ == f"interp.analyses.steer.{entry.name}"
        assert entry.title
        assert entry.group
        assert entry.source


@pytest.mark.parametrize("name", SETTINGS)
def test_each_edit_is_made_from_json_and_changes_the_model(name, model, prompts, tmp_path):
    edit = steer.make_edit(name, json.loads(SETTINGS[name]), "mark", "all", model, prompts)
    assert isinstance(edit, Edit)
    before = logits(model, prompts[:2])
    with steering(model, edit, prompts[:2]):
        assert (logits(model, prompts[:2]) - before).abs().max() > 1e-4
    # a file gives it back, in a process that knows it by the registry
    assert steer.load_edits((Edits() + edit).save(tmp_path / "edit.json")) == Edits() + edit
    named = steer.make_edit(name, json.loads(SETTINGS[name]), "mark", HeadSet.parse("L1H2"), model, prompts)
    assert named.heads == "L1H2"
    with steering(model, named, prompts[:2]):
        assert (logits(model, prompts[:2]) - before).abs().max() > 1e-5


def test_vectors_and_biases_come_from_files_too(model, prompts, tmp_path):
    save_file({"L0H1": torch.ones(model.config.head_dim)}, tmp_path / "vectors.safetensors")
    path = str(tmp_path / "vectors.safetensors")
    assert steer.make_edit("offset", {"vectors": path, "at": "all"}) == steer.Offset(path, at="all")
    assert steer.make_edit("offset", {"vectors": {"L0H1": [1, 2]}}) == steer.Offset({"L0H1": [1.0, 2.0]})
    slots = torch.rand(2, 4, 2)
    save_file({"bias": slots}, tmp_path / "bias.safetensors")
    given = {"bias": str(tmp_path / "bias.safetensors"), "spans": ["first", "second"]}
    assert steer.make_edit("found_in_the_middle", given) == steer.FoundInTheMiddle(["first", "second"], slots)
    assert steer.make_edit("Found-in-the-Middle", {**given, "bias": slots.tolist()}).spans == ("first", "second")


def test_estimated_edits_are_what_their_functions_give(model, prompts):
    edit = steer.make_edit("offset", {"k": 2, "scale": 2.0}, model=model, prompts=prompts)
    assert isinstance(edit, steer.Offset)
    right, wrong = (prompts.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" yes", " no"))
    rows = [[*prompt.ids, *(wrong if i % 2 else right)] for i, prompt in enumerate(prompts)]
    found = steer.iti(model, Prompts.from_ids(rows), [True, False] * 3, k=2, folds=3)
    assert edit == replace(found.edit, scale=2.0)
    # each document holds the same text of its own length
    made = steer.make_edit("found_in_the_middle", {"dummy": "ab"}, ["first", "second"], model=model, prompts=prompts)
    ids = prompts.tokenizer("ab", add_special_tokens=False)["input_ids"]
    items = []
    for prompt in prompts:
        row = list(prompt.ids)
        for name in ("first", "second"):
            ((start, stop),) = prompt.spans[name]
            row[start:stop] = (ids * (stop - start))[: stop - start]
        items.append(replace(prompt, ids=tuple(row)))
    bias = steer.slot_bias(model, replace(prompts, items=tuple(items)), ["first", "second"])
    assert made == steer.FoundInTheMiddle(["first", "second"], bias)


def test_tasks_of_the_command_give_what_offset_needs(model):
    for name in tasks.names():
        batch = tasks.get(name).prompts(tiny_chat_model.tokenizer(), "profile", 4)
        if max(batch.lengths) < 400:
            assert steer.make_edit("offset", {"k": 1}, model=model, prompts=batch).vectors


def test_tuned_settings_are_left_to_the_dev_split():
    assert steer.make_edit("zerotuning", {}).is_noop
    candidates = steer.tuned_edits("zerotuning", {}, heads="L1")
    assert [edit.gamma for edit in candidates.values()] == [0.2, 0.5, 2.0, 5.0]
    assert all(edit.heads == "L1" for edit in candidates.values())
    assert steer.tuned_edits("pasta", {}) == {}


def test_an_edit_that_this_process_declares_is_known(tmp_path):
    @registry.edit(title="Mine")
    @dataclass(frozen=True)
    class MineOnly(Edit):
        factor: float = 2.0

    edit = steer.make_edit("mineonly", {"factor": 3})
    assert edit == MineOnly(3)
    assert steer.load_edits((Edits() + edit).save(tmp_path / "mine.json")).edits == (edit,)
    assert "mineonly" not in registry.names("edit")


BAD = [
    ("psta", {}, r"unknown edit 'psta' \(did you mean 'pasta'\?\); "),
    ("pasta", {"alhpa": 1}, r"pasta has no setting 'alhpa' \(did you mean 'alpha'\?\); "),
    ("pasta", {"heads": "L0"}, "pasta has no setting 'heads'"),
    ("pasta", {"alpha": "high"}, r"pasta.alpha is 'high', expected float; give such a value, as in pasta.alpha=0.01"),
    ("pasta", {"protect_first": 1}, "pasta.protect_first is 1, expected bool"),
    ("pasta", {"mode": "only"}, "unknown mode 'only'"),
    ("pasta", {"alpha": 0}, "alpha=0 is not a positive number"),
    ("pasta", {"alpha": 1}, r"Pasta\(alpha=1\) changes nothing; give another value of pasta.alpha, pasta.mode"),
    ("act", {"threshold": None}, "act.threshold is None, expected float | str"),
    ("temperature", {}, r"Temperature\(temperature=1.0\) changes nothing"),
    ("offset", {}, "offset has no vectors; give offset.vectors, such as the path of a .safetensors file, or a model"),
    ("offset", {"vectors": {"L0H1": [1]}, "k": 2}, "offset.k is a setting of its estimation"),
    ("offset", {"vectors": {"head": [1]}}, "does not name a head"),
    ("found_in_the_middle", {"bias": [0.1]}, "changes nothing"),
    ("found_in_the_middle", {"bias": "nowhere.safetensors"}, "nowhere.safetensors holds no bias"),
]


@pytest.mark.parametrize(("name", "settings", "text"), BAD)
def test_bad_settings(name, settings, text):
    with pytest.raises((UsageError, HeadError), match=text) as error:
        steer.make_edit(name, settings)
    assert "\n" not in str(error.value)


def test_estimation_needs_documents_and_a_tokenizer(model, prompts):
    with pytest.raises(UsageError, match="one span is given; name at least two"):
        steer.make_edit("found_in_the_middle", {}, "mark", model=model, prompts=prompts)
    bare = replace(prompts, tokenizer=None)
    with pytest.raises(UsageError, match="no tokenizer for the dummy"):
        steer.make_edit("found_in_the_middle", {}, ["first", "second"], model=model, prompts=bare)
    with pytest.raises(UsageError, match="the dummy document is empty"):
        steer.make_edit("found_in_the_middle", {"dummy": ""}, ["first", "second"], model=model, prompts=prompts)
