"""The command line as a user meets it: exit codes, one-sentence errors, nothing half-written, JSON that parses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny_chat_model

import interp
from interp.runs import Run

SMALL = [
    *("--needles", "2", "--length", "700", "--texts", "2", "--text-length", "40", "--heads", "L0H1"),
    *("--draws", "1", "--check-needles", "2", "--check-length", "700", "--batch-size", "2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_chat_model.folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run folder made by the command."""
    out = tmp_path_factory.mktemp("runs") / "run"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from interp.cli import main; main()", "score", "retrieval,sinks", folder]
    done = subprocess.run([*command, "--out", str(out), *SMALL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"interp {interp.__version__}\n")
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in ("doctor", "score", "report", "show"))
    assert call("score", "--help")[0] == 0


def test_score_show_and_report(call, finished, tmp_path):
    code, out, _ = call("show", finished, "--json", "--top", 3)
    shown = json.loads(out)
    assert code == 0
    assert set(shown["scores"]) == {"retrieval", "sinks"}
    assert len(shown["scores"]["sinks"]["top"]) == 3
    code, out, _ = call("show", finished)
    assert code == 0
    assert "sinks: share of attention, 2 prompts counted" in out
    code, out, _ = call("report", finished, "-o", tmp_path / "r.html")
    assert code == 0
    assert out.strip() == str(tmp_path / "r.html")
    assert "sinks" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_importance_stands_beside_random_heads(call, folder, tmp_path):
    run = tmp_path / "run"
    small = ["--texts", 3, "--text-length", 40, "--top", 3, "--draws", 1]
    code, out, err = call("score", "gradient_importance", folder, "--out", run, *small)
    assert code == 0, err
    assert "importance, heads zeroed" in out
    assert "random by layer" in out
    code, out, _ = call("show", run, "--json")
    points = json.loads(out)["controls"]["gradient_importance"]["points"]
    assert [point["size"] for point in points if point["ranking"] == "gradient_importance"] == [1, 3]
    assert call("report", run, "-o", tmp_path / "r.html")[0] == 0
    assert "which flatters the heads" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_importance_and_influence(call, folder, tmp_path):
    run = tmp_path / "run"
    small = ["--texts", 3, "--text-length", 40, "--heads", "L0H1, L1H2", "--no-check", "--draws", 2]
    code, out, err = call("score", "importance,influence", folder, "--out", run, *small)
    assert code == 0, err
    assert "importance: loss per gate, 3 prompts counted" in out
    assert "influence of 2 heads on documents" in out
    code, out, _ = call("show", run, "--json")
    assert len(json.loads(out)["influence"]["documents"]) == 3
    assert call("report", run, "-o", tmp_path / "r.html")[0] == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Influence on documents" in page
    assert "Importance: score of each head" in page


def test_key_selectors_need_no_scores(call, folder, tmp_path):
    run = tmp_path / "run"
    code, out, err = call("score", "key-selectors", folder, "--out", run, "--texts", 1, "--length", 700)
    assert code == 0, err
    assert "key selectors, mean over needle, repeated tokens, new facts" in out
    code, out, _ = call("show", run)
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["whole", *["random"] * 4]
    assert call("report", run, "-o", tmp_path / "r.html")[0] == 0
    assert "With every key the model gets" in (tmp_path / "r.html").read_text(encoding="utf-8")
    # named where options are explained
    assert "key_selectors" in call("score", "--help")[1]


def test_scoring_again_changes_nothing(call, folder, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}
    code, _, _ = call("score", "retrieval,sinks", folder, "--out", finished, *SMALL)
    assert code == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}


def test_dry_run_prints_the_cost_and_writes_nothing(call, folder, tmp_path):
    code, out, _ = call("score", "all", folder, "--out", tmp_path / "run", "--dry-run", *SMALL)
    assert code == 0
    assert "causal check" in out
    assert "in all" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = call("score", "sinks", folder, "--out", tmp_path / "run", "--dry-run", "--json", *SMALL)
    assert json.loads(out)["lines"][0]["prompts"] == 2


