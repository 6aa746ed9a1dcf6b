"""The documentation: it builds without a warning and opens without a network, and every block of code in it runs.

Blocks of a page run in order, in one namespace and one empty folder. A `python` block runs. In a block of commands
(`console`, `bash` or no language) each `interp` runs, with the demo model as MODEL; `make` must know its targets, and
the script of a benchmark must exist. Blocks in other languages are only shown.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser as browsers
import pytest
import scripts
from sybil import Document, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

import interp
from interp import cli
from interp.analyses import registry
from interp.analyses.tasks import names
from interp.analyses.tasks.standard import PromptSizes
from interp.runs.plan import ScorePlan
from interp.runs.run import Run
from interp.runs.steer import SteerPlan

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SHOWN = {"text", "json", "bibtex"}
"""languages of blocks that are only shown"""
COMMANDS = {"", "console", "bash"}

FEW = {
    "score": "--n-needles 2 --needle-length 160 --n-texts 2 --text-length 48 --n-pairs 2 --n-random-sets 1 "
    "--n-check-needles 2 --check-length 160 --n-heads 3 --explorer-tokens 160",
    "safety": "--n-harmful 4 --n-harmless 2 --reply-tokens 8",
    # heads are named, since a profile of 270 heads takes minutes
    "steer": "--heads L10-L12 --n-dev-items 2 --n-test-items 2 --n-random-sets 1",
}
"""cheap settings, by command, where a page does not set them itself"""
ENDS = {"safety": (2, "no refusal to attribute")}
"""commands that end otherwise than with 0 on the demo model, which refuses next to nothing"""


@pytest.fixture(scope="module")
def method_pages():
    """The module of the documentation that makes pages of methods."""
    return scripts.load(DOCS / "method_pages.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly, and the output of the build."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


class Links(HTMLParser):
    """The files that a page loads, and the links that it holds."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loads.append(found["src"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found["href"])
        elif tag == "a" and "href" in found:
            self.leads.append(found["href"])


def test_site_builds_without_a_warning(site):
    _, output = site
    assert "Documentation built" in output
    assert "WARNING" not in output
    assert "MkDocs 2" not in output


def test_nothing_is_loaded_from_a_network(site):
    folder, _ = site
    for page in folder.rglob("*.html"):
        assert [load for load in Links(page).loads if urlsplit(load).scheme not in ("", "data")] == [], page
    for style in folder.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import ['\"]?https?:", style.read_text(encoding="utf-8")), style


def test_every_page_is_reached_from_the_first(site):
    folder, _ = site
    seen, left = set(), [folder / "index.html"]
    while left:
        page = left.pop()
        if page in seen:
            continue
        seen.add(page)
        inner = [unquote(urlsplit(lead).path) for lead in Links(page).leads if not urlsplit(lead).scheme]
        found = [(page.parent / lead).resolve() for lead in inner if lead.endswith(".html")]
        assert all(path.is_file() for path in found), page
        left += found
    assert seen == {page for page in folder.rglob("*.html") if page.name != "404.html"}


def test_search_finds_without_a_server(site, browser):
    folder, _ = site
    with browsers.opened(browser, folder / "index.html") as watched:
        watched.page.click("[data-md-component=search-query]")
        watched.page.keyboard.type("previous token", delay=20)
        found = "document.querySelector('.md-search-result__list').innerText.includes('interp score previous_token')"
        watched.page.wait_for_function(found, timeout=20_000)
        # the site's own files, and nothing else
        assert all(Path(urlsplit(asked).path).is_relative_to(folder) for asked in watched.asked)
        assert watched.complaints == []


def test_every_method_has_a_page(site, method_pages):
    folder, _ = site
    paged = [entry for group in method_pages.PACKAGES for entry in method_pages.methods(group)]
    assert {id(entry) for entry in paged} == {
        id(entry) for entry in registry.iterate() if entry.distribution == "interp"
    }
    for group in method_pages.PACKAGES:
        for entry in method_pages.methods(group):
            text = (folder / group / f"{entry.name}.html").read_text(encoding="utf-8")
            assert entry.title in text
            assert f"{entry.thing.__module__.replace('.', '/')}.py" in text
            assert '<details class="warning" open>' in text, f"{entry.name} states no limits"
            assert not re.search(r'<details class="(source|differs|limits)"', text)


def test_papers_are_links(site):
    folder, _ = site
    text = (folder / "find" / "retrieval.html").read_text(encoding="utf-8")
    assert '<a href="https://arxiv.org/abs/2404.15574">2404.15574</a>' in text


def test_tables_hold_every_method(site, method_pages):
    folder, _ = site
    for page in ("methods.html", "concepts/limits.html"):
        text = (folder / page).read_text(encoding="utf-8")
        assert [entry.name for entry in registry.iterate() if method_pages.shown(entry.thing) not in text] == []


def test_commands_and_tutorials_are_listed(site):
    folder, _ = site
    options = (folder / "cli.html").read_text(encoding="utf-8")
    for command in ("list", "doctor", "score", "safety", "steer", "report", "show"):
        assert f"interp {command}" in options
    assert "--n-check-needles" in options
    assert "--no-check" in options
    for path in (ROOT / "notebooks").glob("[0-9]*.py"):
        assert (folder / "tutorials" / f"{path.stem}.html").is_file()


def test_commands_on_method_pages_are_accepted(method_pages):
    for entry in registry.iterate():
        words = shlex.split(method_pages.command_of(entry))
        assert {word for word in words if word.startswith("-")} <= {*accepted(words[1])}, entry.name
        if words[1] == "score":
            assert entry.kind == "selector" or entry.name in ScorePlan(analyses=(words[2],)).analyses
        elif words[1] == "steer":
            assert SteerPlan(method=words[4], task="json").method == entry.name


def accepted(command: str) -> list[str]:
    import typer.main

    found = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    return [flag for param in found.params for flag in (*param.opts, *param.secondary_opts)]


def texts_of_the_code() -> str:
    """Every text in the package; the parts of an f-string are joined."""
    found = []
    for path in (ROOT / "interp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_messages_that_exist():
    rows = [line.split("|")[1:-1] for line in (DOCS / "troubleshooting.md").read_text().splitlines() if "|" in line]
    symptoms = [re.findall(r"`([^`]+)`", row[0]) for row in rows[2:]]
    assert len(symptoms) >= 20
    assert all(len(row) == 3 for row in rows)
    known, others = texts_of_the_code(), {"HookedTransformer", "run_with_cache"}
    for quoted in (text for found in symptoms for text in found if text not in others):
        assert quoted in known, f"no message contains {quoted!r}"


def test_every_task_is_named():
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in names())


def parsed(path: Path) -> Document:
    """A page with a region for each fenced block, whatever its language."""

    def fences(document):
        for region in RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)$\n", re.M))(document):
            source = region.lexemes["source"]
            yield Region(region.start, region.end, source, lambda example: None, lexemes=region.lexemes)

    return Document.parse(str(path), fences)


