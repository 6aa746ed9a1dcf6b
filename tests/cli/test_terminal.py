"""Names in files cannot act on a terminal: no escape, bell, carriage return or mark of direction is printed raw."""

import json
import re
import shutil

import pytest
import run_results

from interp.analyses.results.files import seal
from interp.analyses.results.head_scores import HeadScores
from interp.runs import results as run_files

ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ESCAPES = {
    "colour": "\x1b[31mred", "title": "\x1b]0;title\x07", "link": "\x1b]8;;http://x\x1b\\", "clear": "\x1b[2J\x1b[H",
    "one byte": "\x9b31m", "return": "good\rbad", "back": "bad\x08\x08\x08ok", "direction": "a\u202eb\u2066c",
    "lines": "a\u2028b\x85c\x0bd", "zero": "a\x00b", "delete": "a\x7fb",
}  # fmt: skip
RESULTS = run_results.whole(run_results.SAFE_HOSTILE).results


@pytest.mark.parametrize("name", RESULTS)
def test_show_prints_no_character_that_acts(call, tmp_path, name):
    path = RESULTS[name].save(tmp_path / "x")
    for more in ([], ["--json"]):
        code, out, err = call("show", path, *more)
        assert code == 0, err
        assert out.strip()
        assert not ACTING.search(out), repr(ACTING.search(out))


@pytest.mark.parametrize("case", ESCAPES)
def test_names_of_a_table_are_shown_with_symbols(call, tmp_path, case):
    text = ESCAPES[case]
    table = run_results.table("induction", 1)
    named = HeadScores(text, table.per_prompt, text, 2, settings={text: text}, labels=(text,) * len(table.per_prompt))
    code, out, _ = call("show", named.save(tmp_path / "x"))
    assert code == 0
    assert not ACTING.search(out)
    assert re.search("[\u2400-\u2421]|\\\\u", out)


@pytest.mark.parametrize("case", ESCAPES)
def test_errors_are_printed_with_symbols(call, finished, tmp_path, case):
    text = ESCAPES[case]
    broken = tmp_path / "x.json"
    broken.write_text(json.dumps({"format": text}))
    manifest = shutil.copytree(finished, tmp_path / "run") / "manifest.json"
    stored = json.loads(manifest.read_text())
    wrong = [["show", broken], ["list", text], ["score", text, "demo", "--out", tmp_path / "o"], ["list", f"--{text}"]]
    for arguments in wrong if "\x00" not in text else wrong[:2]:
        code, out, err = call(*arguments)
        assert code == 2, err
        assert not ACTING.search(out + err)
        assert len(err.strip().splitlines()) == 1
    # the name of the model and the reason for a missing result
    manifest.write_text(json.dumps(seal(stored | {"format": text})))
    code, _, err = call("show", manifest.parent)
    assert code == 2
    assert not ACTING.search(err)
    manifest.write_text(json.dumps(seal(stored)))
    record = sorted((manifest.parent / "stages").glob("*.json"))[0]
    content = json.loads(record.read_text()) | {"missing": text, "cells": {}}
    record.write_text(json.dumps(seal(content)))
    code, out, err = call("show", manifest.parent)
    assert code == 0, err
    assert not ACTING.search(out)
    assert f"{record.stem}: not made" in out
    assert run_files.read_results(manifest.parent).missing[record.stem] == text
