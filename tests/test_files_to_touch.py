"""The number of files to touch for a new method of each kind, counted on a copy of the package.

Each addition is written into the copy, nothing else in it changes, and it has to appear everywhere. With its test, an
analysis, an edit or a selector is two files, a result of a new type three, and a figure two.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plugin_package
import pytest
import tiny_chat_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TEST_FILE = 1
VIEW = '''"""Lengths of prompts, as the smallest result that is no table of heads."""

from dataclasses import dataclass

from interp.analyses.registry import analysis
from interp.analyses.results.codec import result
from interp.analyses.results.result import Result
from interp.analyses.tasks import standard
from interp.hooks.model.heads import HeadSet


@result
@dataclass(frozen=True, eq=False)
class PromptLengths(Result):
    """Number of tokens of each prompt."""

    lengths: tuple[int, ...]
    heads: HeadSet

    def to_frame(self):
        """One row for each prompt."""
        import pandas as pd

        return pd.DataFrame({"length": self.lengths})

    def summary(self, top: int = 10) -> str:
        """The lengths as text."""
        return f"{len(self.lengths)} prompts of {sum(self.lengths)} tokens"


@analysis(
    title="Prompt lengths", group="views", prompts=standard.passages, joint=True, in_all=False, needs=("heads",),
    inputs=lambda run: {"heads": HeadSet(tuple(run.leading))},
)
def prompt_lengths(model, prompts, heads) -> PromptLengths:
    """Count the tokens of each prompt.

    Source:
        A test.

    Limits:
        Does not look at attention.
    """
    return PromptLengths(tuple(prompts.lengths), heads)
'''
SECTION = '''"""The section of prompt lengths."""

from interp.analyses.views.prompt_lengths import PromptLengths
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section


@section.register(PromptLengths)
def _(result: PromptLengths, name: str, page: Page) -> Section:
    return Section(title_of(name), "the section of prompt lengths")
'''
PLOT = '''"""The figure of prompt lengths."""

from interp.analyses.views.prompt_lengths import PromptLengths
from interp.plots.dispatch import figure


@figure.register(PromptLengths)
def _(result: PromptLengths):
    import plotly.graph_objects as go

    return go.Figure(go.Bar(y=list(result.lengths)))
'''
ADDITIONS = {
    "identify": ({"analyses/identify/second_copy.py": plugin_package.ANALYSIS}, 2),
    "edit": ({"analyses/steer/opening.py": plugin_package.EDIT}, 2),
    "selector": ({"analyses/kv/every_other.py": plugin_package.SELECTOR}, 2),
    "result": ({"analyses/views/prompt_lengths.py": VIEW, "report/sections/prompt_lengths.py": SECTION}, 3),
    "figure": ({"plots/prompt_lengths.py": PLOT}, 2),
}
"""kind -> (files of the package, files to touch at most with the test)"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with all additions in it."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "interp", root / "interp", ignore=shutil.ignore_patterns("__pycache__"))
    for files, _ in ADDITIONS.values():
        for name, text in files.items():
            path = root / "interp" / name
            assert not path.exists(), "an addition must not replace a file"
            path.write_text(text)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_chat_model.folder(tmp_path_factory.mktemp("model") / "tiny"))


def run(copy: Path, *arguments: object) -> str:
    """What the command of the copy prints."""
    environment = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from interp.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=copy)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ADDITIONS)
def test_files_are_few(kind):
    files, most = ADDITIONS[kind]
    assert len(files) + TEST_FILE <= most


def test_all_are_listed(copy):
    rows = {row["name"] for row in json.loads(run(copy, "list", "--json"))}
    assert {"second_copy", "opening", "everyother", "prompt_lengths"} <= rows


def test_all_run_and_are_reported(copy, model, tmp_path):
    few = ["--n-texts", 2, "--n-heads", 2, "--n-random-sets", 1, "--explorer-tokens", 0, "--needle-length", 700]
    chosen = ["--set", 'kv.selectors=["everyother"]']
    out = run(copy, "score", "second_copy,prompt_lengths,kv", model, "--out", tmp_path / "run", *few, *chosen)
    assert "second_copy: share of attention, 2 prompts counted" in out
    assert "2 prompts of" in out
    assert "everyother" in out
    run(copy, "report", tmp_path / "run", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for text in ("Second copy", "Does not show that the head copies anything.", "Every other key"):
        assert text in page
    assert "the section of prompt lengths" in page


def test_the_figure_is_found_by_its_type(copy):
    program = """
from interp.analyses.views.prompt_lengths import PromptLengths
from interp.hooks.model.heads import HeadSet
print(len(PromptLengths((3, 5), HeadSet(())).figure().data))
"""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=copy)
    assert done.stdout.strip() == "1", done.stderr


def test_the_documentation_has_a_page_for_each(copy):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "docs")!r})
import pages
print("\\n".join(pages.pages()))
"""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=copy)
    made = {Path(path).stem for path in done.stdout.split()}
    assert {"second_copy", "opening", "everyother", "prompt_lengths"} <= made, done.stderr


def test_a_reduction_is_at_most_seven_files():
    """The list of CONTRIBUTING.md; that the files are the right ones is for its reader to see."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = text.partition("## Add a reduction")[2].partition("\n## ")[0]
    files = re.findall(r"^\d+\. `([^`]+)`", steps, flags=re.M)
    assert 1 < len(files) <= 7
    assert all((ROOT / file).is_file() for file in files)
