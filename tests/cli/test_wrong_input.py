"""A wrong input is one sentence on stderr, exit code 2, and nothing half-written."""

import json
import os
import shutil

import pytest
import run_cases
import tiny_chat_model


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def pickled(place, folder):
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(folder, name), place)
    (place / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return place


def other_model(t):
    return tiny_chat_model.folder(t / "m", seed=1)


def piped(path):
    os.mkfifo(path)
    return path


def score_of_pipe(t, f, r):
    return ["score", "sinks", f, "--out", t / "x", "--prompts", piped(t / "p.txt")]


def changed(place, folder, name, **entries):
    """A model folder of which one file has other entries."""
    shutil.copytree(folder, place)
    stored = json.loads((place / name).read_text())
    write(place / name, json.dumps(stored | entries))
    return place


def bomb(place, folder):
    return changed(place, folder, "config.json", num_hidden_layers=10**9)


def oddly(place, folder):
    return changed(place, folder, "tokenizer_config.json", model_max_length=[[]])


def link(path):
    path.symlink_to(write(path.with_name("victim"), "kept"))
    return path


def score(analyses, *options):
    return lambda t, f, r: ["score", analyses, f, "--out", t / "x", *options]


def own(analyses, text, *options, name="p.txt"):
    return lambda t, f, r: ["score", analyses, f, "--out", t / "x", "--prompts", write(t / name, text), *options]


LOST = json.dumps({"text": "a cat sat on the mat", "spans": {"where": "on the hat"}})
# a byte-level tokenizer needs more tokens for a needle prompt
LONGER = ("--needle-length", 560, "--check-length", 560, "--explorer-tokens", 560, "--n-texts", 1)
MADE = "takes prompts that are made for it"
SCORE = {
    "no such folder": (lambda t, f, r: ["score", "sinks", t / "nowhere", "--out", t / "x"], "nowhere"),
    "pickled weights": (lambda t, f, r: ["score", "sinks", pickled(t / "p", f), "--out", t / "x"], "pickle"),
    "no such analysis": (score("speed"), "unknown analysis 'speed'"),
    "nearly an analysis": (score("sink"), "did you mean 'sinks'?"),
    "no analysis": (score(","), "no analysis is named"),
    "pairs of one's own": (own("activation_patching", "hello", "--n-heads", 2), MADE),
    "documents of one's own": (own("qrhead", "hello"), MADE),
    "selectors on own prompts": (own("kv", "hello"), MADE),
    "gates without a step": (score("duo_gates", "--training-steps", 0), "training_steps=0 is too small"),
    "views of no heads": (score("qk_projection"), "add an analysis that finds heads to the analyses, or name heads"),
    "names in pieces": (score("path_patching", "--n-heads", 2), "single token"),
    "selectors on too short a text": (score("kv", "--needle-length", 40), "length 40 is too short"),
    "selectors on too long a text": (score("kv", "--needle-length", 3000), "context of this model is 2,048"),
    "influence of nothing": (score("attention_influence"), "add retrieval to the analyses"),
    "safety as an analysis": (score("safety"), "safety is a separate command; run interp safety"),
    "part of safety": (score("ships"), "part of the run `interp safety`"),
    "empty prompts": (own("sinks", "\n"), "holds no prompts"),
    "no file of prompts": (score("sinks", "--prompts", "/nowhere/p.txt"), "cannot be read as UTF-8 text"),
    "span not found": (own("sinks", LOST, name="p.jsonl"), "is not in"),
    "prompt too long": (own("sinks", "a" * 3000), "context of this model is 2,048"),
    "no answer span": (own("retrieval", "hello", "--no-check"), 'has no span "answer"'),
    "head out of range": (score("sinks", *LONGER, "--heads", "L9H0"), "layer 9 of a 2-layer model"),
    "head in words": (score("sinks", *LONGER, "--heads", "the first"), "does not name heads"),
    "too many heads": (score("retrieval", *LONGER, "--n-heads", 7), "leave too few for a random control"),
    "unwritable output": (lambda t, f, r: ["report", r, "-o", t / "none" / "r.html"], "not a folder you may write to"),
    "output is a folder": (lambda t, f, r: ["report", r, "-o", t], "is a folder"),
    "output is a link": (lambda t, f, r: ["report", r, "-o", link(t / "r.html")], "since it is a symbolic link"),
    "output is a device": (lambda t, f, r: ["report", r, "-o", "/dev/null"], "since it is a device"),
    "output is the screen": (lambda t, f, r: ["report", r, "-o", "/dev/stdout"], "cannot be written, since"),
    "output is a manifest": (lambda t, f, r: ["report", r, "-o", r / "manifest.json"], "belongs to the run in"),
    "output is a result": (lambda t, f, r: ["report", r, "-o", r / "results" / "sinks.json"], "belongs to the run in"),
    "run folder is a file": (score("sinks", *LONGER, "-o", "/dev/null"), "name a folder"),
    "report of nothing": (lambda t, f, r: ["report", t, "-o", t / "r.html"], "neither a run folder nor a model folder"),
    "scores of another model": (
        lambda t, f, r: ["show", r / "results" / "sinks.json", "--model", other_model(t)], "weights",
    ),
    "run shown for another model": (lambda t, f, r: ["show", r, "--model", other_model(t)], "weights"),
    "no score file": (lambda t, f, r: ["show", write(t / "s.json", "{}")], "s.json"),
    "nothing there": (lambda t, f, r: ["show", t / "none"], "does not exist; give a run folder"),
    "not a run": (lambda t, f, r: ["show", t], "is not a run folder"),
    "no such option": (score("sinks", "--fast"), "--fast"),
    "bad number": (score("sinks", "--n-texts", 0), "n_texts=0 is too small"),
    "a word for a number": (score("sinks", "--n-texts", "many"), "--n-texts"),
    "depths in words": (score("sinks", "--needle-depths", "deep"), "is not a list of numbers"),
    "depths outside": (score("sinks", "--needle-depths", "2"), "between 0 and 1"),
    "a number of many digits": (score("sinks", "--n-texts", 10**30), "is too large; give at most 10,000,000"),
    "a number of too many digits": (score("sinks", "--n-texts", "9" * 5000), "--n-texts"),
    "many prompts": (score("sinks", "--n-texts", 10**6), "n_texts=1,000,000 is too large"),
    "a negative seed": (score("sinks", "--seed", -1), "seed=-1 is not valid"),
    "a large seed": (score("sinks", "--seed", 2**64), "is not valid; give a number from 0"),
    "nested depths": (score("sinks", "--needle-depths", "[" * 1000), "is not a list of numbers"),
    "a depth that is no number": (score("sinks", "--needle-depths", "nan"), "needle_depths=nan is not finite"),
    "a setting of many digits": (score("qada", "--set", "qada.tau=" + "9" * 5000), "expected float"),
    "a large setting": (score("retrieval", "--set", "retrieval.max_new_tokens=1" + "0" * 30), "is too large"),
    "a head of many digits": (score("sinks", *LONGER, "--heads", f"L{'9' * 5000}H0"), "more than any model has"),
    "many heads": (score("sinks", *LONGER, "--heads", "L0H0-L0H999999999"), "more than any model has"),
    "a context of nothing": (score("sinks", "--max-length", 0), "max_length=0 is not valid"),
    "a text longer than the model": (score("sinks", "--text-length", 10**6), "context of this model is 2,048"),
    "no heads to show": (lambda t, f, r: ["show", r, "--top", 0], "--top 0 is too small"),
    "a name of many characters": (lambda t, f, r: ["list", "x" * 50_000], "unknown name"),
    "a result that is a pipe": (lambda t, f, r: ["show", piped(t / "a.json")], "since it is a named pipe"),
    "prompts that are a pipe": (score_of_pipe, "since it is a named pipe"),
    "a model that is a bomb": (lambda t, f, r: ["doctor", bomb(t / "m", f)], "states num_hidden_layers=1000000000"),
    "a tokenizer of wrong types": (lambda t, f, r: ["score", "sinks", oddly(t / "m", f), "-o", t / "x"], "tokenizer"),
    "no such ablation": (score("sinks", "--ablation", "none"), "--ablation"),
    "nearly a setting": (score("qada", "--set", "qada.tua=1"), "has no setting 'tua' (did you mean 'tau'?); it has"),
    "nearly a name": (score("qada", "--set", "quada.tau=0.5"), "did you mean 'qada'?"),
    "setting in words": (score("qada", "--set", "qada.tau=high"), "qada.tau is 'high', expected float"),
    "setting without a name": (score("qada", "--set", "tau=0.9"), "write name.setting=value, as in qada.tau=0.9"),
    "setting without a value": (score("qada", "--set", "qada.tau"), "write name.setting=value"),
    "no such selector": (score("kv", *LONGER, "--set", 'kv.selectors=["fast"]'), "fast"),
    "selector without scores": (score("kv", *LONGER, "--set", 'kv.selectors=["duo_attention"]'), "duo_gates"),
    "no such card": (lambda t, f, r: ["list", "speed"], "unknown name 'speed'; `interp list` has all names"),
    "nearly a task": (lambda t, f, r: ["list", "neddle"], "unknown name 'neddle' (did you mean 'needle'?);"),
    "nearly a card": (lambda t, f, r: ["list", "past"], "did you mean 'pasta'?"),
    "no refusals": (
        lambda t, f, r: ["safety", f, "--out", t / "x", "--n-harmful", 8, "--n-harmless", 8, "--reply-tokens", 2],
        "no refusal to attribute to heads",
    ),
    "no such file of requests": (
        lambda t, f, r: ["safety", f, "--out", t / "x", "--requests", t / "none.csv"], "cannot be read as a CSV file",
    ),
    "sizes in words": (
        lambda t, f, r: ["safety", f, "--out", t / "x", "--head-set-sizes", "some"], "is not a list of numbers",
    ),
    "no such refusal ablation": (
        lambda t, f, r: ["safety", f, "--out", t / "x", "--ablations", "mean"], "unknown ablation mean",
    ),
}  # fmt: skip


def steer(*options):
    return lambda t, f, r: ["steer", f, *options, "-o", t / "x"]


JSON = ("--task", "json")
STEER = {
    "no such method": (steer("--method", "magic", *JSON), "unknown edit 'magic'"),
    "nearly a method": (steer("--method", "pasat", *JSON), "unknown edit 'pasat' (did you mean 'pasta'?); choose from"),
    "nearly a steering setting": (
        steer("--method", "pasta", *JSON, "--set", "pasta.alhpa=0.1"),
        "pasta has no setting 'alhpa' (did you mean 'alpha'?); it has spans, alpha",
    ),
    "no such task": (steer("--method", "pasta", "--task", "poetry"), "poetry"),
    "no such task file": (steer("--method", "pasta", "--task", "nothing.jsonl"), "nothing.jsonl"),
    "no such steering setting": (steer("--method", "act", *JSON, "--set", "gamma=2"), "act has no setting 'gamma'"),
    "alpha below zero": (steer("--method", "pasta", *JSON, "--set", "alpha=-1"), "alpha=-1"),
    "alpha as a word": (steer("--method", "pasta", *JSON, "--set", "alpha=high"), "pasta.alpha is 'high'"),
    "no value": (steer("--method", "pasta", *JSON, "--set", "alpha"), "cannot read the setting"),
    "setting of another edit": (
        steer("--method", "pasta", *JSON, "--set", "act.beta=0.1"),
        "but the method is 'pasta'",
    ),
    "heads of another model": (steer("--method", "pasta", *JSON, "--heads", "L40H2"), "L40H2"),
    "head set sizes as words": (steer("--method", "pasta", *JSON, "--head-set-sizes", "ten"), "list of numbers"),
    "no items": (steer("--method", "pasta", *JSON, "--n-test-items", 0), "n_test_items=0 is too small"),
    "no method": (steer(*JSON), "--method"),
    "no profile": (steer("--method", "pasta", *JSON, "--profile", "nothing.json"), "nothing.json"),
}
BAD = SCORE | STEER
# these are known only once the model has answered
AFTER_THE_START = ("no refusals", "no such selector", "selector without scores")


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_and_exit_code_2(call, folder, finished, tmp_path, case):
    make, text = BAD[case]
    code, out, err = call(*make(tmp_path, folder, finished))
    assert code == 2, err
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert not out
    assert case in AFTER_THE_START or not (tmp_path / "x").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_of_another_model_or_other_settings_stays_as_it_is(call, folder, finished, tmp_path, small):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for arguments, text in (
        ([other_model(tmp_path), "--out", finished, *small], "holds a run of"),
        ([folder, "--out", finished, *small, "--seed", 3], "(seed was 0, now 3)"),
        ([folder, "--out", finished, *small, "--set", "sinks.column_threshold=0.2"], "another"),
    ):
        code, out, err = call("score", "retrieval,sinks", *arguments)
        assert code == 2, err
        assert text in err
        assert len(err.strip().splitlines()) == 1, err
        assert not out
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_steering_run_does_not_take_the_folder_of_another(call, folder, finished, tmp_path):
    items = run_cases.items_file(tmp_path / "mine.jsonl")
    few = ["--n-profile-items", 2, "--n-dev-items", 2, "--n-test-items", 2, "--heads", "L0H1"]
    code, _, err = call("steer", folder, "--method", "boost", "--task", items, "-o", finished, *few)
    assert code == 2, err
    assert "holds a run that differs in its recipe" in err
