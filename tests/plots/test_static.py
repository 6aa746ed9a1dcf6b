"""The atlas, depth profiles, and figures as pictures without a browser."""

import json
from io import BytesIO
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import torch
from PIL import Image
from run_results import ablation, curve

import interp.plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import head_roles
from interp.errors import RunError, UsageError
from interp.hooks.model.heads import Head

plots: Any = interp.plots
HOSTILE = "</script><script>alert(1)</script> $x_1$ & <b>"


def scores(name: str, seed: int, threshold: float | None = 0.5, layers: int = 4, heads: int = 3, **more) -> HeadScores:
    values = torch.rand(8, layers, heads, generator=torch.Generator().manual_seed(seed))
    return HeadScores(name, values, unit="share of attention", threshold=threshold, **more)


TABLES = {"retrieval": scores("retrieval", 0), "induction": scores("induction", 1), "sinks": scores("sinks", 2)}


def test_the_atlas_has_every_head_once_sorted_by_role_in_each_layer():
    figure, found = plots.atlas(TABLES), head_roles(TABLES)
    cells = figure.data[0]
    for layer in range(4):
        heads = [Head.parse(cells.customdata[row][layer].split(":")[0].split("<")[0]).head for row in range(3)]
        assert sorted(heads) == [0, 1, 2]
        kinds = [int(found.main[layer, head]) for head in heads]
        assert kinds == sorted(kinds, key=lambda kind: kind if kind >= 0 else 99)
        for row, head in enumerate(heads):
            main = kinds[row]
            confident = main >= 0 and bool(found.confident[main, layer, head])
            assert cells.z[row][layer] == (6 if main < 0 else 2 * main + confident)
            assert cells.text[row][layer] == ("" if main < 0 else str(head))


def test_the_legend_of_the_atlas_counts_the_heads():
    figure, found = plots.atlas(TABLES), head_roles(TABLES)
    shown = [int(trace.name.split(": ")[1].split(" ")[0]) for trace in figure.data[1:]]
    assert sum(shown) == 12
    assert shown == [int((found.main == kind).sum()) for kind in (0, 1, 2, -1)]


def test_the_table_behind_the_atlas_holds_the_scores():
    meta = plots.atlas(TABLES).layout.meta
    assert meta["columns"] == ["head", "role", "Retrieval", "Induction", "Sinks"]
    for name, _, *values in meta["rows"]:
        head = Head.parse(name)
        expected = [float(table.values[head]) for table in TABLES.values()]
        assert values == pytest.approx(expected, rel=1e-5)


def test_depth_profiles_hold_the_highest_head_and_the_mean_of_each_layer():
    figure = plots.depth(TABLES | {"signed": HeadScores("signed", torch.randn(4, 4, 3))})
    assert len(figure.data) == 6
    for place, table in enumerate(TABLES.values()):
        line, mean = figure.data[2 * place : 2 * place + 2]
        assert np.allclose(line.y, table.values.max(1).values)
        assert np.allclose(mean.y, table.values.mean(1))


def figures() -> dict[str, Any]:
    received = torch.rand(8, 4, 3, 12, generator=torch.Generator().manual_seed(5))
    sinks = HeadScores("sinks", received[..., 0], threshold=0.3, extras={"positions": received})
    signed = HeadScores("gain", torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(6)))
    return {
        "atlas": plots.atlas(TABLES),
        "depth": plots.depth(TABLES),
        "head_map": plots.head_map(TABLES["sinks"]),
        "signed": plots.gains(signed),
        "top_heads": plots.top_heads(TABLES["retrieval"]),
        "scatter": plots.scatter(TABLES["retrieval"], TABLES["induction"], 3),
        "ablation": plots.trials(ablation()),
        "curve": plots.trials(curve()),
        "positions": plots.positions(sinks),
    }


@pytest.mark.parametrize(
    "name", ["atlas", "depth", "head_map", "signed", "top_heads", "scatter", "ablation", "curve", "positions"]
)
def test_every_figure_has_a_static_form(name, tmp_path):
    figure = figures()[name]
    for ending, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = plots.save(figure, tmp_path / f"{name}{ending}", scale=1.0)
        assert path.read_bytes().startswith(begin)
    svg = (tmp_path / f"{name}.svg").read_text()
    assert figure.layout.title.text.split(":")[0].split(",")[0] in svg
    picture = np.asarray(Image.open(BytesIO((tmp_path / f"{name}.png").read_bytes())).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_the_colours_of_a_static_map_are_those_of_the_scores():
    table = HeadScores("x", torch.tensor([[[0.0, 1.0]]] * 2))
    figure = plots.head_map(table)
    axes = plots.picture(figure).axes[0]
    drawn = axes.collections[0]
    shown = drawn.to_rgba(np.array([0.0, 1.0]))
    ends = [
        matplotlib.colors.to_rgb(colour)
        for _, colour in (plots.head_map(table).layout.coloraxis.colorscale[i] for i in (0, -1))
    ]
    assert np.allclose(shown[:, :3], ends, atol=0.01)
    assert np.allclose(np.asarray(drawn.get_array()).ravel(), [0.0, 1.0])


def test_a_figure_that_was_packed_for_a_notebook_is_drawn_the_same():
    import plotly.graph_objects as go

    figure = plots.head_map(TABLES["sinks"])
    packed = go.Figure(json.loads(figure.to_json()))
    one, two = (plots.picture(each).axes[0].collections[0].get_array() for each in (figure, packed))
    assert isinstance(packed.to_dict()["data"][0]["z"], dict)
    assert np.array_equal(np.asarray(one), np.asarray(two))


def test_an_axis_that_runs_down_runs_down():
    import plotly.graph_objects as go

    figure = go.Figure(go.Heatmap(z=[[0.0, 1.0], [2.0, 3.0]], colorscale=[[0, "#ffffff"], [1, "#000000"]]))
    figure.update_yaxes(autorange="reversed")
    low, high = plots.picture(figure).axes[0].get_ylim()
    assert low > high


def test_text_from_outside_stays_text(tmp_path):
    table = HeadScores(HOSTILE, torch.rand(4, 3, 2), unit=HOSTILE)
    svg = plots.save(plots.top_heads(table), tmp_path / "x.svg").read_text()
    assert "<script" not in svg
    assert "$x_1$ &amp; &lt;b&gt;" in svg
    page = plots.save(plots.top_heads(table), tmp_path / "x.html").read_text()
    assert "<script>alert" not in page
    assert 'src="http' not in page


def test_the_same_figure_gives_the_same_file(tmp_path):
    one, two = (plots.save(plots.depth(TABLES), tmp_path / f"{i}.svg").read_bytes() for i in range(2))
    assert one == two


def test_other_endings_and_places_are_refused(tmp_path):
    figure = plots.depth(TABLES)
    with pytest.raises(UsageError, match=r"x.jpg ends in .jpg; choose from .html, .png, .svg, .pdf"):
        plots.save(figure, tmp_path / "x.jpg")
    with pytest.raises(RunError, match="cannot be written"):
        plots.save(figure, tmp_path / "none" / "x.svg")
    import plotly.graph_objects as go

    with pytest.raises(UsageError, match="'pie' has no static form"):
        plots.picture(go.Figure(go.Pie(values=[1, 2])))
