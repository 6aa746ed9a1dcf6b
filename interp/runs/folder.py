"""The folder of a run: a manifest, finished cells and results, each file written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from interp.errors import RunError
from interp.hooks.model.provenance import Provenance
from interp.hooks.writer import RUN_MANIFEST, make_folder, write_atomic

FORMAT = "interp.run/2"
MANIFEST = RUN_MANIFEST
SAME_ENTRIES = ("interp", "recipe", "plan", "prompts")
"""entries of a manifest that must not differ when a run continues"""


def begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run, or check that the one in the folder is of the same model, plan and versions.

    Raises:
        RunError: Where the folder holds something else, another run, or cannot be made.
    """
    manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
    if not (folder / MANIFEST).exists():
        claim(folder)
        write(folder / MANIFEST, manifest)
        return
    stored = read_manifest(folder)
    before, now = (Provenance.from_dict(entry["provenance"]) for entry in (stored, manifest))
    if not before.same_model(now):
        raise RunError(
            f"{folder} holds a run of {before.model} (weights {before.weights_hash}), not of {now.model} "
            f"(weights {now.weights_hash}); name another folder."
        )
    for entry in SAME_ENTRIES:
        if stored.get(entry) != manifest[entry]:
            raise RunError(
                f"{folder} holds a run with another {_difference(stored.get(entry), manifest[entry], entry)}; use the "
                "same settings to continue it, or name another folder."
            )
    if (before.versions, before.template_hash) != (now.versions, now.template_hash):
        raise RunError(
            f"{folder} holds a run with other package versions or another chat template; name another folder."
        )


def claim(folder: Path) -> None:
    """Make an empty folder for a run.

    Raises:
        RunError: Where it holds something else, or cannot be made.
    """
    try:
        # files of an earlier start that was killed at once are no obstacle
        if folder.exists() and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise RunError(f"{folder} exists and is not a run folder; name a new or empty folder.")
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); name a folder you may write to.") from error
    make_folder(folder, RunError)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the manifest of a run of any version."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        RunError: Where there is none, or one of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder; name one that interp score, steer or safety wrote.")
    stored = read(path)
    if stored.get("format") != FORMAT:
        raise RunError(
            f"{folder} holds a run of the format {stored.get('format')!r}, this version reads {FORMAT!r}; make the run "
            "again in another folder."
        )
    return stored


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises RunError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}); delete it and run again.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, expected an object; delete it and run again.")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all. Raises RunError."""
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode(), RunError, in_run=True)


def _difference(before: Any, now: Any, entry: str) -> str:
    """The first setting that differs, as text."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            if before.get(name) != now[name]:
                if isinstance(now[name], dict) and isinstance(before.get(name), dict):
                    return _difference(before[name], now[name], name)
                return f"{entry} ({name} was {before.get(name)!r}, now {now[name]!r})"
    return f"{entry} ({before!r}, now {now!r})"
