"""The one writer: every output goes through it, over a regular file or none, and is on the disk before it returns."""

import ast
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_results
import torch

import interp
from interp import plots
from interp.analyses.results import codec
from interp.analyses.results import head_list_formats as lists
from interp.analyses.results.files import Parts
from interp.analyses.views.attention_lens import Lens
from interp.errors import InterpError, RunError, UsageError
from interp.hooks import writer
from interp.hooks.writer import check_writable, make_folder, write_atomic
from interp.report import make_report

ROOT = Path(__file__).resolve().parents[2]
TABLE = run_results.table("induction", 1)
EDITS = interp.steer.Temperature(0.5) + interp.steer.ZeroTuning(0.8, heads="L0H1")
# name -> (ending, function that writes to a path)
WRITERS = {
    "edits": (".json", EDITS.save),
    "scores": (".json", TABLE.save),
    "any result": (".json", lambda path: codec.save(run_results.ablation(), path)),
    "lens": (".safetensors", Lens(0, torch.zeros(1, 2, 3), torch.zeros(1, 3), run_results.ORIGIN).save),
    "retrieval heads": (".json", lambda path: lists.write_retrieval_head(TABLE, path)),
    "gates": (".tsv", lambda path: lists.write_duo_attention(TABLE, path, reduce="max")),
    "qrhead": (".yaml", lambda path: lists.write_qrhead(TABLE, path)),
    "compresskv": (".json", lambda path: lists.write_compresskv(TABLE, path)),
    "picture": (".svg", lambda path: plots.save(plots.head_map(TABLE), path)),
    "page of a figure": (".html", lambda path: plots.save(plots.head_map(TABLE), path)),
    "explorer": (".html", lambda path: plots.explorer(run_results.explored()).save(path)),
    "report": (".html", lambda path: make_report(run_results.run({"induction": TABLE}), path)),
}


def pipe(path):
    os.mkfifo(path)


def link(path):
    path.with_name("victim").write_text("kept")
    path.symlink_to("victim")


def dangling(path):
    path.symlink_to("victim")


def link_to_a_device(path):
    path.symlink_to("/dev/null")


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("needs the right to make devices")


def sock(path):
    with socket.socket(socket.AF_UNIX) as made:
        # names of sockets are short
        here = os.getcwd()
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(here)


def folder(path):
    path.mkdir()


TARGETS = {
    "pipe": (pipe, "a named pipe"), "link": (link, "a symbolic link"), "dangling link": (dangling, "a symbolic link"),
    "link to a device": (link_to_a_device, "a symbolic link"), "device": (device, "a device"),
    "socket": (sock, "a socket"), "folder": (folder, "is a folder"),
}  # fmt: skip


def listing(place):
    return {path.name: (os.lstat(path).st_ino, os.lstat(path).st_mode) for path in place.iterdir()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WRITERS)
def test_no_output_is_written_over_what_is_no_regular_file(tmp_path, name, target):
    ending, write = WRITERS[name]
    make, text = TARGETS[target]
    path = tmp_path / f"out{ending}"
    make(path)
    before = listing(tmp_path)
    with pytest.raises(InterpError, match=text) as raised:
        write(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert listing(tmp_path) == before
    assert not (tmp_path / "victim").exists() or (tmp_path / "victim").read_text() == "kept"


@pytest.mark.parametrize("place", ["", "cells/sinks", "results", "stages", "CELLS"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_output_is_written_over_files_of_a_run(tmp_path, name, place):
    ending, write = WRITERS[name]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"format": "interp.run/1"}))
    inside = tmp_path / place
    inside.mkdir(parents=True, exist_ok=True)
    if not place and ending != ".json":
        assert write(tmp_path / f"mine{ending}").stat().st_size
        return
    with pytest.raises(InterpError, match="belongs to the run in"):
        write(inside / ("manifest.json" if not place else f"0000{ending}"))
    # by another way to the same folder
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    with pytest.raises(InterpError, match="belongs to the run in"):
        write(tmp_path.parent / f"{tmp_path.name}-link" / place / ("manifest.json" if not place else f"0000{ending}"))
    assert manifest.read_text() == '{"format": "interp.run/1"}'
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != manifest]


