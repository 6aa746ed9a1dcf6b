"""Stages and cells: a run is a list of stages, a stage is made in cells, and each finished cell is a file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from interp.analyses.costs import Cost
from interp.analyses.results import codec
from interp.analyses.results.result import Result
from interp.hooks.prompts.prompts import Prompts

if TYPE_CHECKING:
    from interp.runs.run import Run


@codec.result
@dataclass(frozen=True, eq=False)
class CellRecord:
    """The content of the file of a finished cell."""

    result: Any
    """a Result, or None where there is none"""
    seconds: float
    """time that it took"""
    texts: tuple[str, ...] = ()
    """how each of its prompts begins, or what it asks"""
    missing: str = ""
    """why there is no result"""
    run: str = ""
    """id of the run that it belongs to"""
    stage: str = ""
    """name of its stage"""
    key: str = ""
    """its place in the stage"""


@dataclass(frozen=True, eq=False)
class Cell:
    """The smallest piece of work that is kept."""

    key: str
    """file name"""
    work: Callable[[Path], Result]
    """makes the result; a function that keeps its own steps does so in the folder that it is given"""
    texts: tuple[str, ...] = ()
    """how each of its prompts begins, or what it asks"""


@dataclass(frozen=True, eq=False)
class Stage:
    """One result of a run and how it is made."""

    name: str
    """name of its result"""
    cells: Callable[["Run"], Sequence[Cell]]
    """called when the results in `needs` are there"""
    needs: tuple[str, ...] = ()
    """results that must be there before; without them the stage is left out and the reason is recorded"""
    ready: Callable[["Run"], str] | None = None
    """gives the reason why the stage cannot be made, "" where it can"""
    prompts: tuple[tuple[Prompts, int], ...] = ()
    """prompts that the model reads, with the new tokens that must fit after them"""
    n_cells: int = 1
    """number of cells, for progress bars"""
    shown: bool = True
    """whether reports and summaries show its result"""
    optional: bool = False
    """whether an error of the method is recorded in place of its result"""
    join: Callable[[Sequence[Any]], Result] | None = None
    """by default the `concat` of the results' type"""
    cost: Callable[[nn.Module], Cost] | None = field(default=None, repr=False)
    """the cost of the stage on a model, where it is known"""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its cells, known before they are made."""
        return tuple(map(cell_key, range(self.n_cells)))

    def joined(self, parts: Sequence[Result]) -> Result:
        """The results of the cells as one."""
        if self.join is not None:
            return self.join(parts)
        return join(parts)


def cell_key(number: int) -> str:
    """The key of a cell by its number in the stage."""
    return f"{number:04d}"


def join(parts: Sequence[Result]) -> Result:
    """Results of the cells of one stage as one, by the `concat` of their type."""
    if len(parts) == 1:
        return parts[0]
    kind: Any = type(parts[0])
    return kind.concat(list(parts))


def single(name: str, work: Callable[["Run", Path], Result], **more: Any) -> Stage:
    """A stage of one cell.

    Args:
        name: Name of its result.
        work: Makes the result from the run, with a folder for steps that it keeps itself.
        more: Further fields of `Stage`.

    Returns:
        Stage: the stage.
    """
    return Stage(name, lambda run: (Cell(cell_key(0), lambda steps: work(run, steps)),), **more)


def prompts_of(stages: Sequence[Stage]) -> Iterator[tuple[str, Prompts]]:
    """Name and prompts of every stage that reads some, numbered where a stage has several sets."""
    for stage in stages:
        for number, (prompts, _) in enumerate(stage.prompts):
            yield (stage.name if len(stage.prompts) == 1 else f"{stage.name}, {number}"), prompts
