"""Every stage of every recipe is killed, continued, broken and made again, with the same results as in one go."""

import shutil
from dataclasses import replace

import pytest
import run_cases
import tiny_chat_model
from run_cases import difference

from interp.analyses import registry
from interp.analyses.results import codec, files
from interp.runs import folder as folders
from interp.runs.results import cell_files, is_finished, read_results, result_path
from interp.runs.run import Run
from interp.testing import planted

# made once for each case: name -> (tokens are words, plan); a plan takes the folder of its input files
SCORES = {
    "answers and views": lambda t: run_cases.score_plan("retrieval", "sinks", "induction"),
    "without checks": lambda t: run_cases.score_plan("previous_token", "positional", check=False),
    "named heads": lambda t: run_cases.score_plan("duplicate_token"),
    "gradients": lambda t: run_cases.score_plan("gradient_importance", "qk_projection"),
    "keys": lambda t: run_cases.score_plan(
        "razor_induction",
        "razor_echo",
        "kv",
        sizes=replace(run_cases.SIZES, n_texts=1),
        heads="",
        settings={"kv": {"keep_ratios": [0.5]}},
    ),
    "replies": lambda t: run_cases.score_plan("lookback", "semantic_retrieval", "retrieval_reasoning", heads=""),
}
STEERS = {
    "profiled": lambda t: run_cases.steer_plan(run_cases.items_file(t / "mine.jsonl")),
    "tuned": lambda t: run_cases.steer_plan(run_cases.items_file(t / "mine.jsonl"), "zerotuning"),
    "named": lambda t: run_cases.steer_plan(run_cases.items_file(t / "mine.jsonl"), heads="L0H1"),
}
SAFETY = {"refusals": lambda t: run_cases.safety_plan(run_cases.requests_file(t / "requests.csv"))}
WORDS = ("activation_patching", "path_patching", "attribution_patching", "logit_attribution", "function_vectors",
         "concept_induction", "attention_tracker", "qk_score", "context_entropy", "qrhead", "task_kv",
         "duo_gates")  # fmt: skip
