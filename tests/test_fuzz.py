"""Generated inputs of every kind: each is read, or refused by one sentence, in bounded time.

In CI this takes a minute. By hand: INTERP_FUZZ_SECONDS=600 INTERP_FUZZ_SEED=1 python -m pytest tests/test_fuzz.py
A failure prints the input, made as small as hypothesis can make it; the same seed makes the same inputs.
"""

import inspect
import json
import math
import os
import shutil
import time
from functools import partial

import hypothesis
import pytest
import run_cases
import tiny_chat_model
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import interp
from interp import cli
from interp.analyses.results import codec
from interp.analyses.results.files import SEAL, seal
from interp.analyses.results.head_list_formats import (
    read_compresskv,
    read_duo_attention,
    read_qrhead,
    read_retrieval_head,
)
from interp.analyses.results.result import Result
from interp.analyses.steer.load_edits import load_edits
from interp.analyses.tasks import jsonl, refusal
from interp.errors import InterpError
from interp.hooks.prompts.spans import locate
from interp.models.load import load
from interp.runs.run import Run

pytestmark = pytest.mark.slow
N_TESTS = 9
SECONDS = float(os.environ.get("INTERP_FUZZ_SECONDS", "60")) / N_TESTS
"""time of each test below"""
SEED = int(os.environ.get("INTERP_FUZZ_SEED", "0"))
LONGEST = 10.0
"""seconds of processor time for one input"""
LONGEST_WAIT = 60.0
"""seconds for one input, of which most may be those of other programs on a shared machine"""
SLOW_TESTS = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.function_scoped_fixture,
    HealthCheck.large_base_example,
)
LAYOUT = interp.HeadLayout(layers=2, heads=4, kv_heads=2)

numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, -(2**63), 10**30, int("9" * 400)]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-30, 1e30, 1e300, float("inf"), float("-inf"), float("nan")]),
    st.integers(-5, 50),
)
words = st.one_of(
    st.sampled_from(
        ["", " ", "a", "L0H1", "all", "L0-L1", "../x", "/etc/x", "\x00", "\x1b[31m", "null", "é", "\ud800"]
    ),
    st.text(max_size=12),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


def refused(call):
    """Run a function that may refuse its input, by one sentence of bounded length."""
    message = "an answer"
    try:
        call()
    except InterpError as error:
        message = str(error)
    assert 5 < len(message) < 2000, f"a message of {len(message)} characters"


def command(monkeypatch, capsys, *words):
    """Run a command: it answers, or says in one line what is wrong with its input."""
    monkeypatch.setattr("sys.argv", ["interp", *map(str, words)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code in (0, 2), f"{words}: {err}"
    assert stop.value.code == 0 or len(err.strip().splitlines()) == 1, err


def fuzzed(*strategies, **named):
    """Generate inputs for a test until its time is over."""

    def decorate(test):
        end: list[float] = []

        def within(*args, **kwargs):
            # processor time decides about one input, since the machine may be shared
            now, used = time.monotonic(), time.process_time()
            end.append(now + SECONDS) if not end else None
            if now > end[0]:
                return
            try:
                refused(lambda: test(*args, **kwargs))
            except BaseException:
                # hypothesis runs the input again, and makes it smaller
                end[0] = math.inf
                raise
            assert time.process_time() - used < LONGEST, "it takes too long"
            assert time.monotonic() - now < LONGEST_WAIT, "it waits too long"

        within.__name__, within.__doc__ = test.__name__, test.__doc__
        within.__signature__ = inspect.signature(test)
        limits = settings(
            max_examples=int(50 * SECONDS) + 20,
            deadline=None,
            database=None,
            suppress_health_check=SLOW_TESTS,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            print_blob=False,
        )
        return limits(seed(SEED)(given(*strategies, **named)(within)))

    return decorate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat_model.tokenizer()


@pytest.fixture(scope="module")
def folder(place):
    return tiny_chat_model.folder(place / "model")


@pytest.fixture(scope="module")
def run_folder(place, tokenizer):
    plan = run_cases.score_plan("previous_token", "sinks", check=False, heads="")
    Run.open(place / "run", plan, tiny_chat_model.model(), tokenizer).finish(progress=False)
    return place / "run"


def changed(content, path, value, remove):
    """A JSON value with one part, found by numbers, replaced or removed."""
    if not isinstance(content, dict | list) or not content or not path:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[path[0] % len(keys)]
    copied = dict(content) if isinstance(content, dict) else list(content)
    if remove and len(path) == 1:
        del copied[key]
    else:
        copied[key] = changed(copied[key], path[1:], value, remove)
    return copied


paths = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@fuzzed(
    words=st.lists(
        st.one_of(words, st.from_regex(r"L?\d{1,5}[H.\-]\d{1,5}(-L?\d{1,9}H\d{1,9})?", fullmatch=True)), max_size=4
    ),
    layout=st.sampled_from([None, LAYOUT]),
    value=values,
)
def test_heads(words, layout, value):
    for spec in (", ".join(words), words, value):
        refused(partial(interp.HeadSet.parse, spec, layout))


@fuzzed(
    content=st.one_of(
        values, st.dictionaries(st.from_regex(r"\d{1,2}-\d{1,2}|\d", fullmatch=True), values, max_size=4)
    ),
    raw=st.one_of(st.none(), st.binary(max_size=40), words.map(partial(str.encode, errors="surrogatepass"))),
    reader=st.sampled_from([read_retrieval_head, read_duo_attention, read_qrhead, read_compresskv, load_edits]),
)
def test_head_lists_and_edits(place, content, raw, reader):
    path = place / "list.json"
    path.write_bytes(json.dumps(content).encode() if raw is None else raw)
    reader(path)


EDITS = [edit.to_dict() for edit in (interp.steer.Pasta("mark", heads="L0H1"), interp.steer.Boost("mark", 2.0))]


@fuzzed(path=paths, value=values, remove=st.booleans())
def test_saved_edits(place, path, value, remove):
    file = place / "edits.json"
    file.write_text(json.dumps(changed(EDITS, path, value, remove)))
    load_edits(file)


ITEM = {
    "text": "Paris is in France.",
    "spans": {"mark": "Paris"},
    "right": ["Yes"],
    "wrong": ["No"],
    "meta": {"a": 1},
}
CHAT = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "spans": {"a": "Hello"},
}


@fuzzed(
    item=st.sampled_from([{"text": "Paris is in France.", "spans": {"mark": "Paris"}}, CHAT]),
    path=paths,
    value=values,
    remove=st.booleans(),
    line=st.one_of(st.none(), words, st.binary(max_size=20)),
)
def test_prompts(place, tokenizer, item, path, value, remove, line):
    file = place / "prompts.jsonl"
    last = line.encode(errors="surrogatepass") if isinstance(line, str) else line or b""
    file.write_bytes(json.dumps(changed(item, path, value, remove)).encode() + b"\n" + last)
    interp.Prompts.from_file(file, tokenizer)
    locate("Paris is in France.", value, "span")


@fuzzed(
    item=st.sampled_from([ITEM, {**CHAT, "right": ["a"], "wrong": ["b"], "spans": {"mark": "Hello"}}]),
    path=paths,
    value=values,
    remove=st.booleans(),
    raw=st.binary(max_size=30),
)
def test_tasks_and_requests(place, item, path, value, remove, raw):
    (place / "requests.csv").write_bytes(b"goal,category\n" + raw)
    refused(lambda: refusal.read(place / "requests.csv", None))
    (place / "items.jsonl").write_text(json.dumps(changed(item, path, value, remove)))
    jsonl.read(place / "items.jsonl")


MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@fuzzed(
    name=st.sampled_from(MODEL_FILES),
    path=paths,
    value=values,
    remove=st.booleans(),
    raw=st.one_of(st.none(), st.binary(max_size=30)),
    cut=st.integers(0, 3000),
    flip=st.booleans(),
)
def test_model_folders(place, folder, name, path, value, remove, raw, cut, flip):
    broken = place / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(folder, broken)
    file = broken / name
    stored = json.loads(file.read_text())
    file.write_bytes(json.dumps(changed(stored, path, value, remove)).encode() if raw is None else raw)
    if flip:
        data = bytearray((broken / "model.safetensors").read_bytes())
        data[cut % len(data)] ^= 1 << cut % 8
        (broken / "model.safetensors").write_bytes(data)
    model, tokenizer = load(broken, device="cpu")
    if tokenizer is not None:
        prompts = interp.Prompts.encode(tokenizer, ["Paris", [{"role": "user", "content": "Hello"}]])
        interp.identify.previous_token(model, prompts, batch_size=1)


@fuzzed(
    which=st.integers(0, 40),
    path=paths,
    value=values,
    remove=st.booleans(),
    raw=st.one_of(st.none(), st.binary(max_size=9)),
)
def test_run_folders(place, run_folder, monkeypatch, capsys, which, path, value, remove, raw):
    """Checksums are made right again, so that what comes after them is reached."""
    broken = place / "broken-run"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(run_folder, broken)
    files = sorted(broken.rglob("*.json"))
    file = files[which % len(files)]
    stored = changed(json.loads(file.read_text()), path, value, remove)
    if isinstance(stored, dict) and SEAL in stored:
        stored = seal({name: part for name, part in stored.items() if name != SEAL})
    file.write_bytes(json.dumps(stored).encode() if raw is None else raw)
    command(monkeypatch, capsys, "show", broken, *(["--json"] if which % 2 else []))
    command(monkeypatch, capsys, "report", broken, "-o", place / "broken.html")


@fuzzed(path=paths, value=values, remove=st.booleans())
def test_results(place, run_folder, monkeypatch, capsys, path, value, remove):
    source = run_folder / "results" / "sinks.json"
    file = place / "sinks.json"
    shutil.copy(source.with_suffix(".safetensors"), file.with_suffix(".safetensors"))
    stored = changed(json.loads(source.read_text()), path, value, remove)
    if isinstance(stored, dict):
        stored = seal({name: part for name, part in stored.items() if name != SEAL})
    file.write_text(json.dumps(stored))
    refused(lambda: codec.save(Result.load(file), place / "again.json"))
    command(monkeypatch, capsys, "show", file)


OPTIONS = [
    *("--n-needles", "--needle-length", "--needle-depths", "--n-texts", "--text-length", "--n-pairs", "--seed"),
    *("--heads", "--n-heads", "--n-random-sets", "--ablation", "--kinds", "--batch-size", "--set", "--dtype", "--bos"),
    *("--device", "--prompts", "--sweep-lengths", "--haystack", "--max-length", "--no-check", "--json"),
]
arguments = st.lists(st.one_of(st.sampled_from(OPTIONS), words, numbers.map(str)), max_size=4)
analyses = st.one_of(st.sampled_from(["sinks", "basic", "retrieval", "all", "qada", "kv", "sinks,sinks"]), words)


@fuzzed(kind=st.sampled_from(["list", "show", "score", "steer", "safety", "report"]), name=analyses, given=arguments)
def test_arguments(place, folder, run_folder, monkeypatch, capsys, kind, name, given):
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    first = {
        "list": ["list", name],
        "show": ["show", str(run_folder)],
        "score": ["score", name, str(folder), "--dry-run", "-o", str(out)],
        "steer": ["steer", str(folder), "--method", name, "--task", "json", "-o", str(out), "--n-test-items", "0"],
        "safety": ["safety", str(folder), "-o", str(out), "--n-scored", "1"],
        "report": ["report", str(run_folder), "-o", str(place / "r.html")],
    }[kind]
    given = [word.replace("\x00", "0") for word in given]
    command(monkeypatch, capsys, *first, *given)
