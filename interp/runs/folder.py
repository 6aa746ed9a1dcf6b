"""The folder of a run: its manifest, which names the run and lists its cells, and who may write to it."""

import json
import re
import uuid
from pathlib import Path
from typing import Any

from interp.analyses.results.files import is_sealed, seal
from interp.errors import RunError
from interp.hooks.limits import parse_json, read_text
from interp.hooks.model.provenance import Provenance
from interp.hooks.writer import RUN_MANIFEST, RUN_PARTS, make_folder, sweep, write_atomic
from interp.runs.lock import LOCK, only_writer

FORMAT = "interp.run/3"
MANIFEST = RUN_MANIFEST
SAME_ENTRIES = ("interp", "recipe", "plan", "inputs", "date", "prompts")
"""entries of a manifest that must not differ when a run continues"""
LABELS = {"interp": "version of interp"}
"""words for these entries, where an entry is named otherwise"""
ENTRIES = {"run": str, "plan": dict, "layout": dict, "provenance": dict, "stages": list}
"""entries that every manifest has, and their types"""
STAGE_NAME = re.compile(r"[\w][\w.,+-]*")
"""names of stages and keys of cells, which are parts of file names"""


def begin(folder: Path, manifest: dict[str, Any]) -> str:
    """Write the manifest of a new run, or check that the one in the folder is of the same model, plan and versions.

    Args:
        folder: The folder.
        manifest: The manifest, without an id.

    Returns:
        The id of the run.

    Raises:
        RunError: Where the folder holds something else, another run, or cannot be made, or another process writes to
            it.
    """
    manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
    # a folder of something else gets no lock
    claim(folder) if not (folder / MANIFEST).exists() else read_manifest(folder)
    with only_writer(folder):
        sweep_all(folder)
        if (folder / MANIFEST).exists():
            return _continued(folder, manifest)
        # another process may have been quicker
        claim(folder)
        run = uuid.uuid4().hex
        write(folder / MANIFEST, seal({"format": FORMAT, "run": run, **manifest}))
        return run


def _continued(folder: Path, manifest: dict[str, Any]) -> str:
    """The id of the run in a folder. Raises RunError where it is another one."""
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
                f"{folder} holds a run that differs in its {_difference(stored.get(entry), manifest[entry], entry)}; "
                "use the same settings to continue it, or name another folder."
            )
    if (before.versions, before.template_hash) != (now.versions, now.template_hash):
        raise RunError(
            f"{folder} holds a run with other package versions or another chat template; name another folder."
        )
    if stored["stages"] != manifest["stages"]:
        raise RunError(
            f"{folder} holds a run with other stages, as when other packages are installed; name another folder."
        )
    return stored["run"]


def claim(folder: Path) -> None:
    """Make an empty folder for a run.

    Raises:
        RunError: Where it holds something else, or cannot be made.
    """
    try:
        # files of an earlier start that was killed at once are no obstacle, and neither is a run that another process
        # has begun since the caller looked
        others = folder.exists() and any(path.name != LOCK and path.suffix != ".tmp" for path in folder.iterdir())
        if others and not is_run(folder):
            raise RunError(f"{folder} exists and is not a run folder; name a new or empty folder.")
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); name a folder you may write to.") from error
    make_folder(folder, RunError)


def check_same(folder: Path, run: str) -> None:
    """Raise RunError where a folder does not hold the run with an id any more."""
    if read_manifest(folder)["run"] != run:
        raise RunError(f"{folder} was replaced by another run; name another folder.")


def sweep_all(folder: Path) -> None:
    """Remove the hidden files that killed processes left anywhere in the folder of a run."""
    for part in (*RUN_PARTS, "steps"):
        for path in (folder / part).rglob("*/"):
            sweep(path)
        sweep(folder / part)
    sweep(folder)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the manifest of a run of any version."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        RunError: Where there is none, or one of another version, or one that was changed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder; name one that interp score, steer or safety wrote.")
    # without its manifest nothing says what the other files of the folder are
    stored = read(path, "make the run again in another folder")
    if stored.get("format") != FORMAT:
        raise RunError(
            f"{folder} holds a run of the format {stored.get('format')!r}, this version reads {FORMAT!r}; make the run "
            "again in another folder."
        )
    if not is_sealed(stored):
        raise RunError(
            f"{path} was changed or damaged after it was written, so nothing says what the run measured; make the run "
            "again in another folder."
        )
    wrong = [name for name, kind in ENTRIES.items() if not isinstance(stored.get(name), kind)]
    if wrong or not all(map(_is_stage, stored["stages"])):
        raise RunError(f"{path} has no usable {', '.join(wrong) or 'stages'}; make the run again in another folder.")
    return stored


def _is_stage(stage: Any) -> bool:
    """Whether an entry of a manifest is a stage whose names can be file names."""
    if not isinstance(stage, dict) or not isinstance(stage.get("cells"), list):
        return False
    names = [stage.get("name"), *stage["cells"]]
    return all(isinstance(name, str) and STAGE_NAME.fullmatch(name) for name in names) and "shown" in stage


def read(path: Path, action: str = "delete it and run again") -> dict[str, Any]:
    """The JSON object in a file. Raises RunError, which ends with what to do."""
    try:
        content = parse_json(read_text(path, RunError))
    except ValueError as error:
        raise RunError(f"{path} cannot be read as JSON ({error}); {action}.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, expected an object; {action}.")
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
    return f"{LABELS.get(entry, entry)} ({before!r}, now {now!r})"
