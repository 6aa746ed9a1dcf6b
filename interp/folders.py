"""The folder of a staged run: a manifest that says what it is of, and JSON files, each written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from interp.analyses.results.files import write_atomic
from interp.errors import RunError, ScoreError
from interp.hooks.model.provenance import Provenance


def begin(path: Path, manifest: dict[str, Any], what: str, same: tuple[str, ...]) -> None:
    """Write a manifest, or make sure that the one there is of the same model, versions and settings.

    what: "steering run", for messages; same: entries that must not differ, beside "origin". Raises RunError.
    """
    folder = path.parent
    if path.exists():
        stored = stored_manifest(path, manifest["format"], what)
        before, now = (Provenance.from_dict(m["origin"]) for m in (stored, manifest))
        if not before.same_model(now):
            raise RunError(f"{folder} holds a {what} of {before.model}: name another folder.")
        for key in same:
            if stored.get(key) != json.loads(json.dumps(manifest[key])):
                raise RunError(f"{folder} holds a {what} with another {key}: use the same, or a new folder.")
        if (before.versions, before.template_hash) != (now.versions, now.template_hash):
            raise RunError(f"{folder} holds a {what} of other versions or another template: use a new folder.")
        return
    claim(folder, what)
    write(path, manifest)


def claim(folder: Path, what: str) -> None:
    """Make a folder for a run. Raises RunError where it holds something else, or cannot be made."""
    try:
        # what an earlier start that was killed at once has left is no obstacle
        if folder.exists() and any(not p.name.endswith(".tmp") for p in folder.iterdir()):
            raise RunError(f"{folder} exists and is no {what}: name a new or empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}): name a folder you may write to.") from error


def stored_manifest(path: Path, format: str, what: str) -> dict[str, Any]:
    """The manifest in a file. Raises RunError."""
    if not path.is_file():
        raise RunError(f"{path.parent} is no {what}: name the folder of one.")
    stored = read(path)
    if stored.get("format") != format:
        raise RunError(
            f"{path} is no manifest of format {format!r} but of format {stored.get('format')!r}: make the run again, "
            "in another folder."
        )
    return stored


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises RunError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}): delete it and run again.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, expected an object: delete it and run again.")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Raises RunError."""
    try:
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    except ScoreError as error:
        raise RunError(str(error)) from error
