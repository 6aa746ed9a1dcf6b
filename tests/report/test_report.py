"""The page shows the numbers of the results, opens offline, and runs nothing that came from outside."""

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from html_page import Page
from run_results import (
    HEADS,
    HOSTILE,
    LAYERS,
    LAYOUT,
    N_PROMPTS,
    ORIGIN,
    SAFE_HOSTILE,
    ablation,
    curve,
    ov,
    run,
    sinks,
    table,
    tables,
    whole,
)

from interp import plots, report
from interp.analyses.results.codec import result
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.trials import Trials
from interp.errors import RunError, ScoreError
from interp.plots.style import embed
from interp.report import make_report, render
from interp.runs.results import RunResults


@pytest.fixture(scope="module")
def results() -> RunResults:
    return run()


@pytest.fixture(scope="module")
def page(results) -> Page:
    return Page(render(results))


@pytest.fixture(scope="module")
def hostile_page() -> Page:
    origin = replace(ORIGIN, model=HOSTILE, architecture=HOSTILE, command=HOSTILE, note=HOSTILE)
    found = whole(SAFE_HOSTILE)
    named: dict[str, Any] = {
        f"{name}{SAFE_HOSTILE}" if isinstance(each, HeadScores | Trials) else name: each
        for name, each in found.results.items()
    }
    named = {name: replace(each, provenance=None) for name, each in named.items()}
    return Page(render(replace(found, provenance=replace(origin, versions={HOSTILE: HOSTILE}), results=named)))


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_two_own_scripts_run_and_nothing_comes_from_elsewhere(which, request):
    page: Page = request.getfixturevalue(which)
    kinds = [attrs.get("type") for attrs in page.of("script")]
    assert kinds.count(None) == 2
    assert set(kinds) == {None, "application/json"}
    for tag, attrs in page.elements:
        assert tag not in {"iframe", "object", "embed", "link", "base", "form", "img"}
        assert not [name for name in attrs if name.startswith("on") or name in {"src", "srcdoc", "action"}]
        assert re.fullmatch(r"#(found|compared|heads|origin|r\d+)", attrs.get("href", "#found") or "")
        assert not re.search(r"url\(|expression|[<>&]", attrs.get("style") or "")


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_the_policy_allows_these_two_scripts_and_no_network(which, request):
    page: Page = request.getfixturevalue(which)
    (policy,) = [a["content"] or "" for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    kinds = [attrs.get("type") for attrs in page.of("script")]
    own = [text for text, kind in zip(page.scripts, kinds, strict=True) if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["script-src"].split() == [f"'sha256-{found}'" for found in hashes]
    assert "http" not in policy


def test_hostile_text_is_shown_as_text(hostile_page: Page):
    squeezed = " ".join(plots.visible(SAFE_HOSTILE).split())
    # heading, note, command and replies among others
    assert hostile_page.words.count(squeezed) > 20
    assert "{{ 7 * 7 }}" in hostile_page.words
    assert not re.search("[\x00\x1b\u2028\u2029\u202e]", hostile_page.text)


def test_hostile_text_in_embedded_json_stays_in_its_script(hostile_page: Page):
    kinds = [attrs.get("type") for attrs in hostile_page.of("script")]
    for text, kind in zip(hostile_page.scripts, kinds, strict=True):
        assert kind is None or not set(text) & set("<>&\u2028\u2029")


def figures_of(page: Page) -> list[dict]:
    place = next(i for i, attrs in enumerate(page.of("script")) if attrs.get("id") == "figures")
    return json.loads(page.scripts[place])


def test_embedded_json_reads_back():
    value = {"text": SAFE_HOSTILE}
    assert json.loads(embed(json.dumps(value, ensure_ascii=False))) == value


def test_the_overview_shows_the_numbers_of_the_tables(results, page: Page):
    for scores in results.scores.values():
        best = scores.top(1)[0]
        low, high = (plots.number(float(end[best])) for end in (scores.low, scores.high))
        value = plots.number(scores[best])
        assert f"Best head {best} Score, 95 % interval {value} [{low} to {high}]" in page.words
        assert f"{best} has the highest score, {value} (unit: share of attention)" in page.words
        assert f"{len(scores.heads())} of {LAYERS * HEADS} heads" in page.words
    assert "9 of 12 prompts used" in page.words
    # planted far above the other heads
    assert f"is above that of the next head, {results.scores['induction'].top(2)[1]}" in page.words


def test_roles_are_confident_or_tentative(page: Page):
    assert "Confident: a test that assumes of the scores only that they are not negative (Gaffke's test" in page.words
    assert "of the heads called confident have a true mean at or below the threshold." in page.words
    assert "Tentative: the mean is above the threshold, but not confidently." in page.words
    assert "Role Threshold Confident Tentative Heads, strongest first" in page.words


def test_leading_heads_are_shown_with_their_stability(results, page: Page):
    assert "Head Score 95 % interval Held out In top 10 of resamples Prompts with score above 0" in page.words
    for scores in results.scores.values():
        assert f"have a rank correlation of {scores.split_half:.2f} on average, over all heads." in page.words
        cut = 0.3 if scores.threshold is None else scores.threshold
        above = f"{len(scores.heads(above=cut))} of {len(scores)}, {len(scores.confident(cut))} confident"
        assert above in page.words
        for found in scores.leading(10)[:1]:
            assert (
                f"{found.head} {found.value:.3f} {found.low:.3f} to {found.high:.3f} {found.held_out:.3f}" in page.words
            )


def test_overlaps_are_shown_with_both_chances_and_the_depth_profile(results, page: Page):
    one, other, _ = results.scores.values()
    agreed = one.compare(other)
    numbers = [plots.number(getattr(agreed, f"expected_{over}")) for over in ("overlap", "within_layers")]
    depth = plots.number(agreed.depth_overlap)
    assert f"{agreed.overlap} {numbers[0]}; {numbers[1]}, {plots.p_text(agreed.p_overlap)}; {depth}" in page.words
    assert "(3) if the heads of the column’s analysis were ranked only by the mean score of their layer" in page.words


def test_heads_at_the_floor_are_in_no_list():
    values = torch.zeros(N_PROMPTS, LAYERS, HEADS)
    values[:, 2, 1] = 0.8
    values[:, 3, 0] = 0.6
    page = Page(render(run({"retrieval": HeadScores("retrieval", values, threshold=0.1), "sinks": sinks()})))
    assert f"{LAYERS * HEADS - 2} heads score 0 and are not ranked." in page.words
    silent = HeadScores("retrieval", torch.zeros(N_PROMPTS, LAYERS, HEADS), threshold=0.1)
    page = Page(render(run({"retrieval": silent, "sinks": sinks()})))
    assert f"No head leads: {LAYERS * HEADS} heads score 0 and are not ranked." in page.words
    assert "0 0.00; 0.00, no p; 0.00" in page.words


def test_the_header_and_the_contents(page: Page):
    assert [attrs.get("id") for attrs in page.of("section")] == [
        "found", "r1", "r2", "r3", "compared", "heads", "r4", "origin",
    ]  # fmt: skip
    for text in ("tiny-model", "LlamaForCausalLM", "6 layers × 4 heads, 2 key-value heads", "dequantised from 4 bit",
                 "2 March 2026, 14:05 UTC", "3 min 12 s", "interp report tiny-model --seed 3", "w" * 16):  # fmt: skip
        assert text in page.words


def test_a_control_is_shown_with_its_analysis(page: Page):
    no_verdict = "2 random head sets allow no verdict; at least 39 are needed."
    assert f"Ablation test {no_verdict} Accuracy with 2 heads ablated: top 12%" in page.words
    assert "baseline accuracy 8 of 8 100% 63% to 100% – none" in page.words
    assert "random (2 sets) accuracy 14 of 16 88%" in page.words


def test_sections_show_method_limits_and_source(monkeypatch):
    assert report.about("no such analysis") == []
    headings = [heading for heading, _ in report.about("token_attention")]
    assert headings == ["Method", "Limits", "Source"]
    assert report.about("inner/token_attention") == report.about("token_attention")
    page = Page(render(run({"token_attention": tables()["token_attention"]})))
    assert "Does not show that the model needs the attended tokens." in page.words


def test_every_figure_is_on_the_page_once(page: Page):
    figures = figures_of(page)
    places = [attrs for attrs in page.of("div") if "data-figure" in attrs]
    # atlas, depth, scatter, the control, positions, and map, top heads and threshold curve of three tables
    assert len(figures) == len(places) == 14
    assert sorted(int(place["data-figure"] or -1) for place in places) == list(range(14))
    assert all((place["aria-label"] or "").strip(". ") for place in places)
    assert "L3H1" in json.dumps(figures[0])
    assert "Retrieval against induction" in page.words


def test_cards_show_scores_prompts_and_written_tokens():
    results = run({"retrieval": table("retrieval", 0, 0.1), "ov_tokens": replace(ov(), heads=("L1H2", "L2H0"))})
    page = Page(render(replace(results, texts={"retrieval": tuple(f"text {n}" for n in range(N_PROMPTS))})))
    best = int(results.scores["retrieval"].per_prompt[:, 1, 2].argmax())
    assert "L1H2" in [attrs.get("id") for attrs in page.of("article")]
    assert f"text {best}" in page.words
    assert "The highest-scoring heads, up to 3 of each analysis and 12 in all." in page.words
    assert "Prompts with the highest scores in Retrieval:" in page.words
    assert f"rank 1 of {LAYERS * HEADS}" in page.words
    span, query = (
        "the span “needle” “saffron saffron saffron”",
        "the last token (“saffron”, position 3)",
    )
    attended = f"In the prompt of the explorer (below): the tokens of {span} that {query} attends to most."
    raised = "After each arrow: the tokens whose logits the head would raise most if it attended to that token only."
    assert f"{attended} {raised}" in page.words
    assert f"The query is {query}. For each head, the table lists the tokens of {span} that it attends to" in page.words
    assert "for which the token itself is among the 5 tokens whose logits the head would raise most" in page.words
    assert "Only 3 of the" not in page.words
    assert "retrieval" in page.words


def test_reasons_for_missing_results_are_listed():
    page = Page(render(replace(run(), missing={"ov_tokens": "this model has no bridge."})))
    assert "Not made: Tokens that heads would write. Reason: this model has no bridge." in page.words


@result
@dataclass(frozen=True, eq=False)
class Verdicts(Result):
    """A result of another package."""

    count: int
    parts: Trials | None = None

    def summary(self, top: int = 10) -> str:
        return f"{self.count} verdicts\nand a second line"


def test_a_result_of_another_package_gets_a_section_with_its_control_and_parts():
    page = Page(render(run({"my_verdicts": Verdicts(7, curve()), "my_verdicts.control": ablation()})))
    assert [attrs.get("id") for attrs in page.of("section")] == ["found", "r1", "origin"]
    assert "My verdicts" in page.words
    assert "7 verdicts" in page.words
    assert "Baseline loss: 2.46 nats per token." in page.words
    assert "Baseline accuracy: 100%." in page.words


def test_a_result_of_another_package_can_have_a_section_and_a_figure():
    class Own(Verdicts):
        pass

    @plots.figure.register(Own)
    def _(shown):
        return plots.trials(ablation())

    page = Page(render(run({"own": Own(3)})))
    assert len(figures_of(page)) == 1
    report.section.register(Own, lambda shown, name, page: report.Section("Mine", "made here"))
    assert "Mine" in Page(render(run({"own": Own(3)}))).words


def test_one_analysis_alone_makes_a_report():
    few = replace(run({"custom": table("custom", 2)}), settings={}, seconds=0.0)
    assert [attrs.get("id") for attrs in Page(render(few)).of("section")] == ["found", "r1", "heads", "origin"]


def test_scores_without_a_counted_prompt():
    nothing = HeadScores("retrieval", torch.full((3, LAYERS, HEADS), torch.nan), threshold=0.1)
    page = Page(render(run({"retrieval": nothing, "induction": table("induction", 1)})))
    assert "No prompt could be used, so no head has a score." in page.words
    assert "0 of 3 prompts used" in page.words


def test_the_file_is_one_page_below_eight_megabytes(tmp_path: Path):
    path = make_report(whole(SAFE_HOSTILE), tmp_path / "report.html")
    assert path.stat().st_size < 8_000_000
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")


def test_runs_without_results_or_of_two_models_are_refused(tmp_path: Path):
    with pytest.raises(RunError, match="the run has no results"):
        make_report(run({}), tmp_path / "report.html")
    with pytest.raises(RunError, match="have 6 layers x 4 heads, the model 7 x 4"):
        make_report(replace(run(), layout=replace(LAYOUT, layers=7)), tmp_path / "report.html")
    other = replace(table("induction", 1), provenance=replace(ORIGIN, weights_hash="0" * 16))
    with pytest.raises(ScoreError, match=r"w{16}.*0{16}"):
        make_report(run({"induction": other}), tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_and_left_unchanged(results, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match="cannot be written"):
        make_report(results, tmp_path / "file" / "report.html")
    with pytest.raises(RunError, match="is a folder"):
        make_report(results, tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        make_report(results, tmp_path / "missing" / "report.html")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_write_that_breaks_off_leaves_the_old_report(results, tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        make_report(results, path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
