"""Rooms of the package and the imports between them, counted from the source: `python tests/helpers/rooms.py [FOLDER]`.

There are two plans of the same house.
In the face's view, each module and each folder at the top of `interp` is a room, so that a floor below is one room.
In the plan of all rooms, each folder and each single module of `hooks` and of `analyses` is a room as well.
An arrow is an import from one room by another, in any number of files. Errors may be imported by all and are left out,
like the package itself with its lazy names and the modules that only give another module a short name.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

DIVIDED = ("hooks", "analyses")
"""Floors whose folders are rooms in the plan of all rooms."""
LEFT_OUT = {"interp", "errors"}

Arrows = dict[str, set[str]]
"""Room -> the rooms that it imports."""


def face_view(module: str) -> str:
    """The room of a module in the face's view: `analyses` for interp.analyses.steer.pasta."""
    return module.split(".")[1] if "." in module else module


def all_rooms(module: str) -> str:
    """The room of a module in the plan of all rooms: `analyses/steer` for interp.analyses.steer.pasta."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2] if parts and parts[0] in DIVIDED else parts[:1]) or module


def arrows(root: Path, room: Callable[[str], str]) -> Arrows:
    """The arrows between the rooms of root/interp."""
    trees = {_module(root, file): ast.parse(file.read_text()) for file in sorted((root / "interp").rglob("*.py"))}
    found: Arrows = {}
    for module, tree in trees.items():
        if (own := room(module)) in LEFT_OUT or _is_short_name(tree):
            continue
        found.setdefault(own, set())
        for name in imported(tree):
            target = name
            while target not in trees:
                target = target.rpartition(".")[0]
            if room(target) not in {own} | LEFT_OUT and not _is_short_name(trees[target]):
                found[own].add(room(target))
    # the __init__ of a floor is no room unless it imports something
    return {own: others for own, others in found.items() if others or own not in DIVIDED or room is face_view}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules, or of the names in them, that a file imports from interp when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "interp")
        yield from imported(node)


def circle(found: Arrows) -> list[str]:
    """Rooms of a circle of imports, the first one again at the end; empty where there is no circle."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def counts(found: Arrows) -> tuple[int, int]:
    """Number of rooms and number of arrows."""
    return len(found), sum(map(len, found.values()))


def _module(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_short_name(tree: ast.Module) -> bool:
    """Whether a module imports `interp.aliases` and defines nothing, as interp/tasks.py does."""
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    return not defines and any(name.startswith("interp.aliases") for name in imported(tree))


def main(root: Path) -> None:
    """Print both plans."""
    for title, room in (("the face's view", face_view), ("all rooms", all_rooms)):
        found = arrows(root, room)
        print("{}: {} rooms, {} arrows; circle: {}".format(title, *counts(found), " <- ".join(circle(found)) or "no"))
        for own, others in sorted(found.items()):
            print(f"  {own}: {', '.join(sorted(others)) or '-'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
