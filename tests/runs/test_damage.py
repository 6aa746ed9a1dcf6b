"""Damaged, foreign and unfinished run folders: a change is reported or harmless."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import run_cases
import torch
from run_cases import difference, outcome, unfinish

from interp.analyses.results import codec
from interp.analyses.results.files import Parts, pack, seal, unpack
from interp.errors import RunError, ScoreError
from interp.runs import lock
from interp.runs.results import cell_files, is_finished, read_results, record_path, result_path
from interp.runs.run import Run
from interp.runs.stage import CellRecord

SECONDS = float(os.environ.get("INTERP_DAMAGE_SECONDS", "60"))
"""time of the test of single bytes; by hand: INTERP_DAMAGE_SECONDS=3600 pytest -m slow -s -o timeout=9999 ..."""

ROOT = Path(__file__).resolve().parents[2]
PLAN = run_cases.score_plan("previous_token", "sinks", check=False, heads="")


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != lock.LOCK)


def flipped(place):
    def change(path, other):
        data = bytearray(path.read_bytes())
        at = random.Random(f"{place}/{path.name}/{path.parent.name}").randrange(len(data))
        data[at] ^= 1 << place % 8
        path.write_bytes(bytes(data))

    return change


def digit(place):
    """One digit of a number becomes another, so that the file stays what it is."""

    def change(path, other):
        data = bytearray(path.read_bytes())
        digits = [i for i, byte in enumerate(data) if byte in b"0123456789"]
        at = random.Random(f"{place}/{path.name}").choice(digits)
        data[at] = ord(str((int(chr(data[at])) + 1) % 10))
        path.write_bytes(bytes(data))

    return change


def linked(path, other):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def piped(path, other):
    path.unlink()
    os.mkfifo(path)


def foldered(path, other):
    path.unlink()
    path.mkdir()


CHANGES = {
    "deleted": lambda path, other: path.unlink(),
    "emptied": lambda path, other: path.write_bytes(b""),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-9]),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\n{}"),
    "an empty object": lambda path, other: path.write_bytes(b"{}"),
    "of another run": lambda path, other: path.write_bytes(other.read_bytes()),
    "a link": linked,
    "a pipe": piped,
    "a folder": foldered,
    **{f"bit {place}": flipped(place) for place in range(12)},
    **{f"digit {place}": digit(place) for place in range(6)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_one_file_is_told_or_harmless(made, tmp_path, change):
    folder, other, found = made
    reported = 0
    for number, path in enumerate(files_of(folder)):
        place = shutil.copytree(folder, tmp_path / str(number))
        inside = path.relative_to(folder)
        CHANGES[change](place / inside, other / inside)
        said = outcome(place, found)
        assert said in ("reported", "harmless"), f"{inside}: {said}"
        reported += said == "reported"
    assert reported or change.startswith(("bit", "digit"))


@pytest.mark.slow
def test_every_single_byte_is_told_or_harmless(made, tmp_path):
    """The lowest bit of a byte of each file in turn, in a random order, until all were changed or the time is over."""
    folder, _, found = made
    place = shutil.copytree(folder, tmp_path / "run")
    contents = {path: path.read_bytes() for path in files_of(place)}
    rng = random.Random(0)
    orders = {path: rng.sample(range(len(data)), len(data)) for path, data in contents.items()}
    longest = max(map(len, orders.values()))
    places = ((path, order[turn]) for turn in range(longest) for path, order in orders.items() if turn < len(order))
    end, tried = time.monotonic() + SECONDS, 0
    for path, at in places:
        data = contents[path]
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        said = outcome(place, found)
        assert said in ("reported", "harmless"), f"byte {at} of {path}: {said}"
        path.write_bytes(data)
        tried += 1
        if time.monotonic() > end:
            break
    print(f"{tried} of {sum(map(len, contents.values()))} bytes in {len(contents)} files changed")
    assert tried >= 2 * len(contents)


@pytest.mark.parametrize(
    "change", ["deleted", "cut", "an empty object", "of another run", "bit 1", "digit 2", "a pipe"]
)
def test_the_same_command_makes_it_again_or_refuses(made, model, tokenizer, tmp_path, change):
    folder, other, found = made
    for number, path in enumerate(files_of(folder)):
        place = shutil.copytree(folder, tmp_path / str(number))
        inside = path.relative_to(folder)
        CHANGES[change](place / inside, other / inside)
        try:
            again = Run.open(place, PLAN, model, tokenizer).finish(progress=False)
        except RunError:
            continue
        assert not difference(again.results, found.results, f"{inside}"), inside
        assert is_finished(place)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"format": "interp.run/3"}', b"deleted"])
def test_without_its_manifest_a_run_is_made_again_in_another_folder(copy, model, tokenizer, content):
    """Deleting the manifest would not help: the other files could be those of any run."""
    manifest = copy / "manifest.json"
    manifest.write_bytes(content)
    if content == b"deleted":
        manifest.unlink()
    for refused in (lambda: read_results(copy), lambda: Run.open(copy, PLAN, model, tokenizer)):
        with pytest.raises(RunError) as caught:
            refused()
        assert "delete it" not in str(caught.value)
        assert "run again in another folder" in str(caught.value) or "run folder" in str(caught.value)


STRAYS = ["cells/sinks/0007.json", "cells/sinks/0000.txt", "cells/speed/0000.json", "results/mine.json",
          "results/mine.safetensors", "stages/speed.json", "cells/sinks/deep/0000.json"]  # fmt: skip


@pytest.mark.parametrize("stray", STRAYS)
def test_files_that_the_manifest_does_not_list_are_refused(made, copy, model, tokenizer, stray):
    path = copy / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(copy / "cells" / "sinks" / "0000.json", path)
    for refused in (lambda: read_results(copy), lambda: Run.open(copy, PLAN, model, tokenizer).finish(progress=False)):
        with pytest.raises(RunError, match=r"is not a file of the run in .*; remove it"):
            refused()
    path.unlink()
    assert outcome(copy, made[2]) == "harmless"


def test_files_of_the_user_and_of_the_system_are_left_alone(made, copy):
    for name in ("report.html", "notes.txt", "cells/.DS_Store", "results/._sinks.json", "mine/x.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    assert outcome(copy, made[2]) == "harmless"


# case -> whether the file is of the other run, and its path
FOREIGN = {
    "of another run": (True, "cells/sinks/0001.json"),
    "of another place": (False, "cells/sinks/0000.json"),
    "of another stage": (False, "cells/previous_token/0001.json"),
    "no cell": (False, "results/previous_token.json"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("whole", [True, False])
def test_cells_that_belong_elsewhere_are_refused(made, copy, model, tokenizer, case, whole):
    """Both files of a cell, so that all checksums are right."""
    if not whole:
        unfinish(copy)
    of_other, inside = FOREIGN[case]
    source = made[1 if of_other else 0] / inside
    for path in source.parent.glob(f"{source.stem}.*"):
        shutil.copy(path, copy / "cells/sinks" / f"0001{path.suffix}")
    stray_tensors = copy / "cells/sinks/0001.safetensors"
    if not source.with_suffix(".safetensors").exists():
        stray_tensors.unlink(missing_ok=True)
    with pytest.raises(RunError, match="is not the file that the run wrote" if whole else "belongs to another run"):
        read_results(copy)
    with pytest.raises(RunError, match=r"belongs to another run or to another place in this one; remove it"):
        Run.open(copy, PLAN, model, tokenizer).finish(progress=False)


def test_records_and_results_of_another_run_are_refused(made, copy):
    shutil.copy(record_path(made[1], "sinks"), record_path(copy, "sinks"))
    with pytest.raises(RunError, match="belongs to another run"):
        read_results(copy)
    shutil.copy(record_path(made[0], "sinks"), record_path(copy, "sinks"))
    for path in (made[1] / "results").glob("sinks.*"):
        shutil.copy(path, copy / "results" / path.name)
    with pytest.raises(RunError, match="is not the file that the run wrote; run the same command"):
        read_results(copy)


def test_an_unfinished_run_counts_its_cells(made, copy):
    unfinish(copy)
    assert read_results(copy).unfinished == {"sinks": (2, 2)}
    cell = cell_files(copy, "sinks") / "0001.json"
    cell.unlink()
    found = read_results(copy)
    assert found.unfinished == {"sinks": (1, 2)}
    assert len(found["sinks"].per_prompt) == 2
    assert "1 of 2 cells of 1 stages" in found.progress
    cell.write_text("{")
    with pytest.raises(RunError, match=r"0001\.json is not JSON .* run the same command"):
        read_results(copy)


def test_a_manifest_that_was_changed_is_refused(made, copy):
    path = copy / "manifest.json"
    stored = json.loads(path.read_text())
    for entry, value in (("own_prompts", True), ("plan", {}), ("interp", "9"), ("stages", [])):
        path.write_text(json.dumps(stored | {entry: value}))
        with pytest.raises(RunError, match="was changed or damaged after it was written"):
            read_results(copy)
    # one that is made to fit its checksum leads to no other folder and to no traceback
    for entry, value in (
        ("stages", [{"name": "../../x", "shown": True, "cells": ["0000"]}]),
        ("stages", [{"name": "sinks", "shown": True, "cells": ["/etc/passwd"]}]),
        ("stages", ["sinks"]),
        ("run", 3),
        ("plan", None),
    ):
        path.write_text(json.dumps(seal(stored | {entry: value})))
        with pytest.raises(RunError, match="has no usable"):
            read_results(copy)


def test_a_result_file_that_was_changed_is_refused(copy):
    path = result_path(copy, "sinks")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(ScoreError, match="was changed or damaged after it was written"):
        codec.load(path)


CHANGED = {
    "a number": lambda path: path.write_bytes(pack({"x": torch.tensor([1.0, 3.0])}, "other")),
    "another name": lambda path: path.rename(path.with_name("new")) and path.with_name("new").rename(path),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "no checksum": lambda path: path.write_bytes(_plain()),
}


def _plain():
    from safetensors.torch import save

    return save({"x": torch.ones(2)})


@pytest.mark.parametrize("case", CHANGED)
def test_steps_that_were_changed_are_refused(tmp_path, case):
    parts = Parts.of(tmp_path, "sweep", {"a": 1})
    tensors = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "y": torch.ones(1).bfloat16()}
    parts.get(1, lambda: tensors)
    again = parts.get(1, dict)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    (path,) = tmp_path.iterdir()
    CHANGED[case](path)
    if case == "another name":
        assert unpack(path).keys() == tensors.keys()
        return
    with pytest.raises(ScoreError, match=r"is broken .*; delete it and run again"):
        parts.get(1, dict)


def test_steps_of_two_pieces_cannot_be_swapped(tmp_path):
    parts = Parts.of(tmp_path, "sweep", {"a": 1})
    parts.get(1, lambda: {"x": torch.ones(1)})
    (first,) = tmp_path.iterdir()
    parts.get(2, lambda: {"x": torch.zeros(1)})
    (second,) = set(tmp_path.iterdir()) - {first}
    shutil.copy(second, first)
    with pytest.raises(ScoreError, match="its checksum differs"):
        parts.get(1, dict)


def test_results_that_are_steps_cannot_be_swapped(tmp_path):
    first, second = (codec.save(CellRecord(None, float(n)), tmp_path / f"step-{n}", is_step=True) for n in (1, 2))
    assert codec.load(first).seconds == 1
    shutil.copy(second, first)
    with pytest.raises(ScoreError, match="was renamed, and is a step"):
        codec.load(first)
    # a result that a user renames is read
    mine = codec.save(CellRecord(None, 3.0), tmp_path / "mine").rename(tmp_path / "yours.json")
    assert codec.load(mine).seconds == 3
