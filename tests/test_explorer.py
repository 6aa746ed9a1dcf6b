"""The explorer in a browser: it says what the data hold, works without a mouse and a network, and runs no text."""

import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser as browsers
from interp.testing import families
import pytest
import torch
from playwright.sync_api import expect

from interp import plots, report
from interp.analyses.views.explore import SUMMARIES, Explored, explore
from interp.errors import UsageError
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.plots.style import embed

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><a href='javascript:alert(2)'>x</a>"
    "<!-- \" ' onclick=alert(3) {{ 7 * 7 }} \u2028\u2029\u202e\x00\x1b\ud800"
)
N, BLOCK, LENGTH = 300, 8, 38
LEFT, TOP = 48, 6


@pytest.fixture(scope="module")
def explored(tiny_model) -> Explored:
    """Random attention of eight heads on 300 tokens, as a file gives it back: two heads with top keys, seven maps.

    The last query of L1H2 looks at the needle.
    """
    ids = torch.randint(3, families.VOCAB, (N,), generator=torch.Generator().manual_seed(0))
    prompts = Prompts.from_ids([ids.tolist()], spans=[{"needle": (40, 50), "answer": (44, 47), "question": (285, 295)}])
    found = explore(
        tiny_model("llama"), prompts, heads="L0H1, L1H2", maps="L0, L1H0, L1H1, L1H2", block=BLOCK, title="A needle"
    )
    found.keys[1, -1, 0], found.probs[1, -1, 0] = 45, 0.9
    words = tuple("\n" if i % 40 == 7 else f" word{i}" for i in range(N))
    return Explored.from_dict(replace(found, tokens=words).to_dict())


@pytest.fixture(scope="module")
def page(explored, tmp_path_factory) -> Path:
    return plots.explorer(explored).save(tmp_path_factory.mktemp("explorer") / "explorer.html")


@pytest.fixture
def shown(browser, page):
    with browsers.opened(browser, page) as watched:
        ready(watched)
        yield watched
        watched.clean()


def ready(watched: browsers.Watched, where: str = ".explorer") -> None:
    watched.page.locator(f"{where}[data-drawn]").wait_for()


def part(watched: browsers.Watched, name: str) -> Any:
    return watched.page.locator(f'[data-part="{name}"]')


def point(watched: browsers.Watched, i: int, j: int) -> dict[str, float]:
    """Where the block (i, j) stands on the whole map."""
    side = part(watched, "map").bounding_box()["height"] - 36
    return {"x": LEFT + (j + 0.5) / LENGTH * side, "y": TOP + (i + 0.5) / LENGTH * side}


def said(i: int) -> str:
    return f"{i * BLOCK}–{min(N, (i + 1) * BLOCK) - 1}"


def reading(explored: Explored, head: str, i: int, j: int, marks: str = "") -> str:
    mean = plots.number(float(explored.map(head)[i, j]))
    return f"queries {said(i)} on keys {said(j)}{marks and f' ({marks})'}: mean {mean} of the row"


