"""Inputs that a run gives to an analysis that builds on other results."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.set_test import N_RANDOM_SETS
from interp.analyses.tasks.standard import PromptSizes
from interp.hooks.model.heads import Head, HeadLayout, HeadSet


@dataclass(frozen=True, eq=False)
class RunInputs:
    """The state of a run when an analysis with `inputs` begins."""

    model: nn.Module
    tokenizer: Any
    layout: HeadLayout
    scores: dict[str, HeadScores]
    """head tables that the run has, by analysis"""
    heads: HeadSet
    """heads that the user named; may be empty"""
    leading: list[Head]
    """the named heads, else the first of each table, then the second of each"""
    sizes: PromptSizes
    settings: dict[str, dict[str, Any]]
    """settings that the user gave, by analysis, edit or selector"""
    n_heads: int = 10
    n_random_sets: int = N_RANDOM_SETS
    ablation: str = "zero"
    seed: int = 0
    batch_size: int = 8
