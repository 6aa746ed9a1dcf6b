"""What a report is made from: the scores of one model, their causal check, and attention shown on a text."""

from dataclasses import dataclass, field
from typing import Any

from interp.analyses.causal.ablation_test import CausalCheck
from interp.analyses.causal.curve import Curve
from interp.analyses.kv import KeyCurve
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.explore import Explored
from interp.analyses.views.logit_lens import LogitLens, OvTokens
from interp.analyses.views.qk_projection import QKProjection
from interp.hooks.model.provenance import Provenance


@dataclass(frozen=True)
class TokenView:
    """One query's attention on the tokens of one prompt, for some heads."""

    title: str
    tokens: tuple[str, ...]
    """text of each token; joined they are the rendered prompt"""
    weights: dict[str, tuple[float, ...]]
    """head name to pattern[q k] over the tokens, in the order to show"""
    marks: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """named token ranges to outline, such as the answer"""
    written: str = ""
    """what the model wrote from this query on"""


@dataclass(frozen=True)
class Steered:
    """What steering did to one task."""

    method: str
    task: str
    check: CausalCheck
    chosen: str
    """by what rule the heads were taken"""
    tried: list[dict[str, Any]] = field(default_factory=list)
    """sets that were compared on the dev split: name, right, and the margin's score, low, high, common"""
    profile: HeadScores | None = None


@dataclass(frozen=True)
class Safety:
    """What refuses: what taking heads out does, by several scores, which stand beside the others."""

    asked: dict[str, dict[str, Any]]
    """"harmful" and "harmless": ids, which were refused, and how the replies begin"""
    groups: dict[str, list[dict[str, Any]]]
    """by ablation: Sahara's groups beside random ones"""
    curves: dict[str, Curve]
    """by ablation"""


@dataclass(frozen=True)
class Findings:
    """All that one run found out about one model."""

    provenance: Provenance
    layers: int
    heads: int
    kv_heads: int
    scores: dict[str, HeadScores]
    causal: CausalCheck | None = None
    views: tuple[TokenView, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """of the run: what was measured, on what, with which seed"""
    seconds: float = 0.0
    """time spent on measuring, all sittings together"""
    steering: tuple[Steered, ...] = ()
    safety: tuple[Safety, ...] = ()
    controls: dict[str, Curve] = field(default_factory=dict)
    """by analysis: what its top heads do when they are out"""
    influence: dict[str, Any] | None = None
    """what Influence.to_dict gave"""
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """by analysis: how its prompts begin, or what they ask"""
    explored: Explored | None = None
    """attention on one text, block by block, for the explorer"""
    written: OvTokens | None = None
    """what the heads of the explorer would write for what that text's end looks at"""
    joint: QKProjection | None = None
    vocabulary: LogitLens | None = None
    keys: KeyCurve | None = None
    """what dropping keys cost, by selector"""
    missing: dict[str, str] = field(default_factory=dict)
    """by view, such as "written": why there is none"""
