"""Plant bugs one at a time and report which of them the tests catch: `python tests/mutants.py [--list] [WORD...]`.

With words, only mutants whose name or file holds one of them are planted, and `--list` prints their names alone. They
are planted in a copy of the clone, which stays as it is. The tool is run by hand: a mutant takes from a few seconds to
a minute. The lists are in `tests/helpers/mutants_*.py`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# the lists are where helpers of the tests are
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from mutant import Mutant
from mutants_kernels_and_hooks import KERNELS_AND_HOOKS
from mutants_known import KNOWN
from mutants_methods import METHODS
from mutants_results_and_face import RESULTS_AND_FACE

ROOT = Path(__file__).parent.parent
TIMEOUT = 600
"""seconds that the tests of one mutant may take"""
MUTANTS = [*KNOWN, *KERNELS_AND_HOOKS, *METHODS, *RESULTS_AND_FACE]
"""All bugs that can be planted."""


def planted(mutant: Mutant, text: str) -> str:
    """Return the text of a file with the bug in it.

    Args:
        mutant: The bug.
        text: The text of its file.

    Raises:
        ValueError: If the text that it replaces does not occur exactly once.
    """
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: {mutant.before!r} occurs {text.count(mutant.before)} times in {mutant.file}")
    return text.replace(mutant.before, mutant.after)


def copy_of_clone(folder: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore, to a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails with the bug planted in a copy of the clone; the copy is restored.

    Args:
        mutant: The bug.
        folder: The copy.

    Raises:
        RuntimeError: If no test ran, or they took too long.
    """
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(planted(mutant, text))
    try:
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        done = subprocess.run(
            tests, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, timeout=TIMEOUT
        )
    finally:
        path.write_text(text)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout.decode()[-2000:]}")
    return done.returncode == 1


def main(words: list[str]) -> int:
    """Plant the mutants that the words choose, and print which were caught; 1 if one was not, or none is chosen."""
    only_list, words = "--list" in words, [word for word in words if word != "--list"]
    chosen = [m for m in MUTANTS if not words or any(word in m.name or word in m.file for word in words)]
    if only_list:
        print("\n".join(f"{m.file}: {m.name}" for m in chosen))
        return 0
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_clone(folder)
        for mutant in chosen:
            found = is_caught(mutant, folder)
            caught += found
            print(f"{'caught  ' if found else 'SURVIVES'}  {mutant.name}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen) or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
