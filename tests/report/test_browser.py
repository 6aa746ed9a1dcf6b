"""The report as a reader opens it: from disk, without a network, by pointer and keyboard, on a screen or on paper."""

import csv
import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import browser as browsers
import pytest
from run_results import HEADS, LAYERS, SAFE_HOSTILE, attention, run, table, whole

from interp import plots
from interp.hooks.model.heads import Head
from interp.report import make_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_report(whole(), tmp_path_factory.mktemp("plain") / "report.html")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> Path:
    return make_report(whole(SAFE_HOSTILE), tmp_path_factory.mktemp("nasty") / "report.html")


def all_drawn(page) -> None:
    browsers.until(
        page,
        "document.querySelectorAll('.js-plotly-plot').length === document.querySelectorAll('[data-figure]').length",
    )


@pytest.mark.parametrize("which", ["plain", "nasty"])
@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [("1280", browsers.WIDE, "light"), ("1280-dark", browsers.WIDE, "dark"), ("390", browsers.NARROW, "light")],
)
def test_it_opens_offline_without_a_complaint_or_a_request(browser, which, name, size, scheme, request):
    path = request.getfixturevalue(which)
    with browsers.opened(browser, path, size, color_scheme=scheme) as watched:
        all_drawn(watched.page)
        # nothing is cut off at the side
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        watched.shoot(f"report-{which}-{name}", full_page=True)
        watched.clean()


def test_it_is_there_within_two_seconds(browser, plain):
    with browsers.opened(browser, plain) as watched:
        watched.page.wait_for_selector(".js-plotly-plot .main-svg")
        paints = watched.page.evaluate("performance.getEntriesByType('paint').map((paint) => paint.startTime)")
        assert max(paints) < 2000


def test_hostile_text_is_shown_and_nothing_of_it_runs(browser, nasty):
    with browsers.opened(browser, nasty) as watched:
        all_drawn(watched.page)
        shown = " ".join(watched.page.inner_text("body").split())
        wanted = " ".join(plots.visible(SAFE_HOSTILE).split())
        assert shown.count(wanted) > 10
        assert watched.page.inner_text("h1").strip() == wanted
        assert watched.page.locator("img, iframe, object, script[src], [onclick], [onerror]").count() == 0
        assert watched.page.locator("a[href^='javascript']").count() == 0
        # a dialog or an error would be among the complaints
        watched.clean()


def test_pointing_at_a_map_reads_the_score_and_dragging_zooms(browser, plain):
    scores = table("retrieval", 0, 0.1)
    with browsers.opened(browser, plain) as watched:
        page = watched.page
        place = page.locator("[data-figure]").nth(1)
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for()
        where = place.evaluate(
            """(plot) => { const [x, y] = [plot._fullLayout.xaxis, plot._fullLayout.yaxis];
            const box = plot.getBoundingClientRect();
            return [1, 2].map((i) => ({x: box.x + x._offset + x.d2p(i), y: box.y + y._offset + y.d2p(i)})); }"""
        )
        page.mouse.move(where[0]["x"], where[1]["y"])
        page.mouse.move(where[0]["x"] + 1, where[1]["y"] + 1)
        place.locator(".hoverlayer .hovertext").wait_for()
        said = place.locator(".hoverlayer").text_content() or ""
        assert "L1H2" in said
        assert f"{scores['L1H2']:.3f}" in said
        before = place.evaluate("(plot) => plot.layout.xaxis.range.slice()")
        page.mouse.down()
        page.mouse.move(where[1]["x"] + 40, where[1]["y"] + 30, steps=6)
        page.mouse.up()
        page.wait_for_timeout(300)
        after = place.evaluate("(plot) => plot._fullLayout.xaxis.range.slice()")
        assert after[1] - after[0] < before[1] - before[0]
        watched.clean()


def saved(page, button) -> str:
    with page.expect_download() as coming:
        button.click()
    return Path(coming.value.path()).read_text(encoding="utf-8")


