"""A run's folder: a manifest and the finished cells. Killed at any moment, the same call goes on where it stood."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import interp
from interp.analyses.causal.ablation_test import REPLY, Condition, ask
from interp.analyses.identify import attention_influence
from interp.analyses.kv import KVTask, key_curve, selectors_of
from interp.analyses.kv.evaluate import WINDOWS
from interp.analyses.kv.from_scores import selective
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import judge
from interp.analyses.views.explore import explore
from interp.analyses.views.logit_lens import logit_lens, ov_tokens
from interp.analyses.views.qk_projection import qk_projection
from interp.analyses.views.token_attention import view
from interp.controls import CONTROLLED, control
from interp.errors import ModelError, RunError, UsageError
from interp.findings import Findings
from interp.folders import claim, write
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.layers import context_length
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context
from interp.results import (
    FORMAT,
    check_name,
    conditions_of,
    findings,
    is_done,
    join_scores,
    read_manifest,
    shown_heads,
    top_heads,
)
from interp.studies import (
    KEYS,
    OF_HEADS,
    Plan,
    Study,
    asked_of_heads,
    brief,
    check_prompts,
    explored_prompt,
    key_tasks,
    studies,
)

LAST = 8
"""tokens at the end of a text without an answer, whose values are read"""
MAPPED = 700_000
"""bytes of block maps in a report"""
DRAWN, POINTS = 4, 1200
"""heads of the joint view, and dots of each"""


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
    explored: Prompts | None = None
    """the one text of the explorer"""
    keyed: tuple[KVTask, ...] = ()
    """what key selectors are asked"""

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
                f"{out} heads out of {len(layout.all())} leave too few for a random control: take out at most half, "
                f"--top {len(layout.all()) // 2} on the command line."
            )
        if "key_selectors" in plan.analyses and not selective(model):
            raise UsageError(WINDOWS)
        found = studies(plan, tokenizer, own)
        needles = check_prompts(plan, tokenizer) if plan.checked else None
        keyed = key_tasks(plan, tokenizer)
        asked = [(prompts, study.reply) for study in found for prompts in study.read]
        asked += [(task.whole, 0) for task in keyed]
        for prompts, more in [*asked, *([(needles, REPLY)] if needles is not None else [])]:
            check_context(model, prompts, more)
        explored = explored_prompt(plan, tokenizer, own, context_length(model)) if found and plan.explore else None
        origin = Provenance.of(model, tokenizer, seed=plan.seed)
        run = cls(folder, plan, model, tokenizer, origin, tuple(found), needles, own, explored, keyed)
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
        asked |= asked_of_heads(self.plan, self.tokenizer, self.own)
        asked |= {f"{KEYS}, {task.name}": task.whole for task in self.keyed}
        if self.explored is not None:
            asked["explorer"] = self.explored
        return asked

    def cells(self) -> Iterator[Cell]:
        """All cells in order; those of the causal check need the scores before them, so finish each as it comes."""
        for study in self.studies:
            for number, batch in enumerate(study.batches(self.plan.batch_size)):
                path = self.folder / "cells" / f"{study.name}-{number:04d}.json"
                yield Cell(f"{study.name} {number}", path, lambda s=study, b=batch: self._score(s, b))
        if self.needles is not None and (self.plan.heads or self._answered):
            for c, condition in enumerate(self.conditions()):
                for number, batch in enumerate(self.needles.batches(self.plan.batch_size)):
                    path = self.folder / "cells" / f"{check_name(c, condition)}-{number:04d}.json"
                    yield Cell(condition.name, path, lambda d=condition, b=batch: self._ask(d, b))
        for study in self.studies:
            if study.name in CONTROLLED and self.plan.check:
                path = self.folder / "cells" / f"control-{study.name}.json"
                yield Cell(f"{study.name}, heads out", path, lambda s=study: self._control(s))
        if "influence" in self.plan.analyses and (self.plan.heads or self._answered):
            yield Cell("influence", self.folder / "cells" / "influence.json", self._influence)
        for number, task in enumerate(self.keyed):
            path = self.folder / "cells" / f"keys-{number}-{task.name.replace(' ', '-')}.json"
            yield Cell(f"key selectors, {task.name}", path, lambda t=task: self._keys(t))
        if self._answered:
            yield Cell("attention on a text", self.folder / "cells" / "view.json", self._view)
        if (text := self.explored) is not None:
            yield Cell("explorer", self.folder / "cells" / "explored.json", lambda: self._explore(text))
            if self._shown:
                yield Cell("what heads write", self.folder / "cells" / "written.json", lambda: self._written(text))
        for name, work in (("qk_projection", self._joint), ("logit_lens", self._vocabulary)):
            if name in self.plan.analyses and self._shown:
                yield Cell(name, self.folder / "cells" / f"{name}.json", work)

    @property
    def _answered(self) -> bool:
        """Whether retrieval scored any head: a model that answers no needle has no retrieval heads to take out."""
        return "retrieval" in self.plan.analyses and bool(top_heads(self.folder, self.plan.k))

    def count(self) -> int:
        """How many cells there are."""
        size = self.plan.batch_size
        total = sum(1 if study.whole else -(-len(study.prompts) // size) for study in self.studies)
        if self.needles is not None:
            total += (2 + 2 * self.plan.draws) * -(-len(self.needles) // size)
        named = {study.name for study in self.studies}
        total += len(named & set(CONTROLLED)) if self.plan.check else 0
        total += ("retrieval" in named) + len(set(self.plan.analyses) & set(OF_HEADS) - {KEYS}) + len(self.keyed)
        return total + 2 * (self.explored is not None)

    def _score(self, study: Study, batch: Prompts) -> dict[str, Any]:
        settings = {"batch_size": self.plan.batch_size, "seed": self.plan.seed, **study.settings}
        if study.resumes:
            settings["folder"] = self.folder / "steps" / study.name
        scores = study.run(self.model, batch, **settings)
        return {"scores": scores, "texts": [brief(prompt, self.tokenizer) for prompt in batch]}

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

    def _keys(self, task: KVTask) -> dict[str, Any]:
        selectors = selectors_of(self._scores, self.plan.seed, self.model)
        size = self.plan.batch_size
        return key_curve(self.model, [task], selectors, batch_size=size, seed=self.plan.seed).to_dict()

    def _view(self) -> dict[str, Any]:
        scores = join_scores(self.folder, "retrieval")
        prompts = next(study.prompts for study in self.studies if study.name == "retrieval")
        shown = min(range(len(prompts)), key=lambda i: (bool(scores.per_prompt[i].isnan().all()), len(prompts[i])))
        return asdict(view(self.model, prompts[shown : shown + 1], scores.top(8)))

    @property
    def _scores(self) -> dict[str, HeadScores]:
        """What every analysis found, once all of its cells are done."""
        return {study.name: join_scores(self.folder, study.name) for study in self.studies}

    @property
    def _ranked(self) -> list[Head]:
        """The heads that get cards: those that are named, else the first of each analysis, then the second."""
        if self.plan.heads:
            return list(HeadSet.parse(self.plan.heads, HeadLayout.of(self.model)))
        return shown_heads(self._scores)

    @property
    def _shown(self) -> HeadSet:
        return HeadSet(tuple(self._ranked))

    def _explore(self, prompts: Prompts) -> dict[str, Any]:
        title = str(prompts[0].meta.get("question") or "a text")
        # so many blocks that the maps of all heads stay below MAPPED bytes; a power of two reads better
        across = max(1.0, (2 * MAPPED / HeadLayout.of(self.model).size) ** 0.5)
        block = 1 << max(0, math.ceil(math.log2(len(prompts[0]) / across)))
        told = explore(self.model, prompts, heads=self._shown, block=block, title=title, seed=self.plan.seed)
        return told.to_dict()

    def _written(self, prompts: Prompts) -> dict[str, Any]:
        n = len(prompts[0])
        span = "answer" if "answer" in prompts[0].spans else (max(0, n - LAST), n)
        try:
            return ov_tokens(self.model, prompts, self._shown, span).to_dict()
        except ModelError as error:
            # a view beside the scores: without it they stand all the same
            return {"missing": str(error)}

    def _joint(self) -> dict[str, Any]:
        heads = HeadSet(tuple(self._ranked[:DRAWN]))
        return qk_projection(
            self.model, self._asked["qk_projection"], heads, points=POINTS, seed=self.plan.seed
        ).to_dict()

    def _vocabulary(self) -> dict[str, Any]:
        return logit_lens(self.model, self._asked["logit_lens"], self._shown).to_dict()

    def conditions(self) -> tuple[Condition, ...]:
        """What the causal check takes out."""
        return conditions_of(self.folder, asdict(self.plan), HeadLayout.of(self.model))

    def finish(self, progress: bool = True) -> Findings:
        """Do what is not done yet, cell by cell, and read the whole run back."""
        from tqdm.auto import tqdm

        (self.folder / "cells").mkdir(exist_ok=True)
        bar = tqdm(total=self.count(), desc="cells", disable=not progress, delay=2)
        for cell in self.cells():
            bar.set_description(cell.name, refresh=False)
            if not is_done(cell.path):
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


def _what(before: Any, now: Any, key: str) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            first = changed[0]
            return f"{key} ({first} was {before.get(first)!r}, now {now[first]!r})"
    return f"{key} ({before!r}, now {now!r})"
