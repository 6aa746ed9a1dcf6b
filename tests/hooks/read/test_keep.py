"""Reductions: each function of `interp.keep` makes an object of its class that prints as it is written and compares."""

from typing import Any, cast

import pytest
import torch

from interp.errors import SpanError, UsageError
from interp.hooks.read import keep

MADE = {
    "mass('needle', 0, (2, 5), by_value=True)": (keep.Mass, lambda: keep.mass("needle", 0, range(2, 5), by_value=True)),
    "at(-1, -2, total=True)": (keep.At, lambda: keep.at(-1, -2, total=True)),
    "top_keys(3)": (keep.TopKeys, lambda: keep.top_keys(3)),
    "entropy()": (keep.Entropy, keep.entropy),
    "lse()": (keep.Lse, keep.lse),
    "columns('max')": (keep.Columns, lambda: keep.columns("max")),
    "rows(logits=True)": (keep.Rows, lambda: keep.rows(logits=True)),
    "pattern()": (keep.Pattern, keep.pattern),
    "blocks(16)": (keep.Blocks, lambda: keep.blocks(16)),
    "z()": (keep.Z, keep.z),
    "q()": (keep.Q, keep.q),
    "k()": (keep.K, keep.k),
    "v()": (keep.V, keep.v),
}


@pytest.mark.parametrize("shown", MADE)
def test_functions_make_objects_that_print_as_written(shown):
    kind, make = MADE[shown]
    assert type(make()) is kind
    assert repr(make()) == shown
    assert make() == make()
    assert hash(make()) == hash(make())
    assert eval(shown, dict(vars(keep))) == make()


def test_every_object_differs_from_the_others():
    assert len({make() for _, make in MADE.values()}) == len(MADE)


def test_tensors_are_compared_by_identity():
    keys, weights = torch.zeros(1, 4, 2, dtype=torch.int64), torch.ones(1, 4)
    assert keep.at(keys=keys) == keep.at(keys=keys) != keep.at(keys=keys.clone())
    assert keep.columns(weights=weights) == keep.columns(weights=weights) != keep.columns(weights=weights.clone())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: keep.mass(), UsageError, "was given no span"),
        (lambda: keep.mass(-1), SpanError, "count from 0"),
        (lambda: keep.mass((3, 3)), SpanError, "is not empty"),
        (lambda: keep.at(), UsageError, "and not both"),
        (lambda: keep.at(keys=torch.zeros(2, 3)), UsageError, r"given shape \(2, 3\)"),
        (lambda: keep.top_keys(65), UsageError, "from 1 to 64"),
        (lambda: keep.columns(cast("Any", "median")), UsageError, "unknown statistic 'median'"),
        (lambda: keep.columns(weights=torch.zeros(3)), UsageError, r"given shape \(3,\)"),
        (lambda: keep.blocks(0), UsageError, "at least 1 position"),
    ],
)
def test_wrong_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
