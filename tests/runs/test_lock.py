"""One process at a time writes to the folder of a run, and nothing of another process stays in it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import run_cases
from run_cases import difference, outcome, unfinish

from interp.errors import RunError
from interp.runs import folder as folders
from interp.runs import lock
from interp.runs.lock import only_writer
from interp.runs.results import cell_files
from interp.runs.run import Run

ROOT = Path(__file__).resolve().parents[2]
PLAN = run_cases.score_plan("previous_token", "sinks", check=False, heads="")


def test_one_writer_at_a_time(made, copy, model, tokenizer, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    run = Run.open(copy, PLAN, model, tokenizer)
    with only_writer(copy):
        for refused in (lambda: Run.open(copy, PLAN, model, tokenizer), lambda: run.finish(progress=False)):
            with pytest.raises(RunError, match="another process is writing to the run in"):
                refused()
        # reading needs no lock
        assert outcome(copy, made[2]) == "harmless"
    assert not difference(run.finish(progress=False).results, made[2].results)


HOLD = """
import sys, time
from pathlib import Path
from interp.runs.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_ends_with_its_process(copy, model, tokenizer, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(copy)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match="another process is writing"):
        Run.open(copy, PLAN, model, tokenizer)
    process.send_signal(signal.SIGKILL)
    process.wait()
    Run.open(copy, PLAN, model, tokenizer).finish(progress=False)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / lock.LOCK).symlink_to("victim")
    with pytest.raises(RunError, match="cannot be opened"), only_writer(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "kept"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(number, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks"), only_writer(tmp_path):
        pass


def test_a_run_that_began_since_the_folder_was_looked_at_is_compared(made, tmp_path, monkeypatch):
    """The other process writes its manifest after this one found none: the message names what differs."""
    place, looked = tmp_path / "run", []
    manifests = []
    for folder in made[:2]:
        stored = folders.read_manifest(folder)
        manifests.append({name: stored[name] for name in stored if name not in ("run", "sha256", "format")})
    claim = folders.claim

    def late(folder):
        if not looked:
            looked.append(folder)
            folders.begin(place, manifests[0])
        claim(folder)

    monkeypatch.setattr(folders, "claim", late)
    with pytest.raises(RunError, match="differs in its sizes"):
        folders.begin(place, manifests[1])
    assert folders.read_manifest(place)["plan"] == manifests[0]["plan"]


def test_forty_simultaneous_starts_of_two_plans_mix_nothing(made, tmp_path):
    manifests = []
    for folder in made[:2]:
        stored = folders.read_manifest(folder)
        manifests.append({name: stored[name] for name in stored if name not in ("run", "sha256", "format")})
    for number in range(40):
        place, begun, barrier = tmp_path / str(number), {}, threading.Barrier(2)

        def start(i, place=place, begun=begun, barrier=barrier):
            barrier.wait()
            try:
                begun[i] = folders.begin(place, manifests[i])
            except RunError as error:
                begun[i] = error

        threads = [threading.Thread(target=start, args=(i,)) for i in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        won = [i for i in (0, 1) if isinstance(begun[i], str)]
        assert len(won) == 1, begun
        assert "differs in" in str(begun[1 - won[0]])
        stored = folders.read_manifest(place)
        assert stored["run"] == begun[won[0]]
        assert stored["plan"] == manifests[won[0]]["plan"]


def test_a_folder_that_was_replaced_is_not_written_to(copy, model, tokenizer):
    run = Run.open(copy, PLAN, model, tokenizer)
    shutil.rmtree(copy)
    other = replace(PLAN, batch_size=3)
    Run.open(copy, other, model, tokenizer)
    with pytest.raises(RunError, match="was replaced by another run"):
        run.finish(progress=False)
    assert not (copy / "cells").exists()


def test_a_folder_that_is_replaced_in_between_is_not_written_to(copy, model, tokenizer, monkeypatch):
    unfinish(copy)
    shutil.rmtree(cell_files(copy, "sinks"))
    run, make = Run.open(copy, PLAN, model, tokenizer), Run._cell

    def replaced(self, stage, cell):
        if copy.exists() and self.run == folders.read_manifest(copy)["run"]:
            shutil.rmtree(copy)
            Run.open(copy, replace(PLAN, batch_size=3), model, tokenizer)
        return make(self, stage, cell)

    monkeypatch.setattr(Run, "_cell", replaced)
    with pytest.raises(RunError, match="was replaced by another run"):
        run.finish(progress=False)
    assert not list(copy.rglob("cells/*/*"))


def test_hidden_files_of_killed_writers_are_swept(made, copy, model, tokenizer):
    (copy / "steps" / "sinks").mkdir(parents=True, exist_ok=True)
    left = [place / f".x.json.{'a' * 16}.tmp" for place in (copy, copy / "cells" / "sinks", copy / "results",
                                                            copy / "stages", copy / "steps" / "sinks")]  # fmt: skip
    for path in left:
        path.write_bytes(b"half")
    assert outcome(copy, made[2]) == "harmless"
    Run.open(copy, PLAN, model, tokenizer)
    assert not [path for path in left if path.exists()]


def test_a_folder_of_something_else_gets_no_lock(model, tokenizer, tmp_path):
    for name, content in (("manifest.json", '{"name": "an app"}'), ("mine.txt", "x")):
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        (place / name).write_text(content)
        with pytest.raises(RunError):
            Run.open(place, PLAN, model, tokenizer)
        assert os.listdir(place) == [name]
