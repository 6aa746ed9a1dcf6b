"""The package as a whole: the cost of an import, imports between floors and rooms, public names, lengths of files."""

import ast
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import rooms

import interp

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "hooks", "analyses")
HEAVY = {"transformer_lens", "transformers", "plotly", "sklearn", "scipy", "pandas"}
FILES = sorted((ROOT / "interp").rglob("*.py"))
PATTERNS = ("interp/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "docs/*.py")
SHORT_FILES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
MAX_LINES = 400
MAX_FACE_ROOMS = 14


def fresh(code: str) -> dict:
    """What the code, run in a new interpreter, leaves in `out`."""
    program = f"import json, sys, time\nout = {{}}\n{code}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def test_import_is_quick_and_light():
    code = (
        "start = time.perf_counter()\nimport interp\nout = dict(s=time.perf_counter() - start, loaded=[*sys.modules])"
    )
    found = fresh(code)
    assert found["s"] < 3
    assert not HEAVY & set(found["loaded"])


def test_using_every_name_brings_nothing_heavy():
    found = fresh("import interp\nfor name in interp.__all__: getattr(interp, name)\nout = [*sys.modules]")
    assert not HEAVY & set(found)


@pytest.mark.parametrize("name", interp.__all__)
def test_public_name(name):
    value = getattr(interp, name)
    assert value is getattr(interp, name)
    assert name in dir(interp)
    assert value.__doc__, f"interp.{name} has no docstring"


def test_public_names_are_few_and_others_fail():
    assert len(set(interp.__all__)) == len(interp.__all__) <= 30
    with pytest.raises(AttributeError, match="attribute nothing"):
        getattr(interp, "nothing")  # noqa: B009


HOMES = {
    "identify": "interp.analyses.identify", "keep": "interp.hooks.read.keep", "kv": "interp.analyses.kv",
    "steer": "interp.analyses.steer", "tasks": "interp.analyses.tasks", "views": "interp.analyses.views",
}  # fmt: skip
"""short names of modules"""


@pytest.mark.parametrize("name", HOMES)
def test_short_names_are_modules_too(name):
    code = f"""
        from interp.{name} import __doc__ as first
        import interp.{name}
        home = sys.modules["{HOMES[name]}"]
        assert first == home.__doc__
        out = dict(same=interp.{name} is home is sys.modules["interp.{name}"], name=home.__spec__.name)
    """
    found = fresh(textwrap.dedent(code))
    assert found == {"same": True, "name": HOMES[name]}


def test_what_lies_below_a_short_name_is_there_once():
    code = """
        from interp.tasks import needle
        from interp.tasks.needle import judge
        from interp.identify.attention_tracker import Detection
        import interp, interp.steer.pasta
        from interp.analyses import identify, steer, tasks
        names = ("tasks.needle", "identify.attention_tracker", "steer.pasta")
        homes = [sys.modules[f"interp.analyses.{name}"] for name in names]
        out = [needle is tasks.needle, judge is homes[0].judge, Detection is homes[1].Detection]
        out += [interp.steer.pasta is steer.pasta, sys.modules["interp.steer.pasta"] is homes[2]]
    """
    assert fresh(textwrap.dedent(code)) == [True] * 5


def floor(parts: tuple[str, ...]) -> int:
    """0 for interp.kernels.*, 1 hooks, 2 analyses, 3 for the rest; -1 for the errors, which all may import."""
    if parts[:2] == ("interp", "errors"):
        return -1
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def imports(tree: ast.AST) -> list[tuple[str, ...]]:
    """Every interp module that a file names in an import, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [parts for name in found if (parts := tuple(name.split(".")))[0] == "interp"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_imports_up_a_floor(file):
    own = floor(file.relative_to(ROOT).with_suffix("").parts)
    for parts in imports(ast.parse(file.read_text())):
        assert floor(parts) <= own, f"{'.'.join(parts)} stands above this file"


def test_the_import_walk_sees_what_it_should():
    tree = ast.parse("import interp.report\ndef f():\n    from interp.hooks import keep\n    from interp import load")
    assert [floor(parts) for parts in imports(tree)] == [3, 1, 3]
    with pytest.raises(AssertionError, match="absolute"):
        imports(ast.parse("from . import x"))


@pytest.mark.parametrize("room", [rooms.face_view, rooms.all_rooms])
def test_rooms_form_no_circle(room):
    assert rooms.circle(rooms.arrows(ROOT, room)) == []


def test_the_face_has_few_rooms():
    found = rooms.arrows(ROOT, rooms.face_view)
    assert len(found) <= MAX_FACE_ROOMS, sorted(found)


def test_rooms_and_arrows_are_counted(tmp_path):
    files = {
        "__init__": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from interp.cli import main",
        "aliases": "def alias(): ...",
        "cli": "def main():\n    from interp import runs\n    from interp.errors import InterpError",
        "errors": "class InterpError(Exception): ...",
        "runs/__init__": "",
        "runs/run": "from interp.hooks.read.capture import capture\nfrom interp.runs.plan import Plan",
        "runs/plan": "",
        "tasks": "from interp.aliases import alias\nfrom interp.hooks.read import *\nalias()",
        "hooks/__init__": "",
        "hooks/seam": "",
        "hooks/read/__init__": "",
        "hooks/read/capture": "import interp.hooks.seam",
    }
    for name, text in files.items():
        file = tmp_path / "interp" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    face = rooms.arrows(tmp_path, rooms.face_view)
    assert face == {"aliases": set(), "cli": {"runs"}, "hooks": set(), "runs": {"hooks"}}
    assert rooms.counts(face) == (4, 2)
    every = rooms.arrows(tmp_path, rooms.all_rooms)
    assert every["runs"] == {"hooks/read"}
    assert every["hooks/read"] == {"hooks/seam"}
    assert rooms.counts(every) == (5, 3)
    assert rooms.circle(every) == []
    (tmp_path / "interp/hooks/seam.py").write_text("def late():\n    from interp.hooks.read import capture")
    assert set(rooms.circle(rooms.arrows(tmp_path, rooms.all_rooms))) == {"hooks/read", "hooks/seam"}


@pytest.mark.parametrize("file", SHORT_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_is_short(file):
    assert file.read_text().count("\n") <= MAX_LINES


@pytest.mark.parametrize("name", FLOORS)
def test_root_links_are_relative(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("interp") / name
    assert link.is_dir()


def test_no_top_level_package_shadows_another():
    # Hugging Face publishes a package called kernels, which a package of ours at the root would hide
    assert not (ROOT / "interp" / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


def test_every_dependency_is_pinned():
    def name(requirement: str) -> str:
        head = requirement.split(";")[0]
        for sign in ("[", ">", "<", "=", "!", "~"):
            head = head.split(sign)[0]
        return head.strip().lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {name(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in lines)
    assert asked <= {name(line) for line in lines}


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {interp.__version__}\n" in citation


def test_what_make_writes_is_ignored():
    written = ("report.html", "report-run/", "site/", "build/", ".coverage", ".coverage.host.1.x", ".venv", "runs/")
    ignored = (ROOT / ".gitignore").read_text().split()
    assert all(any(Path(name.strip("/")).match(rule.strip("/")) for rule in ignored) for name in written)


def test_the_page_on_security_names_what_exists():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(interp/[\w./]+)`", text)
    models = ["interp/models/model_files.py", "interp/hooks/model/chat_template.py"]
    assert named == [*models, "interp/hooks/writer.py", "interp/hooks/model/portable.py", "interp/hooks/limits.py"]
    assert all((ROOT / name).is_file() for name in named)
    assert all(heading in text for heading in ("## How to report", "## Trusted", "## Not trusted", "## Limits"))
    assert all("SECURITY.md" in (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
