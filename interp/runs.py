"""A run's folder: a manifest and the finished cells. Killed at any moment, the same call goes on where it stood."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import interp
from interp.analyses.causal import REPLY, CausalCheck, Condition, Outcome, ask, conditions
from interp.analyses.curve import Curve
from interp.analyses.identify import attention_influence
from interp.analyses.scores import HeadScores
from interp.analyses.tasks import judge
from interp.controls import CONTROLLED, control
from interp.findings import Findings, Steered, TokenView
from interp.folders import claim, read, stored_manifest, write
from interp.hooks.capture import check_context
from interp.hooks.heads import HeadLayout, HeadSet
from interp.hooks.prompts import Prompts
from interp.hooks.provenance import Provenance
from interp.kernels.errors import InterpError, RunError, UsageError
from interp.steerings import finished, steering_findings
from interp.studies import Plan, Study, check_prompts, passages, studies
from interp.views import view

FORMAT = "interp.run/1"
OUTCOME = ("verdicts", "replies", "answers", "questions")


@dataclass(frozen=True, eq=False)
class Cell:
    """The smallest piece of work that is kept: one batch of prompts under one analysis or condition."""

    name: str
    path: Path
    work: Callable[[], dict[str, Any]]
    """does it and gives what to write; scores write themselves"""


@dataclass(frozen=True, eq=False)
class Run:
    """One plan on one model, in one folder."""

    folder: Path
    plan: Plan
    model: nn.Module
    tokenizer: Any
    provenance: Provenance
    studies: tuple[Study, ...]
    needles: Prompts | None
    own: Prompts | None = None

    @classmethod
    def open(
        cls, folder: str | Path, plan: Plan, model: nn.Module, tokenizer: Any, own: Prompts | None = None
    ) -> "Run":
        """Begin a run, or go on with the one that the folder holds.

        Raises RunError where the folder cannot be written, holds something else, or holds a run of another model, plan
        or version; every prompt is checked against the model's context before anything is computed.
        """
        folder = Path(folder)
        layout = HeadLayout.of(model)
        heads = HeadSet.parse(plan.heads, layout) if plan.heads else HeadSet(())
        layout.check(heads)
        out = len(heads) or plan.k
        if plan.checked and 2 * out > len(layout.all()):
            raise UsageError(
                f"{out} heads out of {len(layout.all())} leave too few for a random control: take out at most half."
            )
        found = studies(plan, tokenizer, own)
        needles = check_prompts(plan, tokenizer) if plan.checked else None
        replies = {"retrieval": plan.reply}
        asked = [(study.prompts, replies.get(study.name, 0)) for study in found]
        for prompts, more in [*asked, *([(needles, REPLY)] if needles is not None else [])]:
            check_context(model, prompts, more)
        run = cls(
            folder, plan, model, tokenizer, Provenance.of(model, tokenizer, seed=plan.seed), tuple(found), needles, own
        )
        run._begin()
        return run

    def _begin(self) -> None:
        manifest = {
            "format": FORMAT,
            "interp": interp.__version__,
            "plan": json.loads(json.dumps(asdict(self.plan))),
            "layout": asdict(HeadLayout.of(self.model)),
            "prompts": {name: prompts.fingerprint() for name, prompts in self._asked.items()},
            "provenance": self.provenance.to_dict(),
        }
        if (self.folder / "manifest.json").exists():
            stored = read_manifest(self.folder)
            before = Provenance.from_dict(stored["provenance"])
            if not before.same_model(self.provenance):
                raise RunError(
                    f"{self.folder} holds a run of {before.model} (weights {before.weights_hash}), not of "
                    f"{self.provenance.model} (weights {self.provenance.weights_hash}): name another folder."
                )
            for key in ("interp", "plan", "prompts"):
                if stored.get(key) != manifest[key]:
                    raise RunError(
                        f"{self.folder} holds a run with another {_what(stored.get(key), manifest[key], key)}: "
                        "use the same settings to continue it, or name another folder."
                    )
            return
        claim(self.folder, "run folder")
        write(self.folder / "manifest.json", manifest)

    @property
    def _asked(self) -> dict[str, Prompts]:
        """What each analysis is asked on, by name."""
        asked = {study.name: study.prompts for study in self.studies}
        if "influence" in self.plan.analyses:
            asked["influence"] = passages(self.plan, self.tokenizer) if self.own is None else self.own
        return asked

    def cells(self) -> Iterator[Cell]:
        """All cells in order; those of the causal check need the scores before them, so finish each as it comes."""
        for study in self.studies:
            for number, batch in enumerate(study.prompts.batches(self.plan.batch_size)):
                path = self.folder / "cells" / f"{study.name}-{number:04d}.json"
                yield Cell(f"{study.name} {number}", path, lambda s=study, b=batch: self._score(s, b))
        if self.needles is not None and (self.plan.heads or self._answered):
            for c, condition in enumerate(self.conditions()):
                for number, batch in enumerate(self.needles.batches(self.plan.batch_size)):
                    path = self.folder / "cells" / f"{_check_name(c, condition)}-{number:04d}.json"
                    yield Cell(condition.name, path, lambda d=condition, b=batch: self._ask(d, b))
        for study in self.studies:
            if study.name in CONTROLLED and self.plan.check:
                path = self.folder / "cells" / f"control-{study.name}.json"
                yield Cell(f"{study.name}, heads out", path, lambda s=study: self._control(s))
        if "influence" in self.plan.analyses and (self.plan.heads or self._answered):
            yield Cell("influence", self.folder / "cells" / "influence.json", self._influence)
        if self._answered:
            yield Cell("attention on a text", self.folder / "cells" / "view.json", self._view)

    @property
    def _answered(self) -> bool:
        """Whether retrieval scored any head: a model that answers no needle has no retrieval heads to take out."""
        return "retrieval" in self.plan.analyses and bool(_top(self.folder, self.plan.k))

    def count(self) -> int:
        """How many cells there are."""
        size = self.plan.batch_size
        total = sum(-(-len(study.prompts) // size) for study in self.studies)
        if self.needles is not None:
            total += (2 + 2 * self.plan.draws) * -(-len(self.needles) // size)
        named = {study.name for study in self.studies}
        total += len(named & set(CONTROLLED)) if self.plan.check else 0
        return total + ("retrieval" in named) + ("influence" in self.plan.analyses)

    def _score(self, study: Study, batch: Prompts) -> dict[str, Any]:
        scores = study.run(self.model, batch, batch_size=self.plan.batch_size, seed=self.plan.seed, **study.settings)
        return {"scores": scores}

    def _ask(self, condition: Condition, batch: Prompts) -> dict[str, Any]:
        kind: Any = self.plan.kind
        replies = [reply.text for reply in ask(self.model, batch, condition.heads, kind, batch_size=len(batch))]
        verdicts = [judge(reply, prompt) for reply, prompt in zip(replies, batch, strict=True)]
        asked = {key: [str(prompt.meta.get(key[:-1], "")) for prompt in batch] for key in ("answers", "questions")}
        return {"verdicts": verdicts, "replies": replies, **asked}

    def _control(self, study: Study) -> dict[str, Any]:
        scores, plan = join_scores(self.folder, study.name), self.plan
        settings = {"k": plan.k, "draws": plan.draws, "seed": plan.seed, "batch_size": plan.batch_size}
        return control(study.name, self.model, study.prompts, scores, **settings).to_dict()

    def _influence(self) -> dict[str, Any]:
        heads = self.plan.heads or join_scores(self.folder, "retrieval")
        size = self.plan.batch_size
        return attention_influence(
            self.model, self._asked["influence"], heads, draws=self.plan.draws, batch_size=size, seed=self.plan.seed
        ).to_dict()

    def _view(self) -> dict[str, Any]:
        scores = join_scores(self.folder, "retrieval")
        prompts = next(study.prompts for study in self.studies if study.name == "retrieval")
        shown = min(range(len(prompts)), key=lambda i: (bool(scores.per_prompt[i].isnan().all()), len(prompts[i])))
        return asdict(view(self.model, prompts[shown : shown + 1], scores.top(8)))

    def conditions(self) -> tuple[Condition, ...]:
        """What the causal check takes out."""
        return _conditions(self.folder, asdict(self.plan), HeadLayout.of(self.model))

    def finish(self, progress: bool = True) -> Findings:
        """Do what is not done yet, cell by cell, and read the whole run back."""
        from tqdm.auto import tqdm

        (self.folder / "cells").mkdir(exist_ok=True)
        bar = tqdm(total=self.count(), desc="cells", disable=not progress, delay=2)
        for cell in self.cells():
            bar.set_description(cell.name, refresh=False)
            if not _done(cell.path):
                started = time.perf_counter()
                value = cell.work()
                scores = value.pop("scores", None)
                if scores is not None:
                    scores.save(cell.path.with_name(f"{cell.path.stem}.scores.json"))
                # written last: a cell is done where this file is
                seconds = time.perf_counter() - started
                write(cell.path, value | {"seconds": seconds, "scored": scores is not None})
            bar.update()
        bar.close()
        return findings(self.folder)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises RunError."""
    return stored_manifest(Path(folder) / "manifest.json", FORMAT, "run folder")


