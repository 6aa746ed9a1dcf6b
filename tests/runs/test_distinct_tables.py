"""No two tables of a run measure the same thing on its standard prompts."""

from itertools import combinations

import pytest
import torch

from interp.analyses import registry
from interp.analyses.results.head_scores import HeadScores
from interp.runs.plan import ScorePlan
from interp.runs.run import Run

CLOSE = 0.98
SAME = {
    frozenset({"induction", "razor_induction"}),
    frozenset({"duplicate_token", "razor_echo"}),
    frozenset({"semantic_retrieval", "retrieval_reasoning"}),
}
"""The pairs of tables that two papers measure alike.

The first two are one formula on two copies of the tokens and on four. The third is attention on the answer while the
model replies, on needles and on inferred needles, over all keys of the answer and over the largest ones: r = .99.
"""
OTHERS = (
    "semantic_retrieval",
    "retrieval_reasoning",
    "lookback",
    "task_kv",
    "razor_induction",
    "razor_echo",
    "positional",
)


def correlation(one: HeadScores, other: HeadScores) -> float:
    """Pearson's correlation over the heads that have both scores."""
    pair = torch.stack([one.values.flatten(), other.values.flatten()]).double()
    return float(torch.corrcoef(pair[:, pair.isfinite().all(0)])[0, 1])


def close(tables: dict[str, HeadScores]) -> dict[frozenset[str], float]:
    """The pairs of tables that correlate above .98."""
    pairs = combinations(tables, 2)
    found = {frozenset(pair): correlation(tables[pair[0]], tables[pair[1]]) for pair in pairs}
    return {pair: value for pair, value in found.items() if value > CLOSE}


@pytest.mark.slow
def test_tables_of_a_run_differ(demo, tmp_path):
    default = [entry.name for entry in registry.analyses_named("basic")]
    plan = ScorePlan(analyses=(*default, *OTHERS), check=False)
    tables = Run.open(tmp_path / "run", plan, *demo).finish(progress=False).scores
    assert set(tables) >= {*default, *OTHERS}
    assert close({name: tables[name] for name in default}) == {}
    # not only within: a pair that no longer agrees is no longer one
    assert set(close(tables)) == SAME