def languages(path: Path) -> list[str]:
    return [str(example.region.lexemes["language"]).strip() for example in parsed(path)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_has_a_language_that_is_run_or_shown(path):
    assert {*languages(path)} <= {"python", *COMMANDS, *SHOWN}


def test_the_readme_shows_commands_to_install_and_the_output_below_its_example():
    first, *blocks = parsed(ROOT / "README.md")
    assert "make install" in str(first.parsed)
    kinds = [str(block.region.lexemes["language"]).strip() for block in blocks]
    output = str(blocks[kinds.index("python") + 1].parsed)
    assert output.startswith("retrieval: copied tokens per answer token")
    assert "random by layer" in output


RUN = [
    pytest.param(path, id=str(path.relative_to(ROOT)), marks=pytest.mark.slow)
    for path in PAGES
    if {"python", *COMMANDS} & {*languages(path)}
]


@dataclass
class Shell:
    """Commands of one page, run in this process as a user would run them."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture
    run: Path
    """a finished run"""

    def block(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                self.line(words, line)

    def line(self, words: list[str], line: str) -> None:
        if words[0] == "interp":
            self.interp(words[1:], line)
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            assert words[:2] == ["python", "-m"], f"{line!r} is none of interp, make, python -m benchmarks."
            assert re.fullmatch(r"benchmarks\.\w+", words[2]), line
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), line

    def interp(self, words: list[str], line: str) -> None:
        command = words[0]
        # a report of a model takes minutes, of a run seconds
        values = {"MODEL": str(self.run) if command == "report" else "demo", "DIR": str(self.run)}
        values["[MODEL|DIR]"] = values["DIR"]
        given = [values.get(word, word) for word in words]
        # nothing runs, so nothing has to be cheap
        few = [] if "--dry-run" in given else FEW.get(command, "").split()
        given += [part for pair in zip(few[::2], few[1::2], strict=True) if pair[0] not in given for part in pair]
        self.monkeypatch.setattr(sys, "argv", ["interp", *given])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = self.capsys.readouterr()
        code, message = ENDS.get(command, (0, ""))
        assert (stop.value.code or 0) == code, f"{line}\n{out}\n{err}"
        assert message in out + err


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A small finished run on the demo model."""
    folder = tmp_path_factory.mktemp("run") / "run"
    model, tokenizer = interp.load("demo")
    sizes = PromptSizes(n_texts=2, text_length=48, explorer_tokens=0)
    Run.open(folder, ScorePlan(analyses=("sinks",), sizes=sizes, check=False), model, tokenizer).finish(False)
    return folder


@pytest.mark.parametrize("path", RUN)
def test_blocks_run(path, a_run, tmp_path, monkeypatch, capsys):
    document, python = parsed(path), PythonEvaluator()
    shell = Shell(monkeypatch, capsys, a_run)
    monkeypatch.chdir(tmp_path)
    for example in document:
        language = str(example.region.lexemes["language"]).strip()
        if language in COMMANDS:
            shell.block(str(example.parsed))
        elif language == "python":
            python(example)
