"""The results of a run, read back from its folder without the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.errors import RunError, UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.runs import folder as folders
from interp.runs.stage_files import DamagedError, StageFiles, check_strays, stages_of


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
    unfinished: dict[str, tuple[int, int]] = field(default_factory=dict)
    """name of a stage that is not finished -> number of its finished cells, and of all its cells"""

    @property
    def scores(self) -> dict[str, HeadScores]:
        """The head tables of the analyses, in the order of a report."""
        return {name: found for name, found in self.results.items() if isinstance(found, HeadScores)}

    def control(self, name: str) -> Result | None:
        """The control of an analysis, None where there is none."""
        return self.results.get(f"{name}.control")

    @property
    def progress(self) -> str:
        """How far an unfinished run is, in sentences; empty for a finished one."""
        if not self.unfinished:
            return ""
        begun = [f"{name} ({made} of {n} cells)" for name, (made, n) in self.unfinished.items() if made]
        absent = [name for name, (made, _) in self.unfinished.items() if not made]
        made, n = (sum(counts) for counts in zip(*self.unfinished.values(), strict=True))
        text = f"This run is not finished: {made} of {n} cells of {len(self.unfinished)} stages are made."
        text += f" Numbers are of the finished cells alone for {', '.join(begun)}." if begun else ""
        text += f" Nothing is made yet of {', '.join(absent)}." if absent else ""
        return f"{text} Run the same command with the same settings to continue."

    def summary(self, top: int = 10) -> str:
        """All results as text, for a terminal.

        Args:
            top: Number of heads to list of each table.

        Returns:
            The text.
        """
        lines = [self.progress] if self.unfinished else []
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

    Every file is compared with its checksum. A stage that is not finished is joined from its finished cells, and
    `unfinished` counts them. Finished runs in folders inside of this one, such as a steering run, come along under
    "folder/name"; of others, `unfinished` names the stages.

    Args:
        folder: A folder that `Run.finish` has written.

    Returns:
        RunResults: every result by its name.

    Raises:
        RunError: Where the folder is not a run, is of another version, has no finished cell yet, or holds a file that
            is damaged, missing or not of the run.
        ScoreError: For a run of another model inside of it.
    """
    folder = Path(folder)
    manifest = folders.read_manifest(folder)
    stages = stages_of(folder, manifest)
    check_strays(folder, stages)
    results: dict[str, Result] = {}
    texts: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    unfinished: dict[str, tuple[int, int]] = {}
    seconds = 0.0
    for stage in stages:
        state = stage.state()
        unfinished |= {} if state.finished else {stage.name: (state.n_made, state.n_cells)}
        record = state.record
        if record is None:
            continue
        seconds += record.seconds
        if stage.shown:
            results |= {} if record.result is None else {stage.name: record.result}
            texts |= {stage.name: record.texts} if record.texts else {}
            missing |= {stage.name: record.missing} if record.missing else {}
    found = RunResults(
        provenance=Provenance.from_dict(manifest["provenance"]),
        layout=HeadLayout(**manifest["layout"]),
        results=results,
        settings=manifest["plan"],
        texts=texts,
        missing=missing,
        seconds=seconds,
        own_prompts=manifest.get("own_prompts", False),
        unfinished=unfinished,
    )
    if not results:
        made, n = (sum(counts) for counts in zip(*unfinished.values(), strict=True)) if unfinished else (0, 0)
        raise RunError(
            f"{folder} has no finished result yet ({made} of {n} cells are made); run the same command with the same "
            "settings to continue."
        )
    for inner in sorted(path.parent for path in folder.glob(f"*/{folders.MANIFEST}")):
        _add_inner(found, inner)
    return found


def _add_inner(found: RunResults, inner: Path) -> None:
    """Add the results of a finished run inside of another, or the state of one that is not finished."""
    states = {stage.name: stage.state() for stage in stages_of(inner, folders.read_manifest(inner))}
    if left := {name: state for name, state in states.items() if not state.finished}:
        for name, state in left.items():
            found.unfinished[f"{inner.name}/{name}"] = (state.n_made, state.n_cells)
        return
    other = read_results(inner)
    found.provenance.check_model(other.provenance)
    for name, result in other.results.items():
        found.results[f"{inner.name}/{name}"] = result


def is_finished(folder: str | Path) -> bool:
    """Whether every stage of a run has its result, or the reason why it has none, and no file is damaged.

    Args:
        folder: The folder of a run.

    Returns:
        Whether it is finished and whole.

    Raises:
        RunError: Where the folder is not a run, or holds a file that is not of the run.
    """
    folder = Path(folder)
    try:
        return all(stage.record() is not None for stage in stages_of(folder, folders.read_manifest(folder)))
    except DamagedError:
        return False


def result_path(folder: Path, name: str) -> Path:
    """The file of a result, which `Result.load` reads.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        Its path.
    """
    return StageFiles(folder, "", name, ()).result_path


def record_path(folder: Path, name: str) -> Path:
    """The file that is written last of a stage, with the checksums of its cells and of its result.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        Its path.
    """
    return StageFiles(folder, "", name, ()).record_path


def cell_files(folder: Path, name: str) -> Path:
    """The folder of the cells of a stage.

    Args:
        folder: The folder of a run.
        name: Name of the stage.

    Returns:
        Its path.
    """
    return StageFiles(folder, "", name, ()).cells
