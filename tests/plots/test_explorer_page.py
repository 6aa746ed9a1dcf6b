"""The explorer as a page: one file, its data, text from outside, other pages and notebooks."""

import base64
import csv
import hashlib
import json
import re
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser as browsers
import numpy as np
import pytest
import torch
from explorer_page import BLOCK, LENGTH, N, part, point, ready, saved
from playwright.sync_api import expect

from interp import plots
from interp.analyses.views.explore import SUMMARIES
from interp.errors import UsageError
from interp.hooks.model.heads import HeadSet
from interp.hooks.model.provenance import Provenance

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><a href='javascript:alert(2)'>x</a>"
    "<!-- \" ' onclick=alert(3) {{ 7 * 7 }} \u2028\u2029\u202e\x00\x1b\ud800"
)


def unpack(packed: str, kind: str, *shape: int) -> torch.Tensor:
    """The numbers that `pack` wrote."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(np.dtype(kind).itemsize, -1)
    values = np.ascontiguousarray(planes.T).reshape(-1).view(kind).reshape(shape)
    return torch.from_numpy(values.astype(np.float32 if kind == "<f4" else np.int64))


def data_of(explored: Any) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The data of a page, and from them the top keys and their weights."""
    data = json.loads(plots.explorer(explored).data())
    shape = len(data["chosen"]), data["k"], len(data["tokens"])
    back = unpack(data["back"], "<u2" if shape[2] < 1 << 16 else "<u4", *shape).movedim(1, -1)
    keys = torch.where(back > 0, torch.arange(shape[2])[:, None] - back + 1, -1)
    return data, keys, (unpack(data["probs"], "u1", *shape) / 255).square().movedim(1, -1)


