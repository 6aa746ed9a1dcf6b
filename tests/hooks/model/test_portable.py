"""No path, user, computer or variable of the environment leaves the machine: every option of every command."""

import getpass
import os
import socket

import pytest
import typer

from interp.cli import app
from interp.hooks.model.portable import (
    HOME,
    is_path,
    last_part,
    portable,
    portable_command,
    portable_model,
    portable_text,
)

SECRET = "hidden"
"""name of a folder that must not be seen"""
PLACES = [
    "/home/hidden/x.json", "/hidden/x.json", "~/hidden/x.json", "~hidden/x.json", "./hidden/x.json",
    "../hidden/x.json", "hidden/x.json", "hidden/hidden/x.json", "C:\\hidden\\x.json", "C:/hidden/x.json",
    "\\\\hidden\\share\\x.json", "hidden\\x.json", "file:///hidden/x.json", "$HOME/hidden/x.json",
    "${HOME}/hidden/x.json", "$hidden", "hidden@hidden:/x.json", "hidden@hidden:x.json", "/a b/hidden c/x.json",
    "/hidden/a=b/x.json", "/hidden/x.json/", "/hidden/../x.json", "%hidden%\\x.json", "//hidden/x.json",
]  # fmt: skip
GROUP = typer.main.get_command(app)
OPTIONS = [
    (command, flag)
    for command, found in GROUP.commands.items()  # type: ignore[attr-defined]
    for parameter in found.params
    for flag in (*parameter.opts, *parameter.secondary_opts)
]


def test_every_command_and_its_options_are_in_the_table():
    assert {command for command, _ in OPTIONS} == {"list", "doctor", "score", "steer", "safety", "report", "show"}
    assert {"--out", "-o", "--prompts", "--set", "--task", "--profile", "--requests", "--haystack", "--run", "source",
            "path", "model"} <= {flag for _, flag in OPTIONS}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_every_option_of_every_command_loses_the_way_to_a_file(place):
    for command, flag in OPTIONS:
        words = [[place]] if not flag.startswith("-") else [[flag, place], [f"{flag}={place}"]]
        words += [[f"{flag}{place}"]] if flag.startswith("-") and not flag.startswith("--") else []
        words += [["--set", f"kv.lens={place}"], [f"--set=kv.lens={place}"]] if flag == "--set" else []
        for given in words:
            said = portable_command(["/hidden/bin/interp", command, *given, "--seed", "3"], {"org/model"})
            assert SECRET not in said, (given, said)
            assert said.startswith(f"interp {command} ")
            assert said.endswith(" --seed 3")
            if place.endswith("x.json"):
                assert "x.json" in said


KEPT = [
    ["interp", "score", "sinks,kv", "org/model", "--heads", "L0H1,L1H2-L1H4"],
    ["interp", "score", "sinks", "demo", "--set", "qada.tau=0.9", "--set=kv.keep_ratios=[0.5, 0.25]", "-k=3"],
    ["interp", "steer", "demo", "--method", "pasta", "--task", "mine.jsonl", "--set", "alpha=0.01"],
    ["interp", "report", "demo", "-o", "r.html", "--needle-depths", "0.1,0.5", "--no-bos", "--seed=-1"],
    ["interp", "score", "sinks", "org/model", "--set", "a.share=1/2"],
]


@pytest.mark.parametrize("words", KEPT)
def test_commands_without_paths_are_unchanged(words):
    assert portable_command(words, {"org/model"}) == " ".join(words)


def test_names_of_the_user_and_of_the_computer_are_no_last_part(monkeypatch, tmp_path):
    home = tmp_path / "hidden"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert portable(str(home)) == HOME
    assert portable("~") == HOME
    assert portable_command(["interp", "show", str(home), f"--out={home}/", "~"]) == "interp show ~ --out=~ ~"
    assert last_part(f"/home/{getpass.getuser()}") == HOME
    assert socket.gethostname() not in last_part(f"/mnt/{socket.gethostname()}")
    # a folder with a space, in a sentence
    (home / "a b").mkdir()
    assert "hidden" not in portable_text(f"{home}/a b/x.json cannot be read")


TEXTS = {
    "/home/hidden/x.json cannot be read (No such file).": "x.json cannot be read (No such file).",
    "see '~/hidden/x.json', \"/hidden/y/z\" and (C:\\hidden\\x)": "see 'x.json', \"z\" and (x)",
    "name ./hidden/x.json or ../hidden/x.": "name x.json or x.",
    "file:///hidden/x.json is broken": "x.json is broken",
    "\\\\hidden\\share\\x is away": "x is away",
    "in /hidden/x.json:12, in f": "in x.json:12, in f",
}


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_lose_the_way_to_a_file(text):
    assert portable_text(text) == TEXTS[text]


PLAIN = [
    "and/or", "yes/no", "tokens/s", "1/2", "1 / 2", "https://example.org/a/b.html", "L0H1, L1H2", "", " ", "a.b",
    "</s>", "<a href='x'>", "5/n for n keys", "org/model", "(0.5, 1)", "\u00e9/\u00e8", "x" * 5000 + "/",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_are_unchanged(text):
    assert portable_text(text) == text
    assert portable(text) == text
    assert not is_path(text)


def test_a_zero_in_a_text_is_no_path():
    assert not is_path("a\0/b")
    assert portable_model("a\0/b") == "b"


def test_values_inside_of_values(tmp_path, monkeypatch):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "x.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    given = {"a": ["hidden/x.csv", ("/hidden/y/z", 1.5)], "b": {"c": tmp_path / "hidden" / "q"}, "d": None, "e": True}
    assert portable(given) == {"a": ["x.csv", ["z", 1.5]], "b": {"c": "q"}, "d": None, "e": True}
    assert portable(f"from {os.getcwd()}/hidden/x.csv") == "from x.csv"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/model", "org/model"), ("model", "model"), ("", ""), ("/hidden/m/", "m"), ("./hidden/m", "m"),
        ("~/hidden/m.gguf", "m.gguf"), ("a/hidden/m", "m"), ("hidden\\m", "m"),
        ("/c/models--org--some-model/snapshots/01", "org/some-model"),
    ],
)  # fmt: skip
def test_models(name, said):
    assert portable_model(name) == said


def test_a_folder_that_looks_like_a_hub_id_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "hidden" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert portable_model("hidden/m") == "m"
