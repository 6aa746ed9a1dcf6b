"""The results of a run, read back from its folder without the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.analyses.results import codec
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.errors import InterpError, RunError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.runs import folder as folders
from interp.runs.stage import CellRecord, join


@dataclass(frozen=True, eq=False)
class RunResults(Mapping[str, Any]):
    """Results by name, in the order of a report; what a report is made from.

    Names are those of the analyses ("retrieval"), of their controls ("retrieval.control") and of other stages
    ("steering", "refusals").
    """

    provenance: Provenance
    """the model and versions"""
    layout: HeadLayout
    """layers and heads of the model"""
    results: dict[str, Result]
    """name -> result"""
    settings: dict[str, Any] = field(default_factory=dict)
    """the plan of the run"""
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """analysis -> how each of its prompts begins, or what it asks"""
    missing: dict[str, str] = field(default_factory=dict)
    """name of a result that could not be made -> why"""
    seconds: float = 0.0
    """time spent measuring, over all sessions"""
    own_prompts: bool = False
    """whether the user's own prompts took the place of the standard ones"""

    @property
    def scores(self) -> dict[str, HeadScores]:
        """The head tables of the analyses, in the order of a report."""
        return {name: found for name, found in self.results.items() if isinstance(found, HeadScores)}

    def control(self, name: str) -> Result | None:
        """The control of an analysis, None where there is none."""
        return self.results.get(f"{name}.control")

    def summary(self, top: int = 10) -> str:
        """All results as text, for a terminal.

        Args:
            top: Number of heads to list of each table.

        Returns:
            The text.
        """
        lines = []
        for name, found in self.results.items():
            text = found.summary(top)
            lines += [text] if isinstance(found, HeadScores) else [f"{name}:", text]
        return "\n".join([*lines, *(f"{name}: not made, {why}" for name, why in self.missing.items())])

    def __getitem__(self, name: str) -> Any:
        if name not in self.results:
            raise UsageError(f"the run has no result {name!r}; it has {', '.join(map(repr, self.results))}.")
        return self.results[name]

    # Mapping's own versions of these two expect a KeyError
    def __contains__(self, name: object) -> bool:
        return name in self.results

    def get(self, name: str, default: Any = None) -> Any:
        """A result, or the default where the run has none of that name."""
        return self.results.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def read_results(folder: str | Path) -> RunResults:
    """The results of a run folder, finished or not; no model is needed.

    A stage that is not finished is joined from its finished cells. Finished runs in folders inside of this one, such as
    a steering run, come along under "folder/name".

    Args:
        folder: A folder that `Run.finish` has written.

    Returns:
        RunResults: every result by its name.

    Raises:
        RunError: Where the folder is not a run, is of another version, or has no finished cell yet.
        ScoreError: For a run of another model inside of it.
    """
    folder = Path(folder)
    manifest = folders.read_manifest(folder)
    results: dict[str, Result] = {}
    texts: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    seconds = 0.0
    for stage in manifest["stages"]:
        record = _found(folder, stage["name"])
        if record is None:
            continue
        seconds += record.seconds
        if stage["shown"]:
            results |= {} if record.result is None else {stage["name"]: record.result}
            texts |= {stage["name"]: record.texts} if record.texts else {}
            missing |= {stage["name"]: record.missing} if record.missing else {}
    found = RunResults(
        provenance=Provenance.from_dict(manifest["provenance"]),
        layout=HeadLayout(**manifest["layout"]),
        results=results,
        settings=manifest["plan"],
        texts=texts,
        missing=missing,
        seconds=seconds,
        own_prompts=manifest.get("own_prompts", False),
    )
    for inner in sorted(path.parent for path in folder.glob(f"*/{folders.MANIFEST}")):
        if is_finished(inner):
            other = read_results(inner)
            found.provenance.check_model(other.provenance)
            results |= {f"{inner.name}/{name}": result for name, result in other.results.items()}
    if not results:
        raise RunError(f"{folder} has no finished result yet; run the same command with the same settings to continue.")
    return found


def is_finished(folder: Path) -> bool:
    """Whether every stage of a run has its result, or the reason why it has none."""
    return all(stage_record(folder, stage["name"]) for stage in folders.read_manifest(folder)["stages"])


def result_path(folder: Path, name: str) -> Path:
    """The file of a result, which `Result.load` reads.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        Its path.
    """
    return folder / "results" / f"{name}.json"


def record_path(folder: Path, name: str) -> Path:
    """The file that is written last of a stage, with the seconds that it took and the reason for a missing result.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        Its path.
    """
    return folder / "stages" / f"{name}.json"


def cell_files(folder: Path, name: str) -> Path:
    """The folder of the cells of a stage.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        Its path.
    """
    return folder / "cells" / name


def is_whole(path: Path) -> bool:
    """Whether the file of a cell or result is there and can be read."""
    if not path.is_file():
        return False
    try:
        codec.load(path)
    except InterpError:
        return False
    return True


def stage_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a finished stage: seconds, texts and why it has no result; None where it is not finished.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        The record, or None.
    """
    path = record_path(folder, name)
    if not path.is_file():
        return None
    try:
        stored = folders.read(path)
    except RunError:
        return None
    return stored if stored["missing"] or is_whole(result_path(folder, name)) else None


def _found(folder: Path, name: str) -> CellRecord | None:
    """The state of a stage: its result, or its finished cells joined; None where there is nothing."""
    stored = stage_record(folder, name)
    if stored is not None:
        result = None if stored["missing"] else codec.load(result_path(folder, name))
        return CellRecord(result, stored["seconds"], tuple(stored["texts"]), stored["missing"])
    records = [codec.load(path) for path in sorted(cell_files(folder, name).glob("*.json")) if is_whole(path)]
    parts = [record.result for record in records if record.result is not None]
    if not parts:
        return None
    texts = tuple(text for record in records for text in record.texts)
    return CellRecord(join(parts), sum(record.seconds for record in records), texts)