def test_figures_and_tables_are_saved_offline_with_their_numbers(browser, plain):
    scores = table("retrieval", 0, 0.1)
    with browsers.opened(browser, plain) as watched:
        page = watched.page
        figures = page.locator("figure")
        rows = list(csv.reader(StringIO(saved(page, figures.nth(1).get_by_role("button", name="CSV")))))
        assert rows[0] == ["head", "score", "low", "high", "above 0 in"]
        assert len(rows) == 1 + LAYERS * HEADS
        for name, value, *_ in rows[1:]:
            assert float(value) == pytest.approx(float(scores.values[Head.parse(name)]), rel=1e-4)
        svg = saved(page, figures.nth(1).get_by_role("button", name="SVG"))
        assert svg.startswith("<svg")
        assert "Retrieval: score of each head" in svg
        # points with intervals
        rows = list(csv.reader(StringIO(saved(page, figures.nth(2).get_by_role("button", name="CSV")))))
        best = scores.top(1)[0]
        assert rows[0][-3:] == ["low", "high", "about"]
        assert float(rows[1][1]) == pytest.approx(scores[best], rel=1e-4)
        assert float(rows[1][3]) == pytest.approx(float(scores.low[best]), rel=1e-3)
        assert str(best) in rows[1][-1]
        # every panel has its buttons
        assert figures.count() == page.locator("figure .tools").count()
        assert page.locator(".scroll > table").count() == page.locator(".scroll + .tools").count()
        watched.clean()


def test_text_that_a_spreadsheet_would_run_is_saved_as_text(browser, tmp_path):
    view = attention()
    view = replace(view, tokens=(*browsers.FORMULAS, *view.tokens[len(browsers.FORMULAS) :]))
    path = make_report(run({"token_attention": view}), tmp_path / "report.html")
    with browsers.opened(browser, path) as watched:
        text = saved(watched.page, watched.page.locator(".view .readout + .tools button"))
        rows = list(csv.reader(StringIO(text)))
        assert rows[0] == ["position", "token", "L1H2", "L0H0"]
        assert [row[1] for row in rows[1 : 1 + len(browsers.FORMULAS)]] == list(browsers.FORMULAS.values())
        assert float(rows[504][2]) == 1.0
        watched.clean()


def test_a_card_leads_to_its_head_in_the_explorer(browser, plain):
    with browsers.opened(browser, plain) as watched:
        page = watched.page
        link = page.locator("a[data-head]").first
        head = link.get_attribute("data-head")
        link.click()
        shown = "(head) => document.querySelector('.explored [data-part=name]').textContent === head"
        browsers.until(page, shown, head)
        watched.clean()


def test_it_is_used_by_keyboard(browser, plain):
    with browsers.opened(browser, plain) as watched:
        page = watched.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
        page.keyboard.press("Enter")
        assert page.url.endswith("#found")
        radio = page.locator(".view input[type=radio]").first
        radio.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.parentElement.textContent").strip() == "L0H0"
        # each button says what it saves
        names = page.locator(".tools button").evaluate_all("(all) => all.map((one) => one.getAttribute('aria-label'))")
        assert all(names)
        watched.clean()


def test_on_paper_every_figure_is_drawn(browser, plain):
    with browsers.opened(browser, plain) as watched:
        page = watched.page
        # before there was time for the figures below
        paper = page.pdf(prefer_css_page_size=True)
        drawn = page.evaluate("document.querySelectorAll('.js-plotly-plot').length")
        assert drawn == page.locator("[data-figure]").count()
        assert len(re.findall(rb"/Type\s*/Page\b", paper)) >= 4
        watched.clean()


def test_without_scripts_all_sentences_and_tables_are_there(browser, plain):
    with browsers.opened(browser, plain, java_script_enabled=False) as watched:
        page = watched.page
        assert "The figures need JavaScript" in page.inner_text("body")
        assert "has the highest score" in page.inner_text("#found")
        assert page.locator("table").count() > 8
        assert page.locator(".tools").count() == 0


def test_embedded_data_read_back(plain):
    page = plain.read_text(encoding="utf-8")
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert figures is not None
    assert len(json.loads(figures[1])) > 8
