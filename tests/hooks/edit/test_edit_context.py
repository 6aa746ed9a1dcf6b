"""The attention that keys receive from some rows, as an edit reads it, by every way of reading it."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from interp.hooks.edit import edit_context
from interp.hooks.edit.edit import Edit, steering
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families

LENGTHS = (23, 17)


@dataclass(frozen=True)
class Reading(Edit):
    """Changes nothing, and stores the attention that each key receives from rows at some positions, by layer."""

    places: tuple[int, ...] = ()
    """Positions counted from the end of a prompt."""
    all_rows: bool = False
    found: dict[int, Any] = field(default_factory=dict, hash=False, compare=False)

    def apply(self, here: Any) -> Any:
        length = torch.tensor(LENGTHS)[:, None]
        rows = torch.stack([here.row_position == length[:, 0, None] - 1 - place for place in self.places]).any(0)
        self.found[here.site.layer] = here.columns(rows & (here.row_position >= 0), self.all_rows)
        return here.call


@pytest.mark.parametrize("whole", [edit_context.MAX_PATTERN_ENTRIES, 0], ids=["from the pattern", "by an engine"])
@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("places", [(0, 1, 5), tuple(range(23))], ids=["few rows", "all rows"])
@torch.no_grad()
def test_attention_received_from_some_rows_is_the_mean_of_the_pattern(places, all_rows, whole, monkeypatch):
    monkeypatch.setattr(edit_context, "MAX_PATTERN_ENTRIES", whole)
    model: Any = families.make("llama")
    draw = torch.Generator().manual_seed(1)
    prompts = Prompts.from_ids([torch.randint(5, 60, (n,), generator=draw).tolist() for n in LENGTHS])
    reading = Reading(places=places, all_rows=all_rows)
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
            expected = total / (len(taken) if all_rows else seen.clamp(min=1))
            torch.testing.assert_close(received[row, :, -n:], expected, atol=1e-5, rtol=0)