def saved(watched: browsers.Watched, name: str) -> tuple[str, str]:
    with watched.page.expect_download() as waiting:
        part(watched, name).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_text("utf-8")


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
    assert report.embed is embed
    with pytest.raises(UsageError, match="is a folder; give a file name"):
        made.save(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        made.save(tmp_path / "none" / "x.html")
    assert repr(made).startswith("Explorer(Explored('A needle', 300 tokens")


def test_it_opens_from_disk_offline_with_the_head_that_found_the_mark(shown, explored):
    page = shown.page
    heading = page.locator("h1").inner_text()
    assert heading == "A needle"
    assert "300 tokens in blocks of 8" in page.locator(".x-head").inner_text()
    assert part(shown, "name").inner_text() == "L1H2"
    assert part(shown, "query-name").inner_text() == said(37)
    assert part(shown, "key-name").inner_text() == said(5)
    assert page.locator('[data-part="keys"] .x-target').inner_text() == " word45"
    assert page.locator(".x-cell").count() == 8
    assert page.locator(".x-cell.x-kept").count() == 2
    names = page.evaluate("Object.keys(window).filter((name) => /interp|explore/i.test(name))")
    assert sorted(names) == ["interpCsv", "interpExplorer", "interpSave"]


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_head_says_its_number_under_every_colour(shown, explored, name):
    title, unit = SUMMARIES[name]
    part(shown, "summary").select_option(name)
    shown.page.locator(".x-cell").nth(5).hover()
    # rows are heads: the sixth cell is head 2 of layer 1
    value = float(explored.summaries[name][1, 2])
    written = plots.number(value) if value < 100 else f"{value:,.0f}"
    told = f"{written} {title}" if unit == "share of attention" else f"{written} {unit}, {title}"
    assert part(shown, "head-readout").inner_text() == f"L1H2: {told}"
    shades = [
        [int(x) for x in re.findall(r"\d+", cell.evaluate("(cell) => cell.style.backgroundColor"))]
        for cell in shown.page.locator(".x-cell").all()
    ]
    lightness = torch.tensor([0.3 * r + 0.59 * g + 0.11 * b for r, g, b in shades])
    order = explored.summaries[name].T.flatten().sort(descending=True).values
    by_value = lightness[explored.summaries[name].T.flatten().argsort(descending=True)]
    assert bool((by_value.diff() >= -1e-6).all()), (order, by_value)


def test_hovering_a_block_reads_the_number_in_the_data(shown, explored):
    shown.page.locator('[data-at="L1H1"]').click()
    for i, j, marks in ((37, 0, ""), (20, 5, "needle, answer"), (20, 6, "needle"), (37, 36, "question"), (3, 3, "")):
        part(shown, "map").hover(position=point(shown, i, j))
        assert part(shown, "map-readout").inner_text() == reading(explored, "L1H1", i, j, marks)
    # nothing looks ahead
    part(shown, "map").hover(position=point(shown, 3, 30))
    assert part(shown, "map-readout").inner_text().startswith("queries 296–299 on keys")


def test_zooming_shows_fewer_blocks_and_escape_all(shown, explored):
    canvas, readout, place = part(shown, "map"), part(shown, "map-readout"), point(shown, 30, 10)

    def under(at=place) -> str:
        shown.page.mouse.move(5, 5)
        canvas.hover(position=at)
        return readout.inner_text().split(":")[0]

    whole = under()
    assert whole == f"queries {said(30)} on keys {said(10)}"
    assert part(shown, "out").is_disabled()
    # a wheel over a map that nobody clicked scrolls the page
    shown.page.mouse.wheel(0, -400)
    assert part(shown, "out").is_disabled()
    canvas.click(position=place)
    shown.page.mouse.wheel(0, -200)
    assert under() == whole
    nearby = {"x": place["x"] + 40, "y": place["y"]}
    near = under(nearby)
    shown.page.keyboard.press("Escape")
    assert part(shown, "reset").is_disabled()
    assert under(nearby) != near
    shown.page.keyboard.press("+")
    assert not part(shown, "out").is_disabled()
    shown.page.keyboard.press("-")
    assert part(shown, "out").is_disabled()

    box = canvas.bounding_box()
    corner, other = point(shown, 20, 4), point(shown, 29, 13)
    shown.page.mouse.move(box["x"] + corner["x"], box["y"] + corner["y"])
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + other["x"], box["y"] + other["y"], steps=4)
    shown.page.mouse.up()
    # nine blocks wide from the middle of block 4 on: the corners are those that were drawn
    side = box["height"] - 36
    assert (
        under({"x": LEFT + side * 1.2 / 9, "y": TOP + side * 2.2 / 9})
        == f"queries {said(22)} on keys {said(5)} (needle, answer)"
    )
    canvas.dblclick(position={"x": LEFT + side / 2, "y": TOP + side / 2})
    assert part(shown, "out").is_disabled()
    part(shown, "in").click()
    assert not part(shown, "reset").is_disabled()
    part(shown, "reset").click()
    assert part(shown, "reset").is_disabled()