@pytest.mark.parametrize("name", WRITERS)
def test_every_output_replaces_a_file_whole_and_keeps_its_permissions(tmp_path, name, monkeypatch):
    ending, write = WRITERS[name]
    path = tmp_path / f"out{ending}"
    path.write_text("old")
    path.chmod(0o600)
    before, synced, sync = path.stat().st_ino, [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_mode) or sync(number))
    assert write(path) == path
    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # the file, then the folder that names it
    assert [stat.S_ISDIR(mode) for mode in synced[-2:]] == [False, True]
    assert set(os.listdir(tmp_path)) <= {path.name, "out.safetensors"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, name, monkeypatch):
    ending, write = WRITERS[name]
    path = tmp_path / f"out{ending}"
    path.write_text("old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InterpError, match=r"cannot be written \(No space left on device\)"):
        write(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


BAD = {
    "no folder": ("none/x", "is not a folder you may write to"),
    "a file as folder": ("file/x", "is not a folder you may write to"),
    "a name too long": ("x" * 300, "File name too long"),
    "a zero in the name": ("a\0b", "null"),
}


@pytest.mark.parametrize("case", BAD)
def test_places_that_cannot_be_written_are_one_sentence(tmp_path, case):
    name, text = BAD[case]
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match=text):
        write_atomic(tmp_path / name, b"x", UsageError)
    with pytest.raises(UsageError, match=r"null|too long|cannot be made"):
        make_folder(tmp_path / name if case != "no folder" else tmp_path / "file" / "x", UsageError)
    assert os.listdir(tmp_path) == ["file"]


def test_names_up_to_the_longest_are_written(tmp_path):
    for name in ("x" * 255, "\u00e9" * 127, ".hidden", "a b", "-x", "*?[x]"):
        assert write_atomic(tmp_path / name, b"x").read_bytes() == b"x"


def test_a_file_without_permission_to_write_is_left(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("kept")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: place != path and allowed(place, mode))
    with pytest.raises(RunError, match="write-protected"):
        check_writable(path, RunError)


WRITE = """
import os, sys
from interp.hooks.writer import write_atomic
sync = os.fsync
def slow(number):
    print("writing", flush=True)
    sys.stdin.readline()
    sync(number)
os.fsync = slow
write_atomic(sys.argv[1], b"late")
"""


def started(path):
    command = [sys.executable, "-c", WRITE, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def test_a_killed_write_leaves_the_old_file_and_the_next_one_sweeps(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    process = started(path)
    (left,) = tmp_path.glob("*.tmp")
    # a write of the same name does not touch the hidden file of a living process
    write_atomic(path, b"between")
    assert left.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == b"between"
    write_atomic(tmp_path / "y.json", b"another name")
    assert left.exists()
    write_atomic(path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["x.json", "y.json"]
    assert path.read_bytes() == b"new"


def test_two_writers_of_one_name_end_with_one_of_the_two(tmp_path):
    path = tmp_path / "x.json"
    process = started(path)
    write_atomic(path, b"first")
    process.communicate(b"\n")
    assert process.returncode == 0
    assert path.read_bytes() == b"late"
    assert os.listdir(tmp_path) == ["x.json"]


def test_files_of_the_user_are_not_swept(tmp_path):
    kept = [".x.json.mine.tmp", "x.json.tmp", ".x.json.0123456789abcdef.txt", f".x.json.{'0' * 16}.tmp.bak"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".x.json.{'0' * 16}.tmp").write_text("left")
    write_atomic(tmp_path / "x.json", b"x")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "x.json"])


def test_a_hidden_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = fcntl.flock, []

    def late(number, how):
        if not swept:
            swept.extend(tmp_path.glob("*.tmp"))
            swept[0].unlink()
        lock(number, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomic(tmp_path / "x", b"x")
    assert os.listdir(tmp_path) == ["x"]


def test_pieces_that_a_kill_left_are_swept_too(tmp_path):
    parts = Parts.of(tmp_path / "steps", "sweep", {"a": 1})
    parts.get(1, lambda: {"x": torch.ones(1)})
    (path,) = (tmp_path / "steps").iterdir()
    path.with_name(f".{path.name}.{'0' * 16}.tmp").write_bytes(b"left")
    path.unlink()
    time.sleep(0.01)
    parts.get(1, lambda: {"x": torch.ones(1)})
    assert [found.name for found in (tmp_path / "steps").iterdir()] == [path.name]


# the demo model is written as a whole folder, in a temporary one that is then renamed; a lock is an empty file; a GGUF
# file is linked into a temporary folder, where it has no neighbours
ALLOWED = {"interp/hooks/writer.py", "interp/models/demo.py", "interp/models/model_files.py", "interp/runs/lock.py"}
WRITING = {
    "write_text", "write_bytes", "savefig", "save_file", "write_html", "write_image", "touch", "symlink_to", "tofile",
    "to_csv", "to_excel", "to_parquet", "to_pickle", "savez", "savetxt", "copyfile", "copytree", "copy2", "mkstemp",
    "NamedTemporaryFile", "mkdir", "makedirs", "rename", "mkfifo", "hardlink_to",
}  # fmt: skip
WRITING_OF = {
    ("json", "dump"), ("torch", "save"), ("np", "save"), ("os", "replace"), ("pickle", "dump"), ("yaml", "dump"),
    ("yaml", "safe_dump"), ("os", "open"), ("shutil", "copy"), ("shutil", "move"),
}  # fmt: skip


def writes(tree):
    """(line, name) of every call that writes to a path."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        modes = [part.value for part in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
                 if isinstance(part, ast.Constant) and isinstance(part.value, str)]  # fmt: skip
        opened = name == "open" and any(set(mode) <= set("rwxabt+") and set(mode) & set("wxa+") for mode in modes)
        # text for standard output or for a buffer
        printed = (owner, name) == ("yaml", "safe_dump") and len(node.args) == 1
        buffered = name == "savefig" and isinstance(node.args[0], ast.Name) and node.args[0].id == "held"
        if (name in WRITING or (owner, name) in WRITING_OF or opened) and not (printed or buffered):
            yield node.lineno, name


def test_nothing_else_in_the_package_writes_files():
    found = []
    for path in sorted((ROOT / "interp").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name not in ALLOWED:
            found += [(name, *where) for where in writes(ast.parse(path.read_text()))]
    assert not found


@pytest.mark.parametrize(
    "code",
    ["path.write_text('x')", "open(path, 'w')", "path.open(mode='ab')", "json.dump(x, file)", "torch.save(x, path)",
     "os.replace(a, b)", "figure.savefig(path)", "frame.to_csv(path)", "Path(x).mkdir()"],
)  # fmt: skip
def test_the_search_for_writers_sees_what_it_should(code):
    assert list(writes(ast.parse(code)))
    assert not list(writes(ast.parse("open(path)\npath.open('rb')\njson.dumps(x)\npath.read_text()\ncodec.save(x, p)")))


def test_systems_without_locks_are_written_too(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "fcntl", None)
    (tmp_path / f".x.{'0' * 16}.tmp").write_bytes(b"left")
    assert write_atomic(tmp_path / "x", b"1").read_bytes() == b"1"
    assert write_atomic(tmp_path / "x", b"2").read_bytes() == b"2"
