"""Run folders on a tiny model: resume after a kill at any cell, refuse what is not theirs, join to the same numbers."""

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_chat_model
import torch
from detectors import prompts

from interp import folders, runs
from interp.analyses import identify
from interp.analyses.kv import key_curve, selectors_of
from interp.analyses.views.token_attention import view
from interp.costs import estimate
from interp.errors import HeadError, PromptError, RunError, UsageError
from interp.hooks.model.heads import Head
from interp.hooks.read.capture import capture, run
from interp.hooks.read.keep import pattern
from interp.report import make_report, render
from interp.results import findings, read_manifest
from interp.runs import Run
from interp.studies import Plan, Study, check_prompts, key_tasks, parse_analyses, studies
from interp.testing import families, planted
from interp.told import data, told

PLAN = Plan(
    needles=3, length=700, depths=(0.5,), texts=3, text_length=40, repeat=12, check_needles=3, check_length=700,
    heads="L0H1, L1H2", draws=2, batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()


@pytest.fixture(scope="module")
def whole(model, tokenizer, tmp_path_factory):
    """One run made in one go."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, Run.open(folder, PLAN, model, tokenizer).finish(progress=False)


def same(one, other):
    assert one.scores.keys() == other.scores.keys()
    for name, table in one.scores.items():
        assert torch.equal(table.per_prompt.nan_to_num(-1), other.scores[name].per_prompt.nan_to_num(-1)), name
        assert torch.equal(table.low.nan_to_num(-1), other.scores[name].low.nan_to_num(-1)), name
    assert one.causal == other.causal
    assert one.views == other.views


def test_a_run_holds_every_analysis(whole):
    _, found = whole
    assert tuple(found.scores) == PLAN.analyses
    assert [len(table.per_prompt) for table in found.scores.values()] == [3] * 5
    assert found.causal is not None
    groups = ["as loaded", "top", "random", "random", "random by layer", "random by layer"]
    assert [outcome.condition.group for outcome in found.causal.outcomes] == groups
    top, rest = found.causal.outcomes[1].condition.heads, found.causal.outcomes[2:]
    assert all(len(o.condition.heads) == len(top) and not (o.condition.heads & top) for o in rest)
    assert found.seconds > 0


def test_killed_at_every_write_it_ends_with_the_same_numbers(whole, model, tokenizer, tmp_path, monkeypatch):
    """The manifest's write included, before and after the file is there; each start gets one write further."""
    folder, found = whole
    other = tmp_path / "killed"
    write, left = folders.write_atomic, []

    def dying(path, data):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(path, data)
        if not left:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "write_atomic", dying)
    starts = 0
    while starts < 100:
        starts += 1
        left[:] = [None] * (starts % 3)
        try:
            again = Run.open(other, PLAN, model, tokenizer).finish(progress=False)
            break
        except KeyboardInterrupt:
            continue
    assert starts > 20
    same(found, again)
    assert {p.name for p in (folder / "cells").iterdir()} == {p.name for p in (other / "cells").iterdir()}


