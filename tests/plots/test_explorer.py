"""The explorer in a browser: it shows the numbers of the data, and works without a mouse and a network."""

import csv
import re

import pytest
import torch
from explorer_page import BLOCK, LEFT, LENGTH, TOP, N, block_range, part, point, reading, saved

from interp import plots
from interp.analyses.views.explore import SUMMARIES


def test_it_opens_from_disk_offline_with_the_head_that_found_the_mark(shown, explored):
    page = shown.page
    heading = page.locator("h1").inner_text()
    assert heading == "A needle"
    assert "300 tokens in blocks of 8" in page.locator(".x-head").inner_text()
    assert part(shown, "name").inner_text() == "L1H2"
    assert part(shown, "query-name").inner_text() == block_range(37)
    assert part(shown, "key-name").inner_text() == block_range(5)
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
    found = f"{written} {title}" if unit == "share of attention" else f"{written} {unit}, {title}"
    assert part(shown, "head-readout").inner_text() == f"L1H2: {found}"
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
    assert whole == f"queries {block_range(30)} on keys {block_range(10)}"
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
        == f"queries {block_range(22)} on keys {block_range(5)} (needle, answer)"
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
    assert part(shown, "map-readout").inner_text().startswith(f"queries {block_range(i)} on keys {block_range(j)}")
    assert part(shown, "query-name").inner_text() == block_range(i)
    assert part(shown, "key-name").inner_text() == block_range(j)
    # the query of the block that looks most at these keys is chosen
    on = [sum(w for key, w in explored.top("L1H2", q) if key // BLOCK == j) for q in range(280, 288)]
    best = max(range(280, 288), key=lambda q: (on[q - 280], q))
    press("Enter")
    assert int(page.evaluate("document.activeElement.dataset.i")) == best
    page.locator('[data-part="queries"] .x-beside').last.click()
    assert part(shown, "query-name").inner_text() == block_range(37)
    part(shown, "map").press("ArrowUp")
    part(shown, "map").press("ArrowUp")
    part(shown, "map").press("Enter")
    press("Home")
    press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.i") == "279"
    assert part(shown, "query-name").inner_text() == block_range(34)
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
        assert part(shown, "key-name").inner_text() == block_range(key // BLOCK)
        target = page.locator('[data-part="keys"] .x-target')
        assert target.get_attribute("data-i") == str(key)
        assert f"weight {plots.number(weight)}" in target.get_attribute("title")
        assert page.locator('[data-part="queries"] .x-on').get_attribute("data-i") == "243"
        outlined = {int(token.get_attribute("data-i")) for token in page.locator('[data-part="keys"] .x-strong').all()}
        assert outlined == {other for other, _ in top if other // BLOCK == key // BLOCK}
        on = sum(w for other, w in top if other // BLOCK == key // BLOCK)
        assert part(shown, "query-readout").inner_text() == (
            f"query 243: {plots.number(on)} on the keys shown, counting its top keys only"
        )
    first = top[-1][0] // BLOCK * BLOCK
    texts = page.locator('[data-part="keys"] span:not(.x-beside)').evaluate_all(
        "(tokens) => tokens.map((token) => token.textContent)"
    )
    assert texts == [token.replace("\n", "↵\n") for token in explored.tokens[first : first + BLOCK]]


def test_marks_are_outlined_and_can_be_gone_to(shown):
    page = shown.page
    page.get_by_role("button", name="needle", exact=True).click()
    assert part(shown, "key-name").inner_text() == block_range(5)
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
    assert part(shown, "key-name").inner_text() == block_range(3)
    part(shown, "query-back").click()
    assert part(shown, "query-name").inner_text() == block_range(9)


def test_keys_that_were_not_kept_are_named(shown):
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
    found = dict(re.findall(r"<title>(queries \S+ on keys \S+): (\S+)</title>", text))
    above = (explored.map("L1H2") > 0).nonzero().tolist()
    assert len(found) == len(above)
    for i, j in above:
        mean = float(found[f"queries {block_range(i)} on keys {block_range(j)}"])
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
