"""The note of the atlas states under which role a head is drawn, and its legend counts both."""

from typing import Any

import torch

import interp.plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import head_roles

plots: Any = interp.plots
NOISE = torch.linspace(-0.01, 0.01, 12)[:, None, None]


def tables() -> dict[str, HeadScores]:
    """The first head is confident in both roles, the second in the second one alone, and the third in neither."""
    one, other = torch.zeros(2, 1, 3)
    one[0], other[0] = torch.tensor([0.9, 0.32, 0.1]), torch.tensor([0.9, 0.9, 0.1])
    spread = torch.tensor([1.0, 60.0, 1.0])
    return {
        name: HeadScores(name, (mean + NOISE * spread).clamp(0, 1), threshold=0.3)
        for name, mean in (("induction", one), ("sinks", other))
    }


def test_a_head_is_drawn_under_its_first_confident_role():
    found = head_roles(tables())
    assert found.has[:, 0, 1].tolist() == [True, True]
    assert found.confident[:, 0, 1].tolist() == [False, True]
    assert found.main[0].tolist() == [0, 1, -1]
    figure = plots.atlas(found)
    note = figure.layout.title.subtitle.text
    assert "in the colour of the first role in the legend that is confident (if none is, of its first role)." in note
    assert "in brackets, of all heads that have the role." in note
    names = [trace.name for trace in figure.data[1:]]
    assert names == ["Induction: 1 (of 2)", "Sinks: 1 (of 2)", "no role: 1"]
    assert figure.layout.yaxis.title.text == "heads of the layer, sorted by role"