def test_the_page_is_one_file_that_allows_its_own_script_alone(explored, page, tmp_path):
    made = plots.explorer(explored)
    source = page.read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    assert len(scripts) == 1
    assert scripts[0].startswith(made.script())
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in source
    assert "default-src 'none'" in source
    assert not re.search(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', source)
    assert source.count(made.style()) == source.count(made.data()) == 1
    panel = made.panel()
    assert "<script" not in panel
    assert "<style" not in panel
    assert set(re.findall(r"\.explorer[^{]*\{|^\.(\w+)", made.style(), re.MULTILINE)) <= {"", "explorer"}
    data = json.loads(made.data())
    assert data["tokens"] == list(explored.tokens)
    assert set(data["about"]) == set(SUMMARIES)
    with pytest.raises(UsageError, match="is a folder; give a file name"):
        made.save(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        made.save(tmp_path / "none" / "x.html")
    assert repr(made).startswith("Explorer(Explored('A needle', 300 tokens")


@pytest.mark.parametrize(
    ("marks", "note"),
    [
        (("needle", "distractor"), "needle: the sentence that holds the answer; distractors: other made-up facts."),
        (("needle", "answer"), "needle: the sentence that holds the answer."),
        (("distractor",), "distractors: other made-up facts."),
        (("question",), ""),
        ((), ""),
    ],
)
def test_spans_of_a_needle_prompt_are_explained_where_they_are_there(explored, marks, note):
    panel = plots.explorer(replace(explored, marks=dict.fromkeys(marks, ((4, 9),)))).panel()
    assert re.findall(r'<p class="x-soft">((?:needle|distractors):[^<]*)</p>', panel) == ([note] if note else [])


def test_the_data_hold_maps_keys_and_summaries(explored):
    data, keys, probs = data_of(explored)
    assert torch.equal(keys, explored.keys)
    torch.testing.assert_close(probs, explored.probs)
    below = (unpack(data["maps"], "u1", 7, LENGTH * (LENGTH + 1) // 2) / 255).square()
    torch.testing.assert_close(below, explored.maps[:, *torch.tril_indices(LENGTH, LENGTH)])
    for name, table in explored.summaries.items():
        assert torch.equal(unpack(data["summaries"][name], "<f4", 2, 4), table)


def test_every_weight_is_kept_within_the_stated_bound(explored):
    weights = torch.logspace(-7, 0, N * 4 * 2).view(2, N, 4)
    _, _, found = data_of(replace(explored, probs=weights))
    assert bool(((found - weights).abs() <= weights.sqrt() / 255 + 4e-6).all())
    assert bool((found[weights > 4e-6] > 0).all())


def test_positions_beyond_two_bytes_are_exact(explored):
    n = 70_000
    keys = torch.randint(-1, n, (1, n, 1)).clamp(max=torch.arange(n)[:, None])
    long = replace(
        explored, tokens=("x",) * n, block=1024, heads=HeadSet.parse("L1H1"), keys=keys, probs=torch.ones(1, n, 1),
        maps=torch.zeros(7, 69, 69), marks={},
    )  # fmt: skip
    assert torch.equal(data_of(long)[1], keys)
    assert keys.max() > 65_535


def test_a_table_holds_no_formula(browser, explored, tmp_path):
    risky = replace(explored, tokens=(*explored.tokens[: -len(browsers.FORMULAS)], *browsers.FORMULAS))
    found: dict[int, str] = {}
    with browsers.opened(browser, plots.explorer(risky).save(tmp_path / "risky.html")) as watched:
        ready(watched)
        for i in range((N - len(browsers.FORMULAS)) // BLOCK, LENGTH):
            part(watched, "map").click(position=point(watched, i, 0))
            rows = list(csv.reader(saved(watched, "top-csv")[1].splitlines(keepends=True)))
            found |= {int(row[1]): row[2] for row in rows[1:]}
        watched.clean()
    assert [found[q] for q in range(N - len(browsers.FORMULAS), N)] == list(browsers.FORMULAS.values())


def test_text_from_outside_is_shown_and_never_run(browser, explored, tmp_path):
    tokens = tuple(HOSTILE if i % 5 == 0 else token for i, token in enumerate(explored.tokens))
    assert explored.provenance
    origin = replace(explored.provenance, model=HOSTILE)
    hostile = replace(explored, title=HOSTILE, tokens=tokens, marks={HOSTILE: ((40, 50),)}, provenance=origin)
    made = plots.explorer(hostile)
    assert not set("<>&\u2028\u2029\u202e\x00\x1b") & set(made.data())
    with browsers.opened(browser, made.save(tmp_path / "hostile.html")) as watched:
        ready(watched)
        page = watched.page
        expected = plots.visible(HOSTILE)
        assert page.locator("h1").inner_text() == expected
        page.locator("[data-mark]").click()
        shown = page.locator('[data-part="keys"] [data-i="40"]')
        assert shown.evaluate("(token) => token.textContent") == expected
        assert "\u202e" not in page.content()
        svg = saved(watched, "map-svg")[1]
        assert "<script" not in svg
        assert page.locator("img, iframe, a[href]").count() == 0
        assert page.locator("script").count() == 2
        page.wait_for_timeout(200)
        watched.clean()
    frame = made._repr_html_()
    assert frame.count("<") == 2
    assert '"' not in frame.split('srcdoc="')[1].split('"></iframe>')[0]


def test_a_notebook_shows_it_in_a_frame_of_its_own(browser, explored, tmp_path):
    notebook = tmp_path / "notebook.html"
    frame = plots.explorer(explored, height=700)._repr_html_()
    notebook.write_text(f"<!doctype html><meta charset=utf-8><p class='x-soft'>a cell</p>{frame}", "utf-8")
    with browsers.opened(browser, notebook) as watched:
        inside = watched.page.frame_locator("iframe")
        inside.locator(".explorer[data-drawn]").wait_for()
        assert inside.locator("h1").inner_text() == "A needle"
        assert watched.page.locator("iframe").bounding_box()["height"] == 700
        plain, styled = (
            where.evaluate("(text) => getComputedStyle(text).fontSize")
            for where in (watched.page.locator("p"), inside.locator(".x-head p"))
        )
        assert plain != styled
        assert watched.page.evaluate("typeof interpExplorer") == "undefined"
        with watched.page.expect_download() as waiting:
            inside.locator('[data-part="map-csv"]').click()
        assert Path(waiting.value.path()).read_text().startswith("head,first query")
        watched.clean()


def test_one_page_holds_two_panels_and_heads_are_chosen_from_outside(browser, explored, tmp_path):
    made = plots.explorer(explored)
    other = plots.explorer(replace(explored, title="Another"))
    file = tmp_path / "two.html"
    start = (
        "for (const at of ['one', 'two']) interpExplorer(document.querySelector(`#${at} .explorer`), "
        "JSON.parse(document.getElementById(`${at}-data`).textContent));"
    )
    panels = "".join(
        f'<section id="{at}">{panel.panel()}</section>'
        f'<script type="application/json" id="{at}-data">{panel.data()}</script>'
        for at, panel in (("one", made), ("two", other))
    )
    head, script = f"<!doctype html><meta charset=utf-8><style>{made.style()}</style>", f"{made.script()}{start}"
    file.write_text(f"{head}{panels}<script>{script}</script>", "utf-8")
    with browsers.opened(browser, file) as watched:
        ready(watched, "#one .explorer")
        ready(watched, "#two .explorer")
        page = watched.page
        before = page.locator("#one [data-part=name]").inner_text()
        pick = "(root, detail) => root.dispatchEvent(new CustomEvent('interp:head', {detail}))"
        page.locator("#two .explorer").evaluate(pick, "L0H3")
        assert page.locator("#two [data-part=name]").inner_text() == "L0H3"
        assert page.locator("#one [data-part=name]").inner_text() == before
        for unknown in ("L9H9", "", "needle", None, 3):
            page.locator("#two .explorer").evaluate(pick, unknown)
        assert page.locator("#two [data-part=name]").inner_text() == "L0H3"
        watched.clean()


def test_old_or_broken_data_are_told(browser, explored, tmp_path):
    source = plots.explorer(explored).page()
    cut = re.sub(r'"maps":"[^"]{8}', '"maps":"AAAAAAAA', source)
    assert cut != source
    file = tmp_path / "broken.html"
    file.write_text(cut, "utf-8")
    with browsers.opened(browser, file) as watched:
        error = watched.page.locator('[data-part="error"]')
        expect(error).to_be_visible()
        assert "The data cannot be read here" in error.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "size"), [("wide", browsers.WIDE), ("middle", (900, 900)), ("narrow", browsers.NARROW)]
)
def test_it_fits_the_window_in_both_schemes(browser, page, name, size, scheme):
    with browsers.opened(browser, page, size, color_scheme=scheme) as watched:
        ready(watched)
        watched.page.get_by_role("button", name="L0H1", exact=True).click()
        watched.shoot(f"explorer-{name}-{scheme}", full_page=True)
        assert watched.page.evaluate("document.documentElement.scrollWidth") == size[0]
        boxes = [watched.page.locator(f".x-{kind}").bounding_box() for kind in ("heads", "map", "text")]
        side_by_side = {"wide": [True, True], "middle": [False, True], "narrow": [False, False]}[name]
        assert [a["x"] + a["width"] <= b["x"] for a, b in pairwise(boxes)] == side_by_side
        ink, ground = (
            watched.page.locator(where).evaluate(f"(element) => getComputedStyle(element).{what}")
            for where, what in ((".explorer", "color"), ("body", "backgroundColor"))
        )
        brightness = [sum(int(x) for x in re.findall(r"\d+", colour)[:3]) for colour in (ink, ground)]
        assert (brightness[0] > brightness[1]) == (scheme == "dark")
        watched.clean()


def test_provenance_is_optional(explored):
    bare = plots.explorer(replace(explored, provenance=None, title="", marks={}))
    assert bare.title == "Attention on one prompt"
    assert bare.facts[0] == "300 tokens in blocks of 8"
    assert isinstance(explored.provenance, Provenance)
    assert plots.explorer(explored).facts[0] == "LlamaForCausalLM"