def test_everything_can_be_done_with_the_keyboard(shown, explored):
    page, press = shown.page, shown.page.keyboard.press
    part(shown, "summary").focus()
    press("Tab")
    assert page.evaluate("document.activeElement.dataset.at") == part(shown, "name").inner_text()
    while page.evaluate("document.activeElement.dataset.at") != "L0H0":
        press("ArrowLeft")
        press("ArrowUp")
    press("ArrowRight")
    press("ArrowDown")
    press("ArrowDown")
    assert part(shown, "head-readout").inner_text().startswith("L1H2: ")
    press("Enter")
    assert part(shown, "name").inner_text() == "L1H2"
    part(shown, "map").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowLeft", "ArrowRight"):
        press(key)
    i, j = 35, int(part(shown, "map-readout").inner_text().split("keys ")[1].split("–")[0]) // BLOCK
    assert part(shown, "map-readout").inner_text().startswith(f"queries {said(i)} on keys {said(j)}")
    assert part(shown, "query-name").inner_text() == said(i)
    assert part(shown, "key-name").inner_text() == said(j)
    # the query of the block that looks most at these keys is chosen
    on = [sum(w for key, w in explored.top("L1H2", q) if key // BLOCK == j) for q in range(280, 288)]
    best = max(range(280, 288), key=lambda q: (on[q - 280], q))
    press("Enter")
    assert int(page.evaluate("document.activeElement.dataset.i")) == best
    page.locator('[data-part="queries"] .x-beside').last.click()
    assert part(shown, "query-name").inner_text() == said(37)
    part(shown, "map").press("ArrowUp")
    part(shown, "map").press("ArrowUp")
    part(shown, "map").press("Enter")
    press("Home")
    press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.i") == "279"
    assert part(shown, "query-name").inner_text() == said(34)
    press("End")
    press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "280"
    assert page.locator("[data-part=queries] [aria-selected=true]").count() == 1


def test_a_query_lists_its_top_keys_and_goes_to_them(shown, explored):
    page = shown.page
    page.get_by_role("button", name="L0H1", exact=True).click()
    part(shown, "map").click(position=point(shown, 30, 2))
    page.locator('[data-part="queries"] [data-i="243"]').click()
    top = explored.top("L0H1", 243)
    buttons = part(shown, "top").get_by_role("button").all()
    texts = ["↵" if explored.tokens[key] == "\n" else explored.tokens[key] for key, _ in top]
    assert [button.get_attribute("aria-label") for button in buttons] == [
        f"key {key}, {text}: weight {plots.number(weight)}" for (key, weight), text in zip(top, texts, strict=True)
    ]
    assert len(buttons) == 4
    for place, (key, weight) in enumerate(top):
        part(shown, "top").get_by_role("button").nth(place).click()
        assert part(shown, "key-name").inner_text() == said(key // BLOCK)
        target = page.locator('[data-part="keys"] .x-target')
        assert target.get_attribute("data-i") == str(key)
        assert f"weight {plots.number(weight)}" in target.get_attribute("title")
        assert page.locator('[data-part="queries"] .x-on').get_attribute("data-i") == "243"
        outlined = {int(token.get_attribute("data-i")) for token in page.locator('[data-part="keys"] .x-strong').all()}
        assert outlined == {other for other, _ in top if other // BLOCK == key // BLOCK}
        on = sum(w for other, w in top if other // BLOCK == key // BLOCK)
        assert part(shown, "query-readout").inner_text() == (
            f"query 243: {plots.number(on)} on the keys shown, by its top keys"
        )
    first = top[-1][0] // BLOCK * BLOCK
    texts = page.locator('[data-part="keys"] span:not(.x-beside)').evaluate_all(
        "(tokens) => tokens.map((token) => token.textContent)"
    )
    assert texts == [token.replace("\n", "↵\n") for token in explored.tokens[first : first + BLOCK]]


def test_marks_are_outlined_and_can_be_gone_to(shown):
    page = shown.page
    page.get_by_role("button", name="needle", exact=True).click()
    assert part(shown, "key-name").inner_text() == said(5)
    outlined = page.locator('[data-part="keys"] mark span')
    assert [token.get_attribute("data-i") for token in outlined.all()] == [str(i) for i in range(40, 50)]
    around = page.locator('[data-part="keys"] .x-beside')
    assert [token.get_attribute("data-i") for token in around.all()] == [
        str(i) for i in (*range(24, 40), *range(48, 64))
    ]
    inner = page.locator('[data-part="keys"] .x-inner')
    assert [token.get_attribute("data-i") for token in inner.all()] == ["44", "45", "46"]
    assert "needle, answer" in inner.first.get_attribute("title")
    # keys after the queries cannot be looked at
    part(shown, "map").click(position=point(shown, 10, 2))
    assert page.get_by_role("button", name="question", exact=True).is_disabled()
    part(shown, "key-on").click()
    assert part(shown, "key-name").inner_text() == said(3)
    part(shown, "query-back").click()
    assert part(shown, "query-name").inner_text() == said(9)


def test_what_was_not_kept_is_said(shown):
    shown.page.locator('[data-at="L0H3"]').click()
    assert "The top keys of L0H3 were not kept: choose one of the outlined heads." in part(shown, "top").inner_text()
    assert part(shown, "top-csv").is_disabled()
    assert part(shown, "map-csv").is_enabled()
    shown.page.locator('[data-at="L1H3"]').click()
    assert part(shown, "map-csv").is_disabled()
    assert part(shown, "map-readout").inner_text().endswith("not kept")


def test_files_hold_the_numbers(shown, explored):
    shown.page.locator('[data-at="L1H2"]').click()
    name, text = saved(shown, "map-csv")
    rows = list(csv.reader(text.splitlines()))
    assert name == "L1H2-blocks.csv"
    assert rows[0] == ["head", "first query", "last query", "first key", "last key", "mean attention"]
    assert len(rows) == 1 + LENGTH * (LENGTH + 1) // 2
    for head, q, _, k, last, mean in rows[1:]:
        i, j = int(q) // BLOCK, int(k) // BLOCK
        assert (head, int(last)) == ("L1H2", min(N, (j + 1) * BLOCK) - 1)
        assert float(mean) == pytest.approx(float(explored.map("L1H2")[i, j]), rel=1e-3)

    name, text = saved(shown, "map-svg")
    assert name == "L1H2-blocks.svg"
    assert text.startswith("<svg ")
    told = dict(re.findall(r"<title>(queries \S+ on keys \S+): (\S+)</title>", text))
    above = (explored.map("L1H2") > 0).nonzero().tolist()
    assert len(told) == len(above)
    for i, j in above:
        mean = float(told[f"queries {said(i)} on keys {said(j)}"])
        assert mean == pytest.approx(float(explored.map("L1H2")[i, j]), rel=1e-3)
    assert "<title>needle</title>" in text

    part(shown, "map").click(position=point(shown, 20, 2))
    name, text = saved(shown, "top-csv")
    assert name == "L1H2-top-keys-160-167.csv"
    rows = list(csv.reader(text.splitlines(keepends=True)))
    assert rows[0] == ["head", "query", "query text", "rank", "key", "key text", "weight"]
    expected = [(q, rank + 1, *top) for q in range(160, 168) for rank, top in enumerate(explored.top("L1H2", q))]
    assert len(rows) == 1 + len(expected)
    for row, (q, rank, key, weight) in zip(rows[1:], expected, strict=True):
        assert row[1:6] == [str(q), explored.tokens[q], str(rank), str(key), explored.tokens[key]]
        assert float(row[6]) == pytest.approx(weight, rel=1e-3)


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
    told = replace(explored, title=HOSTILE, tokens=tokens, marks={HOSTILE: ((40, 50),)}, provenance=origin)
    made = plots.explorer(told)
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


def test_two_panels_stand_on_one_page_and_heads_are_chosen_from_outside(browser, explored, tmp_path):
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
        beside = {"wide": [True, True], "middle": [False, True], "narrow": [False, False]}[name]
        assert [a["x"] + a["width"] <= b["x"] for a, b in pairwise(boxes)] == beside
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
