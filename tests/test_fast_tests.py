"""`make test-fast` selects and orders test files by failures, changes and recorded durations, and stops in time."""

import subprocess
import sys

import fast_tests
import pytest

TREE = {
    "test_failed.py": "",
    "test_new.py": "",
    "test_quick.py": "",
    "test_long.py": "",
    "hooks/test_seam.py": "",
    "test_user.py": "from interp.hooks import keep, seam",
}


@pytest.fixture
def tests(tmp_path, monkeypatch):
    """A folder of test files in the place of tests/, in a folder in the place of the clone."""
    folder = tmp_path / "tests"
    for name, text in TREE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(fast_tests, "ROOT", tmp_path)
    monkeypatch.setattr(fast_tests, "TESTS", folder)
    return folder


def test_order_and_budget(tests):
    seconds = {"test_failed.py": 90.0, "hooks/test_seam.py": 30.0, "test_user.py": 20.0, "test_quick.py": 1.0}
    durations = {tests / name: value for name, value in {**seconds, "test_long.py": 2.0}.items()}
    changed = {tests.parent / "interp" / "hooks" / "seam.py", tests.parent / "README.md"}
    found = fast_tests.select(durations, {tests / "test_failed.py"}, changed, budget=145.0)
    # 140 seconds of what failed or changed, 3 assumed for the new file and 1 for the quickest fit; 2 more do not
    expected = ["test_failed.py", "test_user.py", "hooks/test_seam.py", "test_new.py", "test_quick.py"]
    assert found == [tests / name for name in expected]


def test_failed_and_changed_files_are_selected_whatever_they_cost(tests):
    durations = {tests / name: 50.0 for name in TREE}
    found = fast_tests.select(durations, {tests / "test_failed.py"}, {tests / "test_long.py"}, budget=0.0)
    assert found == [tests / "test_failed.py", tests / "test_long.py"]


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("from interp.hooks.seam import tapping", True),
        ("import interp.hooks.seam", True),
        ("from interp.hooks import keep, seam", True),
        ("from interp.hooks.seam_of_others import tapping", False),
        ("from interp.hooks import keep", False),
    ],
)
def test_imports_of_a_changed_module(tests, text, imports):
    file = tests / "test_other.py"
    file.write_text(text)
    assert fast_tests.belongs_to(file, {tests.parent / "interp" / "hooks" / "seam.py"}) == imports
    assert not fast_tests.belongs_to(file, {tests.parent / "docs" / "seam.py"})


@pytest.mark.parametrize("workers", ["0", "2"])
def test_stops_in_time_and_counts_the_rest(tmp_path, workers):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(fast_tests.TESTS / 'helpers')!r})\n"
        "import fast_tests\n"
        "from pathlib import Path\n"
        "fast_tests.TESTS, fast_tests.ROOT = Path(__file__).parent, Path(__file__).parents[1]\n"
        "fast_tests.DURATIONS = fast_tests.TESTS / 'durations.json'\n"
        "fast_tests.STARTUP_SECONDS = -100\n"
        "from fast_tests import pytest_addoption, pytest_configure, pytest_ignore_collect\n"
    )
    body = "import time, pytest\n@pytest.mark.parametrize('i', range(40))\ndef test_one(i): time.sleep(0.5)\n"
    (folder / "test_sleep.py").write_text(body)
    arguments = ["--fast", "4", "--record-durations", "-n", workers, "-p", "no:cov", "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert 1 <= passed < 40
    assert f"{40 - passed} of their tests left out after 4 s" in done.stdout
    assert '"test_sleep.py"' in (folder / "durations.json").read_text()
