"""A run: one plan on one model in one folder; killed at any moment, the same call continues where it stopped."""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from interp.analyses.results import codec
from interp.analyses.results.files import digests
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.leading import leading_heads
from interp.analyses.results.result import Result
from interp.errors import InterpError, RunError, ScoreError
from interp.hooks.model.chat_template import fixed_date
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.portable import portable, portable_text
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context
from interp.hooks.writer import make_folder
from interp.runs import folder as folders
from interp.runs.date import dated
from interp.runs.estimate import check_memory
from interp.runs.lock import only_writer
from interp.runs.plan import Plan
from interp.runs.results import RunResults, read_results
from interp.runs.stage import Cell, CellRecord, Stage, prompts_of
from interp.runs.stage_files import DamagedError, StageFiles, check_strays


@dataclass(frozen=True, eq=False)
class Run:
    """One plan on one model, in one folder."""

    folder: Path
    plan: Plan
    model: nn.Module
    tokenizer: Any
    provenance: Provenance
    layout: HeadLayout
    stages: tuple[Stage, ...]
    own_prompts: bool
    # the id that its manifest and all its cells hold
    run: str = ""

    @classmethod
    def open(
        cls, folder: str | Path, plan: Plan, model: nn.Module, tokenizer: Any, own: Prompts | None = None
    ) -> "Run":
        """Begin a run, or continue the one that the folder holds.

        Every prompt is checked against the context of the model before anything is computed.

        Args:
            folder: A new or empty folder, or one that a run of the same plan and model was begun in.
            plan: A `ScorePlan`, `SteerPlan` or `SafetyPlan`.
            model: A transformers causal language model, or a TransformerBridge over one.
            tokenizer: Its tokenizer.
            own: Prompts that take the place of the standard ones.

        Returns:
            Run: call `finish` to make what is not made yet.

        Raises:
            RunError: Where the folder cannot be written, holds something else or another run, or is being written by
                another process.
            UsageError: For a plan that does not fit the model.
            PromptError: For a prompt that does not fit.
        """
        layout = HeadLayout.of(model)
        tokenizer = dated(folder, tokenizer)
        stages = tuple(plan.stages(model, tokenizer, own))
        for stage in stages:
            for prompts, new_tokens in stage.prompts:
                check_context(model, prompts, new_tokens)
        source = Provenance.of(model, tokenizer, seed=plan.seed)
        run = cls(Path(folder), plan, model, tokenizer, source, layout, stages, own is not None)
        return replace(run, run=folders.begin(run.folder, run._manifest()))

    def _manifest(self) -> dict[str, Any]:
        import interp

        return {
            "interp": interp.__version__,
            "recipe": self.plan.recipe,
            "plan": portable(asdict(cast(Any, self.plan))),
            "inputs": digests(asdict(cast(Any, self.plan))),
            "layout": asdict(self.layout),
            "own_prompts": self.own_prompts,
            "date": fixed_date(self.tokenizer),
            "prompts": {name: prompts.fingerprint() for name, prompts in prompts_of(self.stages)},
            "stages": [{"name": stage.name, "shown": stage.shown, "cells": list(stage.keys)} for stage in self.stages],
            "provenance": self.provenance.to_dict(),
        }

    def finish(self, progress: bool = True) -> RunResults:
        """Make what is not made yet, cell by cell, and read the whole run back.

        Files that are damaged are made again. No other process can write to the folder in the meantime.

        Args:
            progress: Show a bar once it takes longer than two seconds.

        Returns:
            RunResults: every result by its name.

        Raises:
            CostError: If the activations of a stage do not fit into memory, before anything is computed.
            RunError: If another process writes to the folder, or it holds files that are not of this run.
        """
        from tqdm.auto import tqdm

        n_cells = sum(stage.n_cells for stage in self.stages)
        with only_writer(self.folder):
            folders.check_same(self.folder, self.run)
            folders.sweep_all(self.folder)
            check_strays(self.folder, map(self._files, self.stages))
            check_memory([stage for stage in self.stages if self._record(stage) is None], self.model)
            with tqdm(total=n_cells, desc="run", disable=not progress, delay=2) as bar:
                for stage in self.stages:
                    bar.set_description(stage.name, refresh=False)
                    self._make(stage, bar)
        return read_results(self.folder)

    def _files(self, stage: Stage) -> StageFiles:
        return StageFiles(self.folder, self.run, stage.name, stage.keys, stage.shown)

    def _record(self, stage: Stage, cells: bool = True) -> dict[str, Any] | None:
        """The record of a stage, None where it is not finished or has to be made again."""
        try:
            return self._files(stage).record(cells)
        except DamagedError:
            return None

    def _make(self, stage: Stage, bar: Any) -> None:
        if self._record(stage) is not None:
            bar.update(stage.n_cells)
            return
        missing = self._reason(stage)
        files, n_made = self._files(stage), 0
        parts, texts, seconds = [], [], 0.0
        for cell in () if missing else stage.cells(self):
            record = self._cell(stage, cell)
            missing = missing or record.missing
            parts += [] if record.result is None else [record.result]
            texts += record.texts
            seconds += record.seconds
            n_made += 1
            bar.update()
        if not missing:
            self._write(files.result_path, stage.joined(parts))
        files.finish(seconds, texts, missing, n_made)
        # what was made from an earlier result of this name is made again
        for other in self.stages:
            if stage.name in other.needs:
                self._drop(other)

    def _cell(self, stage: Stage, cell: Cell) -> CellRecord:
        files = self._files(stage)
        try:
            kept = files.cell(cell.key)
        except DamagedError:
            kept = None
        if kept is None:
            started, missing, result = time.perf_counter(), "", None
            steps = self.folder / "steps" / stage.name / cell.key
            try:
                result = cell.work(steps)
            except InterpError as error:
                if not stage.optional:
                    raise
                missing = portable_text(str(error))
            seconds = time.perf_counter() - started
            made = CellRecord(result, seconds, cell.texts, missing, self.run, stage.name, cell.key)
            self._write(files.cell_path(cell.key), made)
            kept = codec.load(files.cell_path(cell.key))
        return kept

    def _write(self, path: Path, value: Result | CellRecord) -> None:
        folders.check_same(self.folder, self.run)
        try:
            codec.save(value, make_folder(path.parent) / path.name, in_run=True)
        except ScoreError as error:
            raise RunError(str(error)) from error

    def _drop(self, stage: Stage) -> None:
        """Remove what is kept of a stage."""
        files = self._files(stage)
        files.record_path.unlink(missing_ok=True)
        for kept in (files.cells, self.folder / "steps" / stage.name):
            shutil.rmtree(kept, ignore_errors=True)

    def _reason(self, stage: Stage) -> str:
        """Why a stage cannot be made; "" where it can."""
        for need in stage.needs:
            if self.result(need) is None:
                return f"it needs the result {need!r}, which this run does not have."
        return stage.ready(self) if stage.ready is not None else ""

    def result(self, name: str) -> Any:
        """A result that is finished, None where there is none yet."""
        stage = next((stage for stage in self.stages if stage.name == name), None)
        if stage is None or not (stored := self._record(stage, cells=False)) or stored["missing"]:
            return None
        return codec.load(self._files(stage).result_path)

    def __getitem__(self, name: str) -> Any:
        """A finished result. Raises UsageError for a name that the run does not have."""
        return read_results(self.folder)[name]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """The head tables that are finished, in the order of the stages."""
        found = {stage.name: self.result(stage.name) for stage in self.stages if stage.shown}
        return {name: table for name, table in found.items() if isinstance(table, HeadScores)}

    @property
    def named_heads(self) -> HeadSet:
        """The heads that the plan names; an empty set where it names none."""
        named = getattr(self.plan, "heads", "")
        return HeadSet.parse(named, self.layout) if named else HeadSet(())

    @property
    def leading(self) -> list[Head]:
        """The named heads, else the first of each table, then the second of each, without doubles."""
        return list(self.named_heads) or leading_heads(self.scores)
