"""The results of a run, read back from its folder without the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.errors import UsageError
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance


@dataclass(frozen=True, eq=False)
class RunResults(Mapping[str, Result]):
    """Results by name, in the order of a report; what a report is made from.

    Names are those of the analyses ("retrieval"), of their controls ("retrieval.control") and of other stages
    ("steering", "refusals").
    """

    provenance: Provenance
    layout: HeadLayout
    results: dict[str, Result]
    settings: dict[str, Any] = field(default_factory=dict)
    """the plan of the run"""
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """analysis -> how each of its prompts begins, or what it asks"""
    missing: dict[str, str] = field(default_factory=dict)
    """name of a result that could not be made -> why"""
    seconds: float = 0.0
    """time spent measuring, over all sessions"""

    @property
    def scores(self) -> dict[str, HeadScores]:
        """The head tables of the analyses, in the order of a report."""
        return {name: found for name, found in self.results.items() if isinstance(found, HeadScores)}

    def control(self, name: str) -> Result | None:
        """The control of an analysis, None where there is none."""
        return self.results.get(f"{name}.control")

    def summary(self, top: int = 10) -> str:
        """All results as text, for a terminal."""
        return "\n".join(found.summary(top) for found in self.results.values())

    def __getitem__(self, name: str) -> Result:
        if name not in self.results:
            raise UsageError(f"the run has no result {name!r}; it has {', '.join(map(repr, self.results))}.")
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)
