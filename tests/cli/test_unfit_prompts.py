"""Prompts that do not fit an analysis, from the command line: one sentence, exit code 2, and no folder."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

import interp
from interp.analyses import registry
from interp.analyses.tasks.standard import PromptSizes
from interp.runs.plan import ScorePlan
from interp.runs.run import Run
from interp.testing import families


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def worded(demo, tmp_path_factory):
    """A tiny model whose tokens are words, so that the prompts of every analysis can be made for it."""
    _, tokenizer = demo
    place = tmp_path_factory.mktemp("worded") / "tiny"
    sizes = families.GROUPED | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **families.HEAD, num_hidden_layers=2)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def context(folder, place, size):
    """The model in a folder with another context: its rotary embedding has no table that ends."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    written(place / "config.json", json.dumps(config | {"max_position_embeddings": size}))
    return place


def second(row):
    """Two prompts of one's own: the first is long and has an answer, the second may lack something."""
    first = {"text": "a cat sat on the mat " * 90, "spans": {"answer": {"text": "cat", "occurrence": 0}}}
    rows = "\n".join(map(json.dumps, (first, row)))
    return lambda t, f: [f, "--batch-size", 1, "--prompts", written(t / "p.jsonl", rows)]


MADE = "takes prompts that are made for it"
COPIES = "prompt 0 of 'razor_{}' has no query with a target"
ANSWER = 'prompt 1 has no span "answer"'
# all that an analysis may need, but too long for the model
WHOLE = {"text": " cat" * 2100, "spans": {"answer": [0, 4], "first": [0, 40], "second": [40, 80]}}
HELLO, LONG, EMPTY = {"text": "hello"}, {"text": " cat" * 2030}, {"text": ""}
# a second prompt that lacks what each analysis needs, and the message
ANALYSES = {
    "razor_induction": (HELLO, COPIES.format("induction")), "razor_echo": (HELLO, COPIES.format("echo")),
    "semantic_retrieval": (HELLO, ANSWER), "retrieval_reasoning": (HELLO, ANSWER),
    "lookback": (LONG, "its reply may take 32"), "qada": (HELLO, "prompt 1 has 1 tokens, and 271 are needed"),
    "induction": (HELLO, "prompt 1 for 'induction' has no query with a target"),
    "duplicate_token": (HELLO, "prompt 1 for 'duplicate_token' has no query with a target"),
    # these take any text
    "positional": (EMPTY, "prompt 1 is empty"), "task_kv": (EMPTY, "prompt 1 is empty"),
    "qrhead": (HELLO, MADE), "qk_score": (HELLO, MADE), "attention_tracker": (HELLO, MADE),
    "context_entropy": (HELLO, MADE), "function_vectors": (HELLO, MADE), "concept_induction": (HELLO, MADE),
    "duo_gates": (HELLO, MADE),
}  # fmt: skip
UNFIT = {
    "without what it needs": (None, None),
    "too long": (
        lambda t, f: [f, "--prompts", written(t / "p.jsonl", json.dumps(WHOLE))],
        "context of this model is 2,048",
    ),
    "no such file": (lambda t, f: [f, "--prompts", t / "none.txt"], "cannot be read as UTF-8 text"),
    "an empty file": (lambda t, f: [f, "--prompts", written(t / "p.txt", "\n\n")], "holds no prompts"),
    "too small a model": (lambda t, f: [context(f, t / "small", 16)], "the context of this model is 16"),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_refuses_what_does_not_fit_and_leaves_nothing(call, worded, tmp_path, name, kind):
    lacks, message = ANALYSES[name]
    make, text = UNFIT[kind]
    if make is None:
        make, text = second(lacks), message
    elif kind == "too long" and message == MADE:
        text = MADE
    options = ["--no-check", "--explorer-tokens", 0]
    code, out, err = call("score", name, "--out", tmp_path / "run", *options, *make(tmp_path, worded))
    assert code == 2, err
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert not out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.get(name).paired])
def test_partners_are_read_too_so_they_must_fit(call, worded, demo, tmp_path, name):
    sides = registry.get(name).prompts(PromptSizes(), demo[1])
    limit = max(max(prompts.lengths) for prompts in sides) - 1
    options = ["--no-check", "--explorer-tokens", 0]
    small = context(worded, tmp_path / "small", limit)
    code, _, err = call("score", name, small, "--out", tmp_path / "run", *options)
    assert code == 2, err
    assert f"the context of this model is {limit:,}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ANALYSES)
def test_a_run_of_other_settings_stays_as_it_is(call, worded, tmp_path, name):
    run, made = tmp_path / "run", interp.load(str(worded))
    plan = ScorePlan(analyses=(name,), check=False, sizes=PromptSizes(explorer_tokens=0))
    Run.open(run, plan, made.model, made.tokenizer)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert before
    options = ["--no-check", "--explorer-tokens", 0]
    code, out, err = call("score", name, worded, "--out", run, "--seed", 3, *options)
    assert code == 2, err
    assert "(seed was 0, now 3)" in err
    assert len(err.strip().splitlines()) == 1, err
    assert not out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