CASES = [*SCORES, *STEERS, *SAFETY]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(case) -> (open(folder) -> Run, folder of the run made in one go, its results)."""
    kept = {}

    def get(case):
        if case not in kept:
            place = tmp_path_factory.mktemp("case")
            plan = (SCORES | STEERS | SAFETY)[case](place)
            model, tokenizer = (
                (planted.refusing(0, "llama").model, run_cases.refusing_tokenizer())
                if case in SAFETY
                else (tiny_chat_model.model(), tiny_chat_model.tokenizer())
            )

            def start(folder):
                return Run.open(folder, plan, model, tokenizer)

            kept[case] = start, place / "whole", start(place / "whole").finish(progress=False)
        return kept[case]

    return get


def same(one, other):
    assert not difference(one.results, other.results, "results")
    assert one.texts == other.texts
    assert one.missing == other.missing


def cells_of(folder):
    return {str(path.relative_to(folder)) for path in (folder / "cells").rglob("*.json")}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_every_cell_no_finished_cell_is_made_again(made, case, tmp_path, monkeypatch):
    """Each start may finish one cell; the next one is killed once it has its numbers, before they are written."""
    start, folder, found = made(case)
    make, finished, allowed = Run._cell, [], [0]

    def watched(self, stage, cell):
        def work(steps):
            result = cell.work(steps)
            if not allowed[0]:
                raise KeyboardInterrupt
            allowed[0] -= 1
            finished.append(f"{stage.name}/{cell.key}")
            return result

        return make(self, stage, replace(cell, work=work))

    monkeypatch.setattr(Run, "_cell", watched)
    for _ in range(200):
        allowed[0] = 1
        try:
            again = start(tmp_path / "killed").finish(progress=False)
            break
        except KeyboardInterrupt:
            continue
    same(found, again)
    assert len(finished) == len(set(finished))
    assert cells_of(folder) == cells_of(tmp_path / "killed")
    assert len(finished) == len(cells_of(folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_write_it_ends_with_the_same_results(made, case, tmp_path, monkeypatch):
    """Before and after a file is there: those of the manifest, cells, results, records and steps inside of a cell."""
    start, folder, found = made(case)
    write, left = files.write_atomic, []

    def dying(path, data, *error, **settings):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(path, data, *error, **settings)
        if not left:
            raise KeyboardInterrupt
        return path

    for module in (files, codec, folders):
        monkeypatch.setattr(module, "write_atomic", dying)
    for starts in range(1, 400):
        left[:] = [None] * (starts % 4)
        try:
            again = start(tmp_path / "killed").finish(progress=False)
            break
        except KeyboardInterrupt:
            continue
    assert starts > 3
    same(found, again)
    assert cells_of(folder) == cells_of(tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["cell", "result"])
@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_is_made_again(made, case, damage, tmp_path):
    """A file of every stage is half-written; of a broken cell its result is gone too."""
    start, folder, found = made(case)
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    for stage in start(folder).stages:
        path = result_path(torn, stage.name)
        if not path.exists():
            continue
        path.write_bytes(path.read_bytes()[:-9])
        if damage == "cell":
            path.unlink()
            cell = sorted(cell_files(torn, stage.name).glob("*.json"))[-1]
            cell.write_text('{"format"')
    assert not is_finished(torn)
    same(found, start(torn).finish(progress=False))


@pytest.mark.parametrize("case", ["answers and views", "keys", "refusals"])
def test_tensors_that_are_cut_are_made_again(made, case, tmp_path):
    start, folder, found = made(case)
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    stored = [*(torn / "cells").rglob("*.safetensors"), *(torn / "results").glob("*.safetensors")]
    assert stored
    for path in stored:
        path.write_bytes(path.read_bytes()[:-7])
    same(found, start(torn).finish(progress=False))


@pytest.mark.parametrize("case", CASES)
def test_a_finished_run_is_read_without_the_model_and_does_no_work(made, case, monkeypatch):
    start, folder, found = made(case)
    same(found, read_results(folder))
    monkeypatch.setattr(Run, "_cell", None)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    same(found, start(folder).finish(progress=False))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def test_the_table_has_every_kind_of_stage(made):
    """Joint, resumable, paired and those that build on others; controls by each measure; views and key selectors."""
    ran = [name for case in SCORES for name in made(case)[0](made(case)[1]).plan.analyses]
    entries = [registry.get(name) for name in ran]
    assert any(entry.resumable for entry in entries)
    assert any(entry.joint for entry in entries)
    assert any(entry.inputs is not None for entry in entries)
    assert {"retrieval.control", "sinks.control", "induction.control"} <= set(made("answers and views")[2]) | set(
        made("answers and views")[2].missing
    )
    assert "heads.control" in made("named heads")[2]
    assert "kv" in made("keys")[2]
    assert "refusals" in made("refusals")[2]
    assert {"steering"} == set(made("profiled")[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_pairs_and_words_continue_on_the_demo_model(demo, name, tmp_path, monkeypatch):
    """Analyses whose prompts need whole words, on the demo model: killed in its second and third cell."""
    model, tokenizer = demo
    # a pair takes one forward pass for each head
    n_pairs = 1 if name in ("activation_patching", "path_patching") else 2
    sizes = replace(run_cases.SIZES, n_pairs=n_pairs, n_texts=2, explorer_tokens=0)
    plan = run_cases.score_plan(name, sizes=sizes, batch_size=1, check=False)
    found = Run.open(tmp_path / "whole", plan, model, tokenizer).finish(progress=False)
    make, left = Run._cell, [0]

    def watched(self, stage, cell):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return make(self, stage, cell)

    monkeypatch.setattr(Run, "_cell", watched)
    for left[0] in (1, 2, 99):
        try:
            again = Run.open(tmp_path / "cut", plan, model, tokenizer).finish(progress=False)
        except KeyboardInterrupt:
            continue
    same(found, again)
