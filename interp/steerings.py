"""A steering run's folder: heads from one split of a task, settings from another, replies to a third."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from interp.analyses import steer, tasks
from interp.analyses.causal.ablation_test import CausalCheck, Condition, Outcome
from interp.analyses.steer.check import arms, ask_steered, kind_of, outcome
from interp.analyses.steer.profile import Choice, Profile, choose, profile
from interp.errors import RunError, UsageError
from interp.findings import Findings, Steered
from interp.folders import begin, read, stored_manifest, write
from interp.hooks.edit.edit import Edit, Edits
from interp.hooks.generate import Reply
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

METHODS = {
    "pasta": steer.Pasta,
    "act": steer.Act,
    "zerotuning": steer.ZeroTuning,
    "boost": steer.Boost,
    "spotlight": steer.SpotLight,
    "temperature": steer.Temperature,
}
GAMMAS = (0.2, 0.5, 2.0, 5.0)
"""of ZeroTuning, where none is named"""
FORMAT = "interp.steering/1"


@dataclass(frozen=True)
class SteerPlan:
    """The settings of a steering run."""

    method: str = "pasta"
    task: str = "json"
    """a task's name, or a .jsonl file of your own"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of the method, as {"alpha": 0.01}"""
    heads: str = ""
    """heads to steer; empty to profile them"""
    profile: str = ""
    """a profile to take heads from; empty to make one"""
    tops: tuple[int, ...] = (5, 10, 25, 50)
    """sizes of head sets that the dev split chooses from"""
    profile_items: int = 32
    dev_items: int = 20
    test_items: int = 40
    keep: int = 50
    draws: int = 3
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r} does not exist: take one of {', '.join(METHODS)}.")
        known = {f.name for f in fields(METHODS[self.method])} - {"heads", "spans"}
        if unknown := sorted(set(self.settings) - known):
            raise UsageError(f"{self.method} has no setting {', '.join(unknown)}: it takes {', '.join(sorted(known))}.")
        for name in ("profile_items", "dev_items", "test_items", "keep", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: give at least 1.")
        if not self.tops or min(self.tops) < 1:
            raise UsageError(f"tops={self.tops}: give sizes of head sets, each at least 1.")

    def edit(self, span: str, **more: Any) -> Edit:
        """The method's edit; one that marks a span marks the task's. Raises UsageError for a setting out of range."""
        kind = METHODS[self.method]
        marked = {"spans": span} if any(f.name == "spans" for f in fields(kind)) else {}
        try:
            made = kind(**marked, **self.settings, **more)
        except TypeError as error:
            raise UsageError(f"{self.method}: a setting has the wrong type ({error}).") from error
        if made.is_noop and not self.open:
            raise UsageError(f"{kind_of(made)} changes nothing: give it another setting, as in --set name=value.")
        return made

    @property
    def open(self) -> bool:
        """Whether a setting is left to the dev split: ZeroTuning's gamma."""
        return self.method == "zerotuning" and "gamma" not in self.settings


@dataclass(frozen=True, eq=False)
class SteerRun:
    """One plan on one model, in one folder."""

    folder: Path
    plan: SteerPlan
    model: nn.Module
    tokenizer: Any
    task: tasks.Task
    provenance: Provenance
    prompts: dict[str, Prompts]
    """by split"""

    @classmethod
    def open(cls, folder: str | Path, plan: SteerPlan, model: nn.Module, tokenizer: Any) -> "SteerRun":
        """Begin a run, or go on with the one in the folder. Raises RunError where it holds something else."""
        folder = Path(folder)
        layout = HeadLayout.of(model)
        task = tasks.get(plan.task)
        plan.edit(task.span)
        if plan.heads:
            layout.check(HeadSet.parse(plan.heads, layout))
        given = _given(plan, model)
        sizes = {"dev": plan.dev_items, "test": plan.test_items}
        sizes |= {} if plan.heads or given else {"profile": plan.profile_items}
        prompts = {split: task.prompts(tokenizer, split, n) for split, n in sizes.items()}
        for asked in prompts.values():
            check_context(model, asked, task.max_new_tokens)
        run = cls(folder, plan, model, tokenizer, task, Provenance.of(model, tokenizer, seed=plan.seed), prompts)
        manifest = {
            "format": FORMAT,
            "plan": json.loads(json.dumps(asdict(plan))),
            "layout": asdict(layout),
            "origin": run.provenance.to_dict(),
            "prompts": {split: asked.fingerprint() for split, asked in prompts.items()},
            "given": None if given is None else [given.scores.settings[key] for key in ("prompts", "edit", "ranking")],
        }
        begin(folder / "steering.json", manifest, "steering run", ("plan", "prompts", "given"))
        return run

    def finish(self, progress: bool = True) -> Findings:
        """Profile, choose and judge what is not done yet; gives what a report is made from."""
        started = time.perf_counter()
        found = self._profile(progress)
        chosen = self._choose(found)
        for _ in self._judge(chosen, progress):
            pass
        path = self.folder / "seconds.json"
        before = read(path)["seconds"] if path.exists() else 0.0
        write(path, {"seconds": before + time.perf_counter() - started})
        return steering_findings(self.folder)

    def _profile(self, progress: bool) -> Profile | None:
        """The profile that is given, made before or made now; None where heads are named."""
        if self.plan.heads:
            return None
        if (given := _given(self.plan, self.model)) is not None:
            return given
        path = self.folder / "profile.json"
        if path.exists():
            return Profile.load(path, self.model)
        found = profile(
            self.model,
            self.prompts["profile"],
            self._edit(),
            keep=self.plan.keep,
            seed=self.plan.seed,
            folder=self.folder / "cells",
            progress=progress,
        )
        found.save(path)
        return found

    def _edit(self) -> Edit:
        """The edit to profile; ZeroTuning's gamma, where none is named, is a profile's, or the best in all heads."""
        if not self.plan.open:
            return self.plan.edit(self.task.span)
        if (given := _given(self.plan, self.model)) is not None:
            return steer.ZeroTuning(given.scores.settings["edit"][0]["gamma"])
        path = self.folder / "gamma.json"
        if not path.exists():
            tried = choose(
                self.model, self.prompts["dev"], {str(g): steer.ZeroTuning(g) for g in GAMMAS}, seed=self.plan.seed
            )
            best = next(choice.name for choice in tried if choice.name != "as loaded")
            write(path, {"gamma": float(best), "tried": [_told(choice) for choice in tried]})
        return steer.ZeroTuning(read(path)["gamma"])

    def _choose(self, found: Profile | None) -> Edits:
        """The edit with its heads: those that were named, or the best set on the dev split."""
        edit = self._edit()
        if found is None:
            return Edits(()) + replace(edit, heads=self.plan.heads)
        path = self.folder / "choice.json"
        if not path.exists():
            sets = {f"top {k}": found.heads(k) for k in self.plan.tops if k <= len(found.ranking)}
            helpful = found.helpful()
            if len(helpful):
                sets["all that gain"] = helpful
            named = {name: replace(edit, heads=str(heads)) for name, heads in sets.items()}
            named["all heads"] = replace(edit, heads="all")
            prompts = self.prompts["dev"]
            margins = {c.name: c for c in choose(self.model, prompts, named, seed=self.plan.seed)}
            right = {name: self._right(n, prompts, named.get(name)) for n, name in enumerate(["as loaded", *named])}
            # by what is written: a set may make the right form likely and lose what stands in it
            best = max(named, key=lambda name: (right[name], margins[name].score))
            tried = [_told(margins[name]) | {"right": right[name]} for name in right]
            tried.sort(key=lambda row: (-row["right"], -row["score"]))
            (Edits(()) + named[best]).save(self.folder / "edit.json")
            write(path, {"chosen": best, "tried": tried})
        return Edits.load(self.folder / "edit.json")

    def _right(self, number: int, prompts: Prompts, edit: Edit | None) -> float:
        """Share of the prompts whose greedy reply is right under an edit."""
        path = self.folder / f"dev-{number:02d}.json"
        if not path.exists():
            edits = Edits(()) if edit is None else Edits(()) + edit
            verdicts = [self.task.judge(r.text, p) for r, p in zip(self._ask(prompts, edits), prompts, strict=True)]
            write(path, {"right": sum(verdicts) / len(verdicts)})
        return read(path)["right"]

    def _ask(self, prompts: Prompts, edits: Edits) -> Iterator[Reply]:
        task, size = self.task, self.plan.batch_size
        return ask_steered(
            self.model, prompts, edits, max_new_tokens=task.max_new_tokens, stop=task.stop, batch_size=size
        )

    def _judge(self, edit: Edits, progress: bool) -> Iterator[None]:
        from tqdm.auto import tqdm

        prompts = self.prompts["test"]
        rows = arms(edit, HeadLayout.of(self.model), self.plan.draws, self.plan.seed)
        write(self.folder / "arms.json", {"arms": [arm.condition.name for arm in rows]})
        for number, arm in enumerate(tqdm(rows, desc="steering check", disable=not progress, delay=2)):
            path = self.folder / f"replies-{number:02d}.json"
            if not path.exists():
                asked = self._ask(prompts, arm.edits)
                told = asdict(outcome(arm.condition, prompts, [reply.text for reply in asked], self.task.judge))
                heads = arm.condition.heads
                told["condition"]["heads"] = str(heads) if len(heads) else ""
                write(path, told | {"kind": kind_of(edit)})
            yield


def steering_findings(folder: str | Path) -> Findings:
    """What a steering run found, as a report takes it; no model is needed. Raises RunError where it is not finished."""
    folder = Path(folder)
    manifest = _manifest(folder)
    plan = manifest["plan"]
    cells = [read(path) for path in sorted(folder.glob("replies-*.json"))]
    if not finished(folder):
        raise RunError(f"{folder} is not finished: run interp steer with the same settings to go on.")
    outcomes = tuple(_outcome(cell) for cell in cells)
    check = CausalCheck(outcomes, cells[1]["kind"], len(outcomes[1].condition.heads), plan["seed"])
    found = Profile.load(folder / "profile.json") if (folder / "profile.json").exists() else None
    chosen = read(folder / "choice.json") if (folder / "choice.json").exists() else {"chosen": "named", "tried": []}
    task = Path(plan["task"]).stem if plan["task"].endswith(".jsonl") else plan["task"]
    told = Steered(plan["method"], task, check, chosen["chosen"], chosen["tried"], found.scores if found else None)
    origin = Provenance.from_dict(manifest["origin"])
    layout = manifest["layout"]
    seconds = read(folder / "seconds.json")["seconds"] if (folder / "seconds.json").exists() else 0.0
    return Findings(
        provenance=origin,
        layers=layout["layers"],
        heads=layout["heads"],
        kv_heads=layout["kv_heads"],
        scores={},
        steering=(told,),
        settings=plan,
        seconds=seconds,
    )


def finished(folder: str | Path) -> bool:
    """Whether every condition of a steering run was asked."""
    path = Path(folder) / "arms.json"
    names = read(path)["arms"] if path.is_file() else None
    cells = [read(path)["condition"]["name"] for path in sorted(Path(folder).glob("replies-*.json"))]
    return names is not None and names == cells


def _manifest(folder: Path) -> dict[str, Any]:
    return stored_manifest(folder / "steering.json", FORMAT, "steering run")


def _given(plan: SteerPlan, model: nn.Module) -> Profile | None:
    """The profile that a plan names. Raises ScoreError for one of another model, UsageError for another method."""
    if not plan.profile or plan.heads:
        return None
    found = Profile.load(plan.profile, model)
    kinds = [entry["edit"] for entry in found.scores.settings["edit"]]
    if kinds != [METHODS[plan.method].__name__]:
        raise UsageError(f"{plan.profile} is a profile of {' + '.join(kinds)}, not of {plan.method}: give another.")
    return found


def _outcome(cell: dict[str, Any]) -> Outcome:
    heads = cell["condition"]["heads"]
    condition = Condition(
        cell["condition"]["name"], cell["condition"]["group"], HeadSet.parse(heads) if heads else HeadSet(())
    )
    rest = (tuple(cell[key]) for key in ("verdicts", "replies", "answers", "questions"))
    return Outcome(condition, *rest)


def _told(choice: Choice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in ("name", "score", "low", "high", "common")}