def findings(folder: str | Path) -> Findings:
    """What the finished cells of a run folder say; no model is needed. Raises RunError where nothing is finished."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    plan, layout = manifest["plan"], manifest["layout"]
    done = sorted(path for path in (folder / "cells").glob("*.json") if _is_cell(path) and _done(path))
    names = [name for name in plan["analyses"] if any(path.stem.startswith(f"{name}-") for path in done)]
    views = tuple(_token_view(read(path)) for path in done if path.stem == "view")
    influence = next((read(path) for path in done if path.stem == "influence"), None)
    if not names and influence is None:
        raise RunError(f"{folder} has no finished cell yet: run interp score with the same settings to continue.")
    return Findings(
        provenance=Provenance.from_dict(manifest["provenance"]),
        layers=layout["layers"],
        heads=layout["heads"],
        kv_heads=layout["kv_heads"],
        scores={name: join_scores(folder, name) for name in names},
        causal=_causal(folder, plan, layout),
        steering=_steering(folder, Provenance.from_dict(manifest["provenance"])),
        controls={
            path.stem.removeprefix("control-"): Curve.from_dict(read(path))
            for path in done
            if path.stem.startswith("control-")
        },
        influence=influence,
        views=views,
        settings=plan,
        seconds=sum(read(path)["seconds"] for path in done),
    )


def _steering(folder: Path, origin: Provenance) -> tuple[Steered, ...]:
    """Finished steering runs in folders of a run; they must be of its model."""
    found = []
    for path in sorted(folder.glob("*/steering.json")):
        if finished(path.parent):
            told = steering_findings(path.parent)
            origin.check_model(told.provenance)
            found += told.steering
    return tuple(found)


def join_scores(folder: Path, name: str) -> HeadScores:
    """The scores of all finished cells of one analysis, prompts in order. Raises RunError where there is none."""
    paths = sorted((folder / "cells").glob(f"{name}-[0-9]*.scores.json"))
    parts = [HeadScores.load(path) for path in paths if _done(path.with_name(path.name.replace(".scores", "")))]
    if not parts:
        raise RunError(f"{folder} has no finished cell of {name!r}: run interp score {name} into it.")
    return HeadScores.concat(parts)


def _top(folder: Path, k: int) -> HeadSet:
    """The retrieval heads that the causal check takes out; none where no prompt was answered."""
    return join_scores(folder, "retrieval").heads(top=k, above=0.0)


def _conditions(folder: Path, plan: dict[str, Any], layout: HeadLayout) -> tuple[Condition, ...]:
    heads = HeadSet.parse(plan["heads"], layout) if plan["heads"] else _top(folder, plan["k"])
    return conditions(heads, layout, draws=plan["draws"], seed=plan["seed"])


def _check_name(number: int, condition: Condition) -> str:
    """Cells of other heads have another name: verdicts never outlive the scores that they were made for."""
    digest = hashlib.sha256(str(condition.heads).encode()).hexdigest()[:8]
    return f"check-{number:02d}-{digest}"


def _causal(folder: Path, plan: dict[str, Any], layout: dict[str, Any]) -> CausalCheck | None:
    whole = -(-plan["check_needles"] // plan["batch_size"])
    if not any((folder / "cells").glob("check-*.json")):
        return None
    named = _conditions(folder, plan, HeadLayout(**layout))
    outcomes = []
    for number, condition in enumerate(named):
        paths = sorted((folder / "cells").glob(f"{_check_name(number, condition)}-*.json"))
        parts = [read(path) for path in paths if _done(path)]
        # a condition counts when all of its needles were asked
        if len(parts) == whole:
            outcomes.append(Outcome(condition, *(tuple(x for part in parts for x in part[key]) for key in OUTCOME)))
    groups = {outcome.condition.group for outcome in outcomes}
    if not {"as loaded", "top"} < groups:
        return None
    return CausalCheck(tuple(outcomes), plan["kind"], len(named[1].heads), plan["seed"])


def _token_view(stored: dict[str, Any]) -> TokenView:
    return TokenView(
        stored["title"],
        tuple(stored["tokens"]),
        {name: tuple(weights) for name, weights in stored["weights"].items()},
        {name: tuple((start, stop) for start, stop in ranges) for name, ranges in stored["marks"].items()},
        stored["written"],
    )


def _is_cell(path: Path) -> bool:
    return not path.name.endswith(".scores.json")


def _done(path: Path) -> bool:
    """Whether a cell is finished: its file is whole, and so are its scores."""
    if not path.is_file():
        return False
    try:
        if read(path).get("scored"):
            HeadScores.load(path.with_name(f"{path.stem}.scores.json"))
    except InterpError:
        return False
    return True


def _what(before: Any, now: Any, key: str) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            first = changed[0]
            return f"{key} ({first} was {before.get(first)!r}, now {now[first]!r})"
    return f"{key} ({before!r}, now {now!r})"
