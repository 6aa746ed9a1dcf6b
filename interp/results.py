"""What the finished cells of a run's folder say; no model is needed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.analyses.causal.ablation_test import CausalCheck, Condition, Outcome, conditions
from interp.analyses.causal.curve import Curve
from interp.analyses.kv import KeyCurve
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.explore import Explored
from interp.analyses.views.logit_lens import LogitLens, OvTokens
from interp.analyses.views.qk_projection import QKProjection
from interp.errors import InterpError, RunError
from interp.findings import Findings, Steered, TokenView
from interp.folders import read, stored_manifest
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.steerings import finished, steering_findings

FORMAT = "interp.run/1"
VIEWS: dict[str, Any] = {
    "explored": Explored,
    "written": OvTokens,
    "qk_projection": QKProjection,
    "logit_lens": LogitLens,
}
"""cells that are one view each, by the name that Findings has for it"""
OUTCOME = ("verdicts", "replies", "answers", "questions")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises RunError."""
    return stored_manifest(Path(folder) / "manifest.json", FORMAT, "run folder")


def findings(folder: str | Path) -> Findings:
    """What the finished cells of a run folder say; no model is needed. Raises RunError where nothing is finished."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    plan, layout = manifest["plan"], manifest["layout"]
    done = sorted(path for path in (folder / "cells").glob("*.json") if _is_cell(path) and is_done(path))
    names = [name for name in plan["analyses"] if any(path.stem.startswith(f"{name}-") for path in done)]
    views = tuple(_token_view(read(path)) for path in done if path.stem == "view")
    influence = next((read(path) for path in done if path.stem == "influence"), None)
    texts = {name: tuple(text for path in _cells(done, name) for text in read(path).get("texts", ())) for name in names}
    shown = {path.stem: read(path) for path in done if path.stem in VIEWS}
    missing = {name: str(stored["missing"]) for name, stored in shown.items() if "missing" in stored}
    shown = {name: VIEWS[name].from_dict(stored) for name, stored in shown.items() if name not in missing}
    keyed = [KeyCurve.from_dict(read(path)) for path in done if path.stem.startswith("keys-")]
    if not names and not shown and not keyed and influence is None:
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
        texts=texts,
        **shown,
        missing=missing,
        keys=KeyCurve.join(keyed) if keyed else None,
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


def shown_heads(scores: Mapping[str, HeadScores], each: int = 3, most: int = 12) -> list[Head]:
    """The heads that are worth a card: the first of each analysis, then the second of each, without doubles."""
    tops = [table.top(each) for table in scores.values()]
    ranked = [top[place] for place in range(each) for top in tops if place < len(top)]
    return list(dict.fromkeys(ranked))[:most]


def join_scores(folder: Path, name: str) -> HeadScores:
    """The scores of all finished cells of one analysis, prompts in order. Raises RunError where there is none."""
    paths = sorted((folder / "cells").glob(f"{name}-[0-9]*.scores.json"))
    parts = [HeadScores.load(path) for path in paths if is_done(path.with_name(path.name.replace(".scores", "")))]
    if not parts:
        raise RunError(f"{folder} has no finished cell of {name!r}: run interp score {name} into it.")
    return HeadScores.concat(parts)


def top_heads(folder: Path, k: int) -> HeadSet:
    """The retrieval heads that the causal check takes out; none where no prompt was answered."""
    return join_scores(folder, "retrieval").heads(top=k, above=0.0)


def conditions_of(folder: Path, plan: dict[str, Any], layout: HeadLayout) -> tuple[Condition, ...]:
    heads = HeadSet.parse(plan["heads"], layout) if plan["heads"] else top_heads(folder, plan["k"])
    return conditions(heads, layout, draws=plan["draws"], seed=plan["seed"])


def check_name(number: int, condition: Condition) -> str:
    """Cells of other heads have another name: verdicts never outlive the scores that they were made for."""
    digest = hashlib.sha256(str(condition.heads).encode()).hexdigest()[:8]
    return f"check-{number:02d}-{digest}"


def _causal(folder: Path, plan: dict[str, Any], layout: dict[str, Any]) -> CausalCheck | None:
    whole = -(-plan["check_needles"] // plan["batch_size"])
    if not any((folder / "cells").glob("check-*.json")):
        return None
    named = conditions_of(folder, plan, HeadLayout(**layout))
    outcomes = []
    for number, condition in enumerate(named):
        paths = sorted((folder / "cells").glob(f"{check_name(number, condition)}-*.json"))
        parts = [read(path) for path in paths if is_done(path)]
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


def _cells(done: list[Path], name: str) -> list[Path]:
    return [path for path in done if path.stem.rpartition("-")[0] == name]


def _is_cell(path: Path) -> bool:
    return not path.name.endswith(".scores.json")


def is_done(path: Path) -> bool:
    """Whether a cell is finished: its file is whole, and so are its scores."""
    if not path.is_file():
        return False
    try:
        if read(path).get("scored"):
            HeadScores.load(path.with_name(f"{path.stem}.scores.json"))
    except InterpError:
        return False
    return True