@pytest.mark.slow
def test_killed_by_the_system_it_ends_with_the_same_numbers(tmp_path):
    """SIGKILL at some moment of a real process, then the same command again; against one that was left alone."""
    place = tiny_chat_model.folder(tmp_path / "model")
    settings = ["--texts", "24", "--text-length", "60", "--batch-size", "1"]
    command = [sys.executable, "-c", "from interp.cli import main; main()", "score", "sinks,induction", str(place)]
    for delay in (9.0, 12.0):
        with contextlib.suppress(subprocess.TimeoutExpired):
            # run() kills the process when its time is over
            subprocess.run([*command, "--out", str(tmp_path / "killed"), *settings], timeout=delay, capture_output=True)
    for name in ("killed", "alone"):
        done = subprocess.run([*command, "--out", str(tmp_path / name), *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    same(findings(tmp_path / "alone"), findings(tmp_path / "killed"))


def test_a_half_written_cell_is_done_again(whole, model, tokenizer, tmp_path):
    folder, found = whole
    copy = tmp_path / "torn"
    shutil.copytree(folder, copy)
    (copy / "cells" / "sinks-0001.json").write_text('{"seconds"')
    tensors = copy / "cells" / "induction-0000.scores.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    next((copy / "cells").glob("check-01-*.json")).unlink()
    (copy / "cells" / "previous_token-0001.scores.json").unlink()
    next((copy / "cells").glob("check-02-*-0001.json")).write_text("{")
    partial = findings(copy)
    assert len(partial.scores["sinks"].per_prompt) == len(partial.scores["previous_token"].per_prompt) == 2
    assert partial.causal is None
    same(found, Run.open(copy, PLAN, model, tokenizer).finish(progress=False))


def test_a_finished_run_is_read_without_the_model(whole):
    folder, found = whole
    same(found, findings(folder))
    assert read_manifest(folder)["plan"]["seed"] == 0


def test_other_model_plan_or_folder_is_refused(whole, tokenizer, tmp_path, model):
    folder, _ = whole
    other = tiny_chat_model.model(seed=1)
    with pytest.raises(RunError, match=r"holds a run of .* \(weights [0-9a-f]+\), not of .* \(weights [0-9a-f]+\)"):
        Run.open(folder, PLAN, other, tokenizer)
    with pytest.raises(RunError, match=r"another plan \(seed was 0, now 1\)"):
        Run.open(folder, replace(PLAN, seed=1), model, tokenizer)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="is no run folder"):
        Run.open(tmp_path, PLAN, model, tokenizer)
    with pytest.raises(RunError, match="is no run folder"):
        findings(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="name a"):
        Run.open(tmp_path / "file" / "run", PLAN, model, tokenizer)


def test_a_run_of_another_format_is_refused(whole, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other/9"}))
    with pytest.raises(RunError, match="format 'other/9'"):
        findings(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(RunError, match="holds a list"):
        findings(tmp_path)


def test_prompts_too_long_are_refused_before_anything_is_computed(model, tokenizer, tmp_path):
    with pytest.raises(PromptError, match="context of this model is 2,048"):
        Run.open(tmp_path / "run", replace(PLAN, text_length=3000), model, tokenizer)
    assert not (tmp_path / "run").exists()


def test_named_heads_are_checked_and_ablated(model, tokenizer, tmp_path):
    with pytest.raises(HeadError, match="layer 7 of a 2-layer model"):
        Run.open(tmp_path / "bad", replace(PLAN, analyses=("sinks",), heads="L7H0"), model, tokenizer).finish(False)
    plan = replace(PLAN, analyses=("sinks",), heads="L1H0, L1H2")
    found = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    assert found.causal is not None
    assert [str(head) for head in found.causal.outcomes[1].condition.heads] == ["L1H0", "L1H2"]


def test_a_model_that_answers_nothing_has_no_causal_check(model, tokenizer, tmp_path):
    plan = replace(PLAN, analyses=("retrieval",), heads="", k=2)
    found = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    assert found.scores["retrieval"].counted == 0
    assert found.causal is None
    assert not found.views


def test_the_view_is_the_row_of_the_pattern(model, tokenizer):
    prompts = check_prompts(PLAN, tokenizer)[:1]
    shown = view(model, prompts, [Head(1, 2), Head(0, 1)])
    assert list(shown.weights) == ["L1H2", "L0H1"]
    assert "".join(shown.tokens) == prompts[0].text
    with capture(model, pattern(), prompts) as cap:
        run(model, prompts)
    for name, (layer, head) in {"L1H2": (1, 2), "L0H1": (0, 1)}.items():
        row = cap[pattern()][0, layer, head, -1]
        torch.testing.assert_close(torch.tensor(shown.weights[name]), row, atol=1e-5, rtol=0)
    start, stop = shown.marks["answer"][0]
    assert prompts[0].meta["answer"] in "".join(shown.tokens[start:stop])


def test_heads_of_the_check_come_from_retrieval_and_have_scores(tmp_path, monkeypatch, tokenizer):
    """With a planted model that does answer: one retrieval head is found, and only it is taken out."""
    truth = planted.make("retrieval", 0)
    asked = prompts("retrieval", 0)
    monkeypatch.setattr(runs, "studies", lambda *_: [Study("retrieval", identify.retrieval, asked)])
    monkeypatch.setattr(runs, "check_prompts", lambda *_: prompts("retrieval", 1))
    monkeypatch.setattr(runs, "judge", lambda reply, prompt: bool(reply))
    plan = replace(PLAN, analyses=("retrieval",), heads="", k=5, check_needles=4, explore=0)
    found = Run.open(tmp_path / "run", plan, truth.model, tokenizer).finish(progress=False)
    taken = found.causal.outcomes[1].condition.heads if found.causal else ()
    scores = found.scores["retrieval"]
    assert truth.head in taken
    assert len(taken) < 5
    assert all(scores[head] > 0 for head in taken)
    assert next(iter(found.views[0].weights)) == str(Head(*truth.head))


KEYED = replace(PLAN, analyses=("razor_induction", "razor_echo", "key_selectors"), heads="", texts=2, explore=0)


@pytest.fixture(scope="module")
def keyed(model, tokenizer, tmp_path_factory):
    """A run with key selectors, made in one go."""
    folder = tmp_path_factory.mktemp("keyed") / "run"
    return folder, Run.open(folder, KEYED, model, tokenizer).finish(progress=False)


def test_key_selectors_are_made_of_the_scores_that_the_run_has(keyed, model, tokenizer):
    folder, found = keyed
    assert found.keys is not None
    assert found.keys.tasks == ("needle", "repeated tokens", "new facts")
    assert found.keys.selectors == ("random", "StreamingLLM", "SnapKV", "Task-KV", "RazorAttention")
    assert [len(point.right) for point in found.keys.points] == [2] * (3 * (1 + 5 * 4))
    # the same by hand, from the run's own scores and prompts
    asked = key_tasks(KEYED, tokenizer)
    again = key_curve(model, asked[1:2], selectors_of(found.scores), batch_size=KEYED.batch_size)
    assert [p for p in found.keys.points if p.task == "repeated tokens"] == list(again.points)
    stored = read_manifest(folder)["prompts"]
    assert {task.whole.fingerprint() for task in asked} == {
        value for name, value in stored.items() if name.startswith("key_selectors, ")
    }
    # needles other than those that retrieval scores heads on
    scored = studies(replace(KEYED, analyses=("retrieval",), needles=8, length=PLAN.length), tokenizer)[0].prompts
    stated = {prompt.meta["answer"] for prompt in scored}
    assert stated
    for context, rest in zip(asked[0].contexts, asked[0].rest, strict=True):
        assert not any(answer in tokenizer.decode([*context.ids, *rest]) for answer in stated)


def test_a_model_of_windows_alone_is_refused_before_a_run_with_key_selectors_begins(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="every layer of this model has a window"):
        Run.open(tmp_path / "run", KEYED, families.make("mistral"), tokenizer)
    assert not (tmp_path / "run").exists()


def test_key_selectors_go_on_task_by_task(keyed, model, tokenizer, tmp_path, monkeypatch):
    folder, found = keyed
    torn, asked = tmp_path / "torn", []
    shutil.copytree(folder, torn)
    (torn / "cells" / "keys-1-repeated-tokens.json").unlink()
    (torn / "cells" / "keys-2-new-facts.json").write_text("{")
    part = findings(torn).keys
    assert part is not None
    assert part.tasks == ("needle",)
    monkeypatch.setattr(runs, "key_curve", lambda model, tasks, *rest, **settings: (
        asked.extend(task.name for task in tasks), key_curve(model, tasks, *rest, **settings))[1])  # fmt: skip
    assert Run.open(torn, KEYED, model, tokenizer).finish(progress=False).keys == found.keys
    assert asked == ["repeated tokens", "new facts"]


def test_key_selectors_stand_alone_and_say_so(model, tokenizer, tmp_path):
    plan = replace(KEYED, analyses=("key_selectors",), texts=1)
    found = Run.open(tmp_path / "run", plan, model, tokenizer).finish(progress=False)
    assert not found.scores
    assert found.keys is not None
    assert found.keys.selectors == ("random", "StreamingLLM", "SnapKV", "Task-KV")
    assert found.seconds > 0
    said = told(found)
    assert "key selectors, mean over needle, repeated tokens, new facts" in said
    assert str(found.keys).splitlines()[-1] in said
    rows = data(found)["key_selectors"]["rows"]
    assert len(rows) == 1 + 4 * 4
    assert rows[0]["mean"] == found.keys.at("whole", 1.0)[0]
    page = render(found)
    assert 'id="keys"' in page
    assert 'id="a1"' not in page


def test_prompts_of_key_selectors_are_checked_before_anything_is_computed(model, tokenizer, tmp_path):
    with pytest.raises(PromptError, match="context of this model is 2,048"):
        Run.open(tmp_path / "run", replace(KEYED, analyses=("key_selectors",), length=3000), model, tokenizer)
    own = check_prompts(PLAN, tokenizer)
    with pytest.raises(UsageError, match="key_selectors takes prompts made for it"):
        Run.open(tmp_path / "run", replace(KEYED, analyses=("sinks", "key_selectors")), model, tokenizer, own)
    assert not (tmp_path / "run").exists()


def test_the_cost_of_key_selectors_counts_every_continuation(keyed, model, tokenizer):
    _, found = keyed
    lines = {line.name: line for line in estimate(KEYED, model, tokenizer).lines}
    for task in key_tasks(KEYED, tokenizer):
        line = lines[f"keys, {task.name}"]
        points = sum(point.task == task.name for point in found.keys.points)
        assert line.tokens == sum(task.contexts.lengths) + points * sum(map(len, task.rest))
        assert line.forwards == 1 + points


def test_plans_say_what_is_wrong():
    assert parse_analyses("sinks, previous-token") == ("previous_token", "sinks")
    assert parse_analyses("all") == Plan().analyses
    assert parse_analyses("long,sinks")[:2] == ("retrieval", "sinks")
    assert {"qrhead", "duo_gates", "task_kv"} < set(parse_analyses("long"))
    assert set(parse_analyses("long")) < set(parse_analyses("every"))
    assert parse_analyses("duo") == ("duo_gates",)
    assert parse_analyses("key-selectors,sinks") == ("sinks", "key_selectors")
    assert "key_selectors" in parse_analyses("every")
    assert "key_selectors" not in parse_analyses("all,long")
    with pytest.raises(UsageError, match=r"^joint shows heads that others find"):
        Plan(analyses=("qk_projection", "key_selectors"))
    assert parse_analyses("patching,importance,retrieval") == (
        "retrieval",
        "gradient_importance",
        "activation_patching",
    )
    with pytest.raises(UsageError, match="safety stands alone"):
        parse_analyses("safety,sinks")
    with pytest.raises(UsageError, match="ships do not exist"):
        Plan(analyses=("ships",))
    with pytest.raises(UsageError, match="'speed' does not exist: take some of retrieval"):
        parse_analyses("speed")
    with pytest.raises(UsageError, match="draws=0: give at least 1"):
        Plan(draws=0)


def test_the_cost_counts_what_will_run(model, tokenizer):
    cost = estimate(PLAN, model, tokenizer)
    looking = [name for name in PLAN.analyses if name != "retrieval"]
    pairs = [part for name in looking for part in (name, f"{name}, out")]
    assert [line.name for line in cost.lines] == ["retrieval", *pairs, "causal check", "explorer"]
    assert cost.lines[-2].forwards == 6 * 2
    # as loaded, the top heads, two draws of two kinds: of two batches
    assert cost.lines[2].forwards == 6 * 2
    assert cost.lines[1].tokens == 3 * (2 * 12 + (tokenizer.bos_token_id is not None))
    assert "in all" in str(cost)
    assert cost.to_dict()["tokens"] == cost.tokens


def test_a_model_without_a_bridge_says_why_what_heads_write_is_missing(tokenizer, tmp_path):
    model = tiny_chat_model.model()
    model.__class__ = type("Unheard", (type(model),), {})
    found = Run.open(tmp_path / "run", replace(PLAN, analyses=("sinks",)), model, tokenizer).finish(progress=False)
    assert found.written is None
    assert "cannot bridge Unheard" in found.missing["written"]
    page = make_report(found, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "What heads write is not shown: transformer-lens cannot bridge Unheard" in page


def test_where_there_is_a_bridge_nothing_is_missing(whole, tmp_path):
    _, found = whole
    assert found.written is not None
    assert found.missing == {}
    assert "is not shown" not in make_report(found, tmp_path / "r.html").read_text(encoding="utf-8")
