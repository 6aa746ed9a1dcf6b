"""The options behind `make test-fast`: the tests most likely to fail first, for a limited number of seconds.

`--fast SECONDS` collects a part of the test files and runs them in this order:

1. tests that failed in the last run (pytest's own `--failed-first`),
2. files that changed in git, and tests that are named after a changed module or import one,
3. files without a recorded duration, which are new,
4. all others, the quickest first by `tests/durations.json`, as many as fit.

A test that has not begun when the time is up is left out and counted.
`--record-durations` updates `tests/durations.json` from the tests that run (`make test-durations`).
"""

import json
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DURATIONS = TESTS / "durations.json"
STARTUP_SECONDS = 20.0
"""From the start of pytest to the first test, on two cores."""
UNKNOWN_SECONDS = 3.0
"""Assumed duration of a test file without a record."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("interp")
    group.addoption("--fast", type=float, metavar="SECONDS", help="run the tests most likely to fail, for SECONDS")
    group.addoption("--record-durations", action="store_true", help="update tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record_durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
    if config.getoption("fast") is not None:
        config.pluginmanager.register(Fast(config), "interp-fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that were not selected, so that no time is spent on importing them."""
    fast = config.pluginmanager.get_plugin("interp-fast")
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if fast and is_test and collection_path not in fast.position else None


class Fast:
    """Selects test files, orders their tests and stops at the deadline; in the controller and in each xdist worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seconds = float(config.option.fast)
        worker = getattr(config, "workerinput", {})
        # all processes keep the deadline of the first one
        self.deadline = worker.get("fast_deadline", time.time() + self.seconds)
        budget = max(self.seconds - STARTUP_SECONDS, 0.0) * worker.get("workercount", 1)
        assert config.cache is not None
        failed = {ROOT / test.split("::")[0] for test in config.cache.get("cache/lastfailed", {})}
        self.position = {path: i for i, path in enumerate(select(read_durations(), failed, changed_files(), budget))}
        self.left_out = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.position.get(item.path, len(self.position)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        """Pass over a test after the deadline: a skip would make pytest forget that the test failed last time."""
        if time.time() < self.deadline:
            return None
        self.left_out += 1
        return True

    def pytest_sessionfinish(self) -> None:
        if (output := getattr(self.config, "workeroutput", None)) is not None:
            output["fast_left_out"] = self.left_out

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["fast_deadline"] = self.deadline

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.left_out += getattr(node, "workeroutput", {}).get("fast_left_out", 0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        late = f", {self.left_out} of their tests left out after {self.seconds:g} s" if self.left_out else ""
        all_files = sum(1 for _ in TESTS.rglob("test_*.py"))
        terminalreporter.write_line(f"{len(self.position)} of {all_files} test files{late}; make test runs all")


class Recorder:
    """Adds up the seconds of each test file and stores them, merged with the record of files that did not run."""

    def __init__(self) -> None:
        self.seconds: dict[Path, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[ROOT / report.location[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        before = {path: seconds for path, seconds in read_durations().items() if path.exists()}
        found = {**before, **self.seconds}
        table = {str(path.relative_to(TESTS)): round(seconds, 1) for path, seconds in sorted(found.items())}
        DURATIONS.write_text(json.dumps(table, indent=0) + "\n")


def read_durations() -> dict[Path, float]:
    """Seconds of each recorded test file; an empty table where nothing was recorded."""
    stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    return {TESTS / name: seconds for name, seconds in stored.items()}


def changed_files() -> set[Path]:
    """Files that differ from the last commit, or that the last commit changed if there are none; none without git."""

    def git(*arguments: str) -> set[Path]:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return set()
        return {ROOT / line for line in done.stdout.splitlines()} if done.returncode == 0 else set()

    uncommitted = git("diff", "--name-only", "HEAD") | git("ls-files", "--others", "--exclude-standard")
    return uncommitted or git("diff", "--name-only", "HEAD~1", "HEAD")


def select(durations: dict[Path, float], failed: set[Path], changed: set[Path], budget: float) -> list[Path]:
    """Test files in the order in which they run: failed, then related to a change, then new, then the quickest.

    Files of the first two kinds are always selected; others as long as all durations together fit the budget.
    """
    files = sorted(TESTS.rglob("test_*.py"))
    related = {path for path in files if path in changed or belongs_to(path, changed)}
    files.sort(key=lambda path: (path not in failed, path not in related, path in durations, durations.get(path, 0.0)))
    chosen, total = [], 0.0
    for path in files:
        total += durations.get(path, UNKNOWN_SECONDS)
        if total <= budget or path in failed or path in related:
            chosen.append(path)
    return chosen


def belongs_to(test: Path, changed: set[Path]) -> bool:
    """Whether the test file is named after a changed module of interp, or imports one."""
    modules = [path.relative_to(ROOT) for path in changed if path.suffix == ".py" and ROOT / "interp" in path.parents]
    if not modules:
        return False
    if test.stem in {f"test_{path.stem.strip('_')}" for path in modules}:
        return True
    text = test.read_text()
    for path in modules:
        package, name = ".".join(path.parts[:-1]), path.stem
        direct = rf"\b{re.escape(package)}\.{name}\b"
        if re.search(rf"{direct}|from {re.escape(package)} import [^\n]*\b{name}\b", text):
            return True
    return False
