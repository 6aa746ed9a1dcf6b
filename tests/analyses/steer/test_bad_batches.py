"""Edits that do not fit a batch are refused and leave the model unchanged."""

import pytest
import torch
from steering_oracle import batch, logits

from interp import steer
from interp.errors import HeadError, InterpError, SpanError, UsageError
from interp.hooks.edit.edit import steering

VECTORS = {"L0H1": torch.ones(16)}


def test_bad_batches_leave_the_model_as_it_was(tiny_model):
    model, prompts = tiny_model("llama"), batch()
    before = logits(model, prompts)
    wrong = [
        (steer.Pasta("nowhere"), prompts, SpanError),
        (steer.Pasta("mark"), None, SpanError),
        (steer.Pasta("mark"), batch((13, 14)), SpanError),
        (steer.Pasta("mark", heads="L9H0"), prompts, HeadError),
        (steer.Knockout((0, 4)), prompts, UsageError),
        (steer.Redistribute("nowhere"), prompts, SpanError),
        (steer.FoundInTheMiddle(["mark", (7, 9)], [0.0, 0.0]), prompts, SpanError),
        (steer.FoundInTheMiddle(["mark", "other"], torch.zeros(1, 4, 2)), prompts, UsageError),
        (steer.Offset(VECTORS), None, SpanError),
        (steer.Offset({"L0H9": [0.0] * 16}), prompts, HeadError),
        (steer.Offset({"L0H0": [1.0, 2.0]}), prompts, UsageError),
        ("pasta", prompts, UsageError),
    ]
    for edit, given, kind in wrong:
        with pytest.raises(kind), steering(model, edit, given):
            logits(model, prompts)
        assert torch.equal(logits(model, prompts), before)
    assert issubclass(SpanError, InterpError)
