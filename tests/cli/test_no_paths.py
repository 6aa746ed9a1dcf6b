"""Reports and run folders of every command hold no path, whichever way the files were named."""

import json
import os
import shutil

import pytest
import run_cases

SECRETS = ("annsmith", "projectx")
SMALL_STEER = ["--n-profile-items", 2, "--n-dev-items", 2, "--n-test-items", 2, "--heads", "L0H1", "--n-random-sets", 1]


@pytest.fixture
def home(tmp_path, folder, monkeypatch):
    """The home of a user, with a model and input files in it."""
    place = tmp_path / "annsmith"
    work = place / "projectx"
    work.mkdir(parents=True)
    shutil.copytree(folder, work / "tiny")
    (work / "own.jsonl").write_text(json.dumps({"text": "a cat sat on the mat. " * 9}) + "\n")
    run_cases.items_file(work / "mine.jsonl")
    run_cases.requests_file(work / "requests.csv")
    (work / "texts").mkdir()
    prose = "The old harbour was quiet in the morning and the boats lay still on the water. " * 4
    paragraphs = [prose.replace("quiet", f"quiet for {number} hours") for number in range(80)]
    (work / "texts" / "a.md").write_text("\n\n".join(paragraphs))
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(work)
    return work


def named(home, way, name):
    """A file in the home, by one of the ways in which a shell or a user names it."""
    return {"absolute": home / name, "relative": f"../projectx/{name}", "home": f"~/projectx/{name}", "bare": name}[way]


def leaks(*places):
    found = []
    for place in places:
        for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
            if path.is_file():
                data = path.read_bytes()
                found += [(path.name, word) for word in SECRETS if word.encode() in data]
    return found


def options(home, way, **files):
    """--name value and --name=value in turn."""
    given = []
    for number, (name, value) in enumerate(files.items()):
        path = named(home, way, value)
        given += [f"--{name}", path] if number % 2 else [f"--{name}={path}"]
    return given


@pytest.mark.parametrize("way", ["absolute", "relative"])
def test_score_report_and_show(call, home, small, way):
    given = options(home, way, prompts="own.jsonl", out="run", haystack="texts")
    few = [*small, "--no-check"]
    code, _, err = call("score", "sinks,previous_token", named(home, way, "tiny"), *given, *few)
    assert code == 0, err
    assert call("report", named(home, way, "run"), f"-o{named(home, way, 'r.html')}")[0] == 0
    assert not leaks(home / "run", home / "r.html")
    code, out, _ = call("show", named(home, way, "run"), "--json")
    assert code == 0
    assert not [word for word in SECRETS if word in out]
    # the same command continues, by another name of the same files
    other = options(home, "bare", prompts="own.jsonl", out="run", haystack="texts")
    assert call("score", "sinks,previous_token", named(home, "bare", "tiny"), *other, *few)[0] == 0


@pytest.mark.parametrize("way", ["absolute", "relative"])
def test_steer(call, home, way):
    given = options(home, way, task="mine.jsonl", out="run")
    code, _, err = call("steer", named(home, way, "tiny"), "--method", "boost", *given, *SMALL_STEER)
    assert code == 0, err
    assert call("report", home / "run", "-o", home / "r.html")[0] == 0
    assert not leaks(home / "run", home / "r.html")
    assert json.loads((home / "run" / "manifest.json").read_text())["plan"]["task"] == "mine.jsonl"


def test_safety(call, home):
    few = ["--n-harmful", 8, "--n-harmless", 8, "--reply-tokens", 2]
    given = options(home, "absolute", requests="requests.csv", out="run")
    code, _, err = call("safety", home / "tiny", *given, *few)
    # the tiny model refuses nothing
    assert code == 2, err
    assert not leaks(home / "run")
    assert os.listdir(home / "run" / "cells")


def test_a_profile_of_the_same_name_with_another_content_is_another_run(call, home):
    few = [*SMALL_STEER[:6], "--n-random-sets", 1, "--n-profiled-heads", 2, "--head-set-sizes", 2]
    steer = ["steer", home / "tiny", "--method", "boost", "--task", home / "mine.jsonl"]
    assert call(*steer, "-o", home / "one", *few)[0] == 0
    profiles = []
    for number in (1, 2):
        (home / str(number)).mkdir()
        for path in (home / "one" / "results").glob("profile.*"):
            shutil.copy(path, home / str(number) / path.name)
        profiles.append(home / str(number) / "profile.json")
    stored = json.loads(profiles[1].read_text())
    profiles[1].write_text(json.dumps(stored, indent=3))
    code, _, err = call(*steer, "-o", home / "two", "--profile", profiles[0], *few)
    assert code == 0, err
    assert not leaks(home / "two")
    code, _, err = call(*steer, "-o", home / "two", "--profile", profiles[1], *few)
    assert code == 2
    assert "differs in its inputs (profile was" in err