def test_doctor(call, folder):
    code, out, _ = call("doctor", folder)
    assert code == 0, out
    code, out, _ = call("doctor", folder, "--json")
    assert json.loads(out)["checks"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


BAD = {
    "no such folder": (lambda t, f, r: ["score", "sinks", t / "nowhere", "--out", t / "x"], "nowhere"),
    "pickled weights": (lambda t, f, r: ["score", "sinks", pickled(t, f), "--out", t / "x"], "pickle"),
    "no such analysis": (lambda t, f, r: ["score", "speed", f, "--out", t / "x"], "'speed' does not exist"),
    "pairs of one's own": (
        lambda t, f, r: ["score", "patching", f, "--out", t / "x", "--prompts", write(t / "p.txt", "hello")],
        "takes prompts made for it",
    ),
    "documents of one's own": (
        lambda t, f, r: ["score", "qrhead", f, "--out", t / "x", "--prompts", write(t / "p.txt", "hello")],
        "takes prompts made for it",
    ),
    "gates without a step": (lambda t, f, r: ["score", "duo", f, "--out", t / "x", "--steps", "0"], "steps=0: give at"),
    "views of no heads": (
        lambda t, f, r: ["score", "qk_projection", f, "--out", t / "x"],
        "add an analysis, or name heads",
    ),
    "names in pieces": (
        lambda t, f, r: ["score", "path_patching", f, "--out", t / "x"],
        "are single tokens",
    ),
    "selectors on prompts of one's own": (
        lambda t, f, r: ["score", "key-selectors", f, "--out", t / "x", "--prompts", write(t / "p.txt", "hello")],
        "key_selectors takes prompts made for it",
    ),
    "selectors on too short a text": (
        lambda t, f, r: ["score", "key-selectors", f, "--out", t / "x", "--length", 40],
        "length 40 is too short",
    ),
    "selectors on too long a text": (
        lambda t, f, r: ["score", "key-selectors", f, "--out", t / "x", "--length", 3000],
        "context of this model is 2,048",
    ),
    "influence of nothing": (
        lambda t, f, r: ["score", "influence", f, "--out", t / "x"],
        "add retrieval to the analyses",
    ),
    "no refusals": (
        lambda t, f, r: ["safety", f, "--out", t / "x", "--harmful", 8, "--harmless", 8, "--reply", 2],
        "no behaviour to attribute",
    ),
    "no such file of requests": (
        lambda t, f, r: ["score", "safety", f, "--out", t / "x", "--prompts", t / "none.csv"],
        "cannot be read as a CSV file",
    ),
    "sizes in words": (
        lambda t, f, r: ["safety", f, "--out", t / "x", "--sizes", "some"],
        "give whole numbers",
    ),
    "empty prompts": (
        lambda t, f, r: ["score", "sinks", f, "--out", t / "x", "--prompts", write(t / "p.txt", "\n")],
        "holds no prompts",
    ),
    "span not found": (
        lambda t, f, r: ["score", "sinks", f, "--out", t / "x", "--prompts", lost(t)],
        "is not in",
    ),
    "prompt too long": (
        lambda t, f, r: ["score", "sinks", f, "--out", t / "x", "--prompts", write(t / "p.txt", "a" * 3000)],
        "context of this model is 2,048",
    ),
    "no answer span": (
        lambda t, f, r: [
            "score",
            "retrieval",
            f,
            "--out",
            t / "x",
            "--no-check",
            "--prompts",
            write(t / "p.txt", "hello"),
        ],
        'has no span "answer"',
    ),
    "head out of range": (
        lambda t, f, r: ["score", "sinks", f, "--out", t / "x", *SMALL, "--heads", "L9H0"],
        "layer 9 of a 2-layer model",
    ),
    "unwritable output": (lambda t, f, r: ["report", r, "-o", t / "none" / "r.html"], "not a folder you may write to"),
    "output is a folder": (lambda t, f, r: ["report", r, "-o", t], "is a folder"),
    "run of another model": (
        lambda t, f, r: ["score", "retrieval,sinks", tiny_chat_model.folder(t / "m", seed=1), "--out", r, *SMALL],
        "holds a run of",
    ),
    "run of other settings": (
        lambda t, f, r: ["score", "retrieval,sinks", f, "--out", r, *SMALL, "--seed", 3],
        "seed was 0, now 3",
    ),
    "scores of another model": (
        lambda t, f, r: [
            "show",
            r / "cells" / "sinks-0000.scores.json",
            "--model",
            tiny_chat_model.folder(t / "m", seed=1),
        ],
        "weights",
    ),
    "no score file": (lambda t, f, r: ["show", write(t / "s.json", "{}")], "s.json"),
    "not a run": (lambda t, f, r: ["show", t], "is no run folder"),
    "no such option": (lambda t, f, r: ["score", "sinks", f, "--out", t / "x", "--fast"], "--fast"),
    "bad number": (lambda t, f, r: ["score", "sinks", f, "--out", t / "x", "--texts", "0"], "texts=0"),
}


def pickled(tmp_path, folder):
    place = tmp_path / "pickled"
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(folder, name), place)
    (place / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return place


def lost(tmp_path):
    rows = {"text": "a cat sat on the mat", "spans": {"where": "on the hat"}}
    return write(tmp_path / "p.jsonl", json.dumps(rows))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(call, folder, finished, tmp_path, case):
    make, text = BAD[case]
    arguments = make(tmp_path, folder, finished)
    before = {p for p in tmp_path.rglob("*") if "cells" in p.parts}
    code, out, err = call(*arguments)
    assert code == 2, err
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert not out
    assert {p for p in tmp_path.rglob("*") if "cells" in p.parts and p.is_file()} == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_ctrl_c_is_130_and_says_how_to_go_on(call, folder, tmp_path, monkeypatch):

    def stopped(self, study, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_score", stopped)
    code, _, err = call("score", "sinks", folder, "--out", tmp_path / "run", *SMALL)
    assert code == 130
    assert "goes on where it stood" in err


def test_what_nobody_foresaw_is_still_no_traceback(call, folder, tmp_path, monkeypatch):

    def broken(self, study, batch):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Run, "_score", broken)
    code, _, err = call("score", "sinks", folder, "--out", tmp_path / "run", *SMALL)
    assert code == 1
    assert "ZeroDivisionError: by zero" in err
    assert "Traceback" not in err
