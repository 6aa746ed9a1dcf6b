"""What an edit reads of an attention call: what keys receive from some rows, by whichever way it is read."""

from dataclasses import dataclass, field
from typing import Any

import families
import pytest
import torch

from interp.hooks.edit import edit_context as here
from interp.hooks.edit.edit import Edit, steering
from interp.hooks.prompts.prompts import Prompts

LENGTHS = (23, 17)


@dataclass(frozen=True)
class Reading(Edit):
    """Changes nothing, and keeps what each key receives from the rows at some positions, by layer."""

    places: tuple[int, ...] = ()
    """counted from the end of a prompt"""
    every: bool = False
    found: dict[int, Any] = field(default_factory=dict, hash=False, compare=False)

    def apply(self, here: Any) -> Any:
        length = torch.tensor(LENGTHS)[:, None]
        rows = torch.stack([here.row_position == length[:, 0, None] - 1 - place for place in self.places]).any(0)
        self.found[here.site.layer] = here.columns(rows & (here.row_position >= 0), self.every)
        return here.call


@pytest.mark.parametrize("whole", [here.MAX_PATTERN_ENTRIES, 0], ids=["from the pattern", "by an engine"])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("places", [(0, 1, 5), tuple(range(23))], ids=["few rows", "all rows"])
@torch.no_grad()
def test_what_keys_receive_from_some_rows_is_the_mean_of_the_pattern(places, every, whole, monkeypatch):
    monkeypatch.setattr(here, "MAX_PATTERN_ENTRIES", whole)
    model: Any = families.make("llama")
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts.from_ids([torch.randint(5, 60, (n,), generator=draw).tolist() for n in LENGTHS])
    reading = Reading(places=places, every=every)
    inputs = prompts.tensors()
    with steering(model, reading, prompts):
        model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    model.set_attn_implementation("eager")
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        patterns = model(torch.tensor([prompt.ids]), output_attentions=True).attentions
        taken = [n - 1 - place for place in places if place < n]
        seen = torch.ones(n, n).tril()[taken].sum(0)
        for layer, received in reading.found.items():
            total = patterns[layer][0, :, taken].sum(1)
            expected = total / (len(taken) if every else seen.clamp(min=1))
            torch.testing.assert_close(received[row, :, -n:], expected, atol=1e-5, rtol=0)
