"""A safety run's folder: replies as loaded, heads by Ships, Sahara and gradient, and causal curves of all of them."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from interp.analyses.causal.curve import Curve, causal_curve
from interp.analyses.identify import gradient_importance as gradient_importance
from interp.analyses.identify import sahara, ships
from interp.analyses.measures.refusals import Replies, ask, check_contrast, first_token_loss, losses, refusals, right
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import refusal
from interp.errors import RunError, UsageError
from interp.findings import Findings, Safety
from interp.folders import begin, read, stored_manifest, write
from interp.hooks.model.heads import Head, HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import check_context

FORMAT = "interp.safety/1"
KINDS = ("uniform", "zero")


@dataclass(frozen=True)
class SafetyPlan:
    """The settings of a safety run."""

    harmful: int = 100
    harmless: int = 50
    requests: str = ""
    """a CSV file of harmful requests of your own; empty for the project's"""
    column: str | None = None
    scored: int = 32
    """refused requests that heads are scored on; curves take others, and few refused ones are halved between both"""
    tested: int = 32
    kinds: tuple[str, ...] = KINDS
    group: int = 5
    """heads of the largest Sahara group"""
    sizes: tuple[int, ...] = (1, 3, 5, 10, 20, 33)
    until: float = 0.5
    """share of the refusals as loaded at which a ranking is not followed further"""
    neutral: int = 10
    easy: int = 20
    reply: int = 32
    draws: int = 3
    seed: int = 0
    batch_size: int = 8
    keep_text: bool = False
    """keep whole replies, of which else only the verdict and the first 40 characters are kept"""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong or not self.kinds:
            raise UsageError(f"kinds {', '.join(wrong) or 'none'}: take uniform, zero, or both.")
        for name in ("harmful", "harmless", "scored", "tested", "group", "neutral", "easy", "reply", "draws"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: give at least 1.")
        if not self.sizes or min(self.sizes) < 1:
            raise UsageError(f"sizes={self.sizes}: give numbers of heads, each at least 1.")
        if self.scored < 2:
            raise UsageError("scored=1: Sahara turns a subspace of prompts, so give at least 2.")


@dataclass(frozen=True, eq=False)
class SafetyRun:
    """One plan on one model, in one folder."""

    folder: Path
    plan: SafetyPlan
    model: nn.Module
    tokenizer: Any
    provenance: Provenance
    prompts: dict[str, Prompts]
    """harmful, harmless, neutral, easy"""

    @classmethod
    def open(cls, folder: str | Path, plan: SafetyPlan, model: nn.Module, tokenizer: Any) -> "SafetyRun":
        """Begin a run, or go on with the one in the folder. Raises RunError where it holds something else."""
        folder = Path(folder)
        layout = HeadLayout.of(model)
        prompts = {
            "harmful": refusal.requests_from(plan.requests, tokenizer, plan.column)[: plan.harmful]
            if plan.requests
            else refusal.requests(tokenizer, "harmful", plan.harmful),
            "harmless": refusal.requests(tokenizer, "harmless", plan.harmless),
            "neutral": refusal.neutral_texts(tokenizer, plan.neutral),
            "easy": refusal.easy(tokenizer, plan.easy),
        }
        for asked in prompts.values():
            check_context(model, asked, plan.reply)
        run = cls(folder, plan, model, tokenizer, Provenance.of(model, tokenizer, seed=plan.seed), prompts)
        manifest = {
            "format": FORMAT,
            "plan": json.loads(json.dumps(asdict(plan))),
            "layout": asdict(layout),
            "origin": run.provenance.to_dict(),
            "prompts": {name: asked.fingerprint() for name, asked in prompts.items()},
        }
        begin(folder / "safety.json", manifest, "safety run", ("plan", "prompts"))
        return run

    def finish(self, progress: bool = True) -> Findings:
        """Ask, score and take out what is not done yet; gives what a report is made from.

        Raises UsageError where the model shows no refusal, before any head is scored.
        """
        started = time.perf_counter()
        harmful, harmless = (self._asked(name, progress) for name in ("harmful", "harmless"))
        check_contrast(harmful, harmless)
        kept = [i for i, verdict in enumerate(harmful.verdicts) if verdict]
        # heads are never tried on the requests that they were found on: few refused ones are halved
        enough = len(kept) >= self.plan.scored + self.plan.tested
        border = self.plan.scored if enough else len(kept) // 2
        scored = _some(harmful, kept[:border])
        tested = _some(harmful, kept[border:][: self.plan.tested])
        parts = {"scored": scored, "tested": tested}
        write(self.folder / "split.json", {name: list(map(_id, part.prompts)) for name, part in parts.items()})
        tables = self._importance(scored)
        for kind in self.plan.kinds:
            tables |= self._tables(kind, scored.prompts, progress)
        for kind in self.plan.kinds:
            self._curve(kind, tables, tested.prompts, progress)
        path = self.folder / "seconds.json"
        before = read(path)["seconds"] if path.exists() else 0.0
        write(path, {"seconds": before + time.perf_counter() - started})
        return safety_findings(self.folder)

    def _asked(self, name: str, progress: bool) -> Replies:
        path, prompts = self.folder / f"asked-{name}.json", self.prompts[name]
        if not path.exists():
            said = ask(
                self.model,
                prompts,
                max_new_tokens=self.plan.reply,
                batch_size=self.plan.batch_size,
                progress=progress,
            )
            write(path, said.to_dict(self.plan.keep_text))
        stored = read(path)
        texts = tuple(stored.get("text") or stored["begins"])
        return Replies(prompts, texts, tuple(stored["refused"]), tuple(stored["first"]))

    def _importance(self, scored: Replies) -> dict[str, HeadScores]:
        path = self.folder / "importance.json"
        if not path.exists():
            loss = first_token_loss(scored)
            settings: dict[str, Any] = {"loss": loss, "normalize": None, "batch_size": self.plan.batch_size}
            gradient_importance(self.model, scored.prompts, seed=self.plan.seed, **settings).save(path)
        return {"gradient": HeadScores.load(path, self.model)}

    def _tables(self, kind: Any, prompts: Prompts, progress: bool) -> dict[str, HeadScores]:
        """Ships and Sahara under one ablation."""
        settings: dict[str, Any] = {
            "ablation": kind,
            "batch_size": self.plan.batch_size,
            "seed": self.plan.seed,
            "folder": self.folder / "cells",
            "progress": progress,
        }
        paths = {name: self.folder / f"{name}-{kind}.json" for name in ("ships", "sahara", "groups")}
        if not paths["ships"].exists():
            ships(self.model, prompts, **settings).save(paths["ships"])
        if not paths["groups"].exists():
            found = sahara(self.model, prompts, size=self.plan.group, **settings)
            found.scores.save(paths["sahara"])
            write(paths["groups"], found.to_dict())
        return {f"{name}-{kind}": HeadScores.load(paths[name], self.model) for name in ("ships", "sahara")}

    def _curve(self, kind: Any, tables: dict[str, HeadScores], tested: Prompts, progress: bool) -> None:
        path = self.folder / f"curve-{kind}.json"
        if path.exists():
            return
        size, plan = self.plan.batch_size, self.plan
        groups = read(self.folder / f"groups-{kind}.json")["ranking"]
        measures = {
            "refused": refusals(tested, max_new_tokens=plan.reply, batch_size=size),
            "harmless refused": refusals(self.prompts["harmless"], max_new_tokens=plan.reply, batch_size=size),
            "easy right": right(self.prompts["easy"], batch_size=size),
            "neutral loss": losses(self.prompts["neutral"], batch_size=size),
        }
        layout = HeadLayout.of(self.model)
        found = causal_curve(
            self.model,
            {
                "ships": tables[f"ships-{kind}"],
                "sahara": [Head.parse(name) for name in groups],
                "gradient": tables["gradient"],
            },
            measures,
            sizes=[n for n in plan.sizes if n <= layout.size // 2],
            kind=kind,
            draws=plan.draws,
            until=plan.until,
            seed=plan.seed,
            folder=self.folder / "cells",
            about=[tested.fingerprint(), *(asked.fingerprint() for asked in self.prompts.values()), plan.reply],
            progress=progress,
        )
        write(path, found.to_dict())


def _some(replies: Replies, numbers: list[int]) -> Replies:
    def pick(values: Any) -> tuple[Any, ...]:
        return tuple(values[i] for i in numbers)

    prompts = replace(replies.prompts, items=pick(replies.prompts.items))
    return Replies(prompts, pick(replies.texts), pick(replies.verdicts), pick(replies.first))


def _id(prompt: Prompt) -> str:
    return str(prompt.meta.get("id", ""))


def safety_findings(folder: str | Path) -> Findings:
    """What a safety run found, as a report takes it; no model is needed. Raises RunError where it is not finished."""
    folder = Path(folder)
    manifest = stored_manifest(folder / "safety.json", FORMAT, "safety run")
    plan, layout = manifest["plan"], manifest["layout"]
    if not finished(folder):
        raise RunError(f"{folder} is not finished: run interp score safety with the same settings to go on.")
    kinds = plan["kinds"]
    told = Safety(
        asked={name: read(folder / f"asked-{name}.json") for name in ("harmful", "harmless")},
        groups={kind: read(folder / f"groups-{kind}.json")["groups"] for kind in kinds},
        curves={kind: Curve.from_dict(read(folder / f"curve-{kind}.json")) for kind in kinds},
    )
    return Findings(
        provenance=Provenance.from_dict(manifest["origin"]),
        layers=layout["layers"],
        heads=layout["heads"],
        kv_heads=layout["kv_heads"],
        scores={
            "gradient_importance": HeadScores.load(folder / "importance.json"),
            **{
                f"{what}_{kind}": HeadScores.load(folder / f"{what}-{kind}.json")
                for kind in kinds
                for what in ("ships", "sahara")
            },
        },
        safety=(told,),
        settings=plan,
        seconds=read(folder / "seconds.json")["seconds"] if (folder / "seconds.json").exists() else 0.0,
    )


def finished(folder: str | Path) -> bool:
    """Whether every curve of a safety run was made."""
    folder = Path(folder)
    kinds = stored_manifest(folder / "safety.json", FORMAT, "safety run")["plan"]["kinds"]
    return all((folder / f"curve-{kind}.json").is_file() for kind in kinds)
