"""The files of a stage in the folder of a run: each is known to belong there and to be unchanged before it is read."""

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.analyses.results import codec
from interp.analyses.results.files import is_sealed, seal
from interp.errors import InterpError, RunError
from interp.hooks.writer import RUN_PARTS, make_folder
from interp.runs import folder as folders
from interp.runs.stage import CellRecord, join

AGAIN = "run the same command with the same settings to make it again"


class DamagedError(RunError):
    """A file of a run that is missing or was changed, and that the same command makes again."""


@dataclass(frozen=True)
class StageState:
    """How far a stage is."""

    record: CellRecord | None
    """its result, or its finished cells joined; None where there is nothing"""
    n_made: int
    """number of finished cells"""
    n_cells: int
    """number of all cells"""
    finished: bool


@dataclass(frozen=True)
class StageFiles:
    """The files of one stage."""

    folder: Path
    run: str
    """id of the run"""
    name: str
    keys: tuple[str, ...]
    """keys of its cells"""
    shown: bool = True

    @property
    def cells(self) -> Path:
        """The folder of its cells."""
        return self.folder / "cells" / self.name

    @property
    def result_path(self) -> Path:
        """The file of its result."""
        return self.folder / "results" / f"{self.name}.json"

    @property
    def record_path(self) -> Path:
        """The file that is written last."""
        return self.folder / "stages" / f"{self.name}.json"

    def cell_path(self, key: str) -> Path:
        """The file of a cell."""
        return self.cells / f"{key}.json"

    @property
    def paths(self) -> set[Path]:
        """Every file that the stage may have."""
        made = {self.result_path, *map(self.cell_path, self.keys)}
        return {self.record_path, *made, *(path.with_suffix(".safetensors") for path in made)}

    def cell(self, key: str) -> CellRecord | None:
        """A finished cell, None where there is none.

        Raises:
            DamagedError: If its file was changed.
            RunError: If it belongs to another run, stage or place.
        """
        path = self.cell_path(key)
        if not path.exists():
            return None
        try:
            codec.checksum(path)
            found = codec.load(path)
        except InterpError as error:
            raise DamagedError(f"{error} It is a cell of a run: {AGAIN}.") from error
        if not isinstance(found, CellRecord) or (found.run, found.stage, found.key) != (self.run, self.name, key):
            raise RunError(f"{path} belongs to another run or to another place in this one; remove it.")
        return found

    def finish(self, seconds: float, texts: Iterable[str], missing: str, n_made: int) -> None:
        """Write the record of a stage, which lists its cells and its result with their checksums.

        Args:
            seconds: Time that it took.
            texts: How each of its prompts begins, or what it asks.
            missing: Why there is no result.
            n_made: Number of its cells; a stage that cannot be made has none.
        """
        content = {
            "run": self.run, "stage": self.name, "seconds": seconds, "texts": list(texts), "missing": missing,
            "cells": {key: codec.checksum(self.cell_path(key)) for key in self.keys[:n_made]},
            "result": "" if missing else codec.checksum(self.result_path),
        }  # fmt: skip
        make_folder(self.record_path.parent, RunError)
        folders.write(self.record_path, seal(content))

    def record(self, cells: bool = True) -> dict[str, Any] | None:
        """The record of a finished stage, None where it is not finished.

        Args:
            cells: Compare all cells with it too.

        Raises:
            DamagedError: If it, the result or a cell is missing or was changed.
            RunError: If it belongs to another run or stage.
        """
        path = self.record_path
        if not path.exists():
            return None
        try:
            stored = folders.read(path)
        except RunError as error:
            raise DamagedError(f"{path} is damaged; {AGAIN}.") from error
        if not is_sealed(stored):
            raise DamagedError(f"{path} was changed or damaged after it was written; {AGAIN}.")
        if (stored.get("run"), stored.get("stage")) != (self.run, self.name):
            raise RunError(f"{path} belongs to another run or to another place in this one; remove it.")
        if not stored["missing"]:
            self._compare(self.result_path, stored["result"])
        for key in stored["cells"] if cells else ():
            self._compare(self.cell_path(key), stored["cells"][key])
        return stored

    def _compare(self, path: Path, checksum: str) -> None:
        try:
            same = codec.checksum(path) == checksum
        except InterpError as error:
            raise DamagedError(f"{path} is missing or damaged; {AGAIN}.") from error
        if not same:
            raise DamagedError(f"{path} is not the file that the run wrote; {AGAIN}.")

    def state(self) -> StageState:
        """The result of a stage, or its finished cells joined.

        Raises:
            RunError: For a file that is damaged or does not belong to the run.
        """
        stored, n_cells = self.record(), len(self.keys)
        if stored is not None:
            result = None if stored["missing"] else codec.load(self.result_path)
            record = CellRecord(result, stored["seconds"], tuple(stored["texts"]), stored["missing"])
            return StageState(record, n_cells, n_cells, finished=True)
        records = [found for key in self.keys if (found := self.cell(key)) is not None]
        parts = [found.result for found in records if found.result is not None]
        if not parts:
            return StageState(None, len(records), n_cells, finished=False)
        texts = tuple(text for found in records for text in found.texts)
        record = CellRecord(join(parts), sum(found.seconds for found in records), texts)
        return StageState(record, len(records), n_cells, finished=False)


def stages_of(folder: Path, manifest: Mapping[str, Any]) -> tuple[StageFiles, ...]:
    """The files of all stages that a manifest lists, in its order.

    Args:
        folder: The folder of the run.
        manifest: Its manifest.
    """
    return tuple(
        StageFiles(folder, manifest["run"], stage["name"], tuple(stage["cells"]), stage["shown"])
        for stage in manifest["stages"]
    )


def check_strays(folder: Path, stages: Iterable[StageFiles]) -> None:
    """Refuse files in the folders of a run that its manifest does not list; hidden files are left out.

    Args:
        folder: The folder of the run.
        stages: All stages.

    Raises:
        RunError: For a file that the run does not have, or one that is no regular file.
    """
    known = {path for stage in stages for path in stage.paths}
    for part in RUN_PARTS:
        for place, inner, names in os.walk(folder / part):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for path in (Path(place) / name for name in names if not name.startswith(".")):
                if path not in known:
                    raise RunError(f"{path} is not a file of the run in {folder}; remove it.")
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise RunError(f"{path} is no regular file, so it is not of the run in {folder}; remove it.")
