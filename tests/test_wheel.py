"""The built wheel is complete: it is installed into an empty folder and used outside of the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("hooks", "analyses", "kernels")
PROGRAM = """
from importlib.resources import files
from pathlib import Path

import interp
import interp.kernels.gpu.engine
from interp.analyses.tasks.haystack import paragraphs

assert Path(interp.__file__).is_relative_to({target!r}), interp.__file__
assert files("interp").joinpath("py.typed").is_file()
for room in ("interp.report", "interp.plots"):
    suffixes = {{Path(file.name).suffix for file in files(room).iterdir() if file.is_file() and file.read_text()}}
    assert {{".j2", ".css", ".js"}} <= suffixes, suffixes
assert next(paragraphs())
print("complete")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that no build folder of the checkout gets in."""
    copy = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT / "interp", copy / "interp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in LINKS:
        (copy / name).symlink_to(Path("interp") / name)
    pip("wheel", copy, "--no-build-isolation", "--wheel-dir", copy / "dist")
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", target)
    return target


def pip(command, *arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--no-deps", "--no-index", "--quiet", *map(str, arguments)], check=True
    )


def outside(installed, folder, *arguments):
    """Output of Python with the installed wheel first on its path, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "interp").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.slow
def test_installed_package_works_outside_of_the_checkout(installed, tmp_path):
    assert outside(installed, tmp_path, "-c", PROGRAM.format(target=str(installed))) == "complete\n"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("report", "--help")])
def test_command_line_works_outside_of_the_checkout(installed, tmp_path, arguments):
    code = "import sys; from interp.cli import main; sys.argv[0] = 'interp'; main()"
    assert "interp" in outside(installed, tmp_path, "-c", code, *arguments)
    assert (installed / "bin" / "interp").exists()
