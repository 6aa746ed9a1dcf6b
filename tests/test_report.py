"""The page says what the data say, opens offline, and runs nothing that came from outside."""

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from interp import plots
from interp.analyses.causal.ablation_test import CausalCheck, Condition, Outcome
from interp.analyses.kv import KeyCurve
from interp.analyses.kv.curve import KeyPoint
from interp.analyses.results.head_scores import HeadScores
from interp.errors import RunError, ScoreError
from interp.findings import Findings, TokenView
from interp.hooks.model.heads import Head, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.report import embed, make_report, render, views, words
from interp.report import kv as keys

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><a href='javascript:alert(2)'>x</a>"
    "<!-- \" ' onclick=alert(3) {{ 7 * 7 }} %{x} \u2028\u2029\u202e\x00\x1b\ud800"
)
LAYERS, HEADS, PROMPTS = 6, 4, 12
ORIGIN = Provenance(
    "tiny-model", "LlamaForCausalLM", "c" * 16, "w" * 16, versions={"torch": "2.9.0"}, dtype="float32", device="cpu",
    command="interp report tiny-model --seed 3", time="2026-03-02T14:05:00+00:00", note="dequantised from 4 bit",
)  # fmt: skip


def table(name: str, seed: int, threshold: float | None = None) -> HeadScores:
    values = torch.rand(PROMPTS, LAYERS, HEADS, generator=torch.Generator().manual_seed(seed)) * 0.2
    values[:, seed + 1, 2] += 0.6
    return HeadScores(name, values, "share of attention", kv_heads=2, threshold=threshold, provenance=ORIGIN)


def check(top: HeadSet, right: tuple[int, ...] = (8, 1, 8, 6, 7, 7)) -> CausalCheck:
    groups = ("as loaded", "top", "random", "random", "random by layer", "random by layer")
    taken = (HeadSet(), top, *(HeadSet(tuple(Head(i, h) for h in range(2))) for i in (0, 0, 5, 5)))
    rows = [
        Outcome(
            Condition(f"{group} {i}", group, heads),
            tuple(n < count for n in range(8)),
            tuple("it is saffron" if n < count else "no idea" for n in range(8)),
            ("saffron",) * 8,
        )
        for i, (group, heads, count) in enumerate(zip(groups, taken, right, strict=True))
    ]
    return CausalCheck(tuple(rows), "zero", 2)


@pytest.fixture(scope="module")
def findings() -> Findings:
    retrieval = table("retrieval", 0, 0.1)
    values = retrieval.per_prompt.clone()
    values[:3] = torch.nan
    retrieval = replace(retrieval, per_prompt=values, settings={"form": "decode"})
    received = torch.rand(PROMPTS, LAYERS, HEADS, 32, generator=torch.Generator().manual_seed(9))
    sink = (received[..., 0] > 0.3).float()
    sinks = HeadScores(
        "sinks", received[..., 0], "share of attention", 2, 0.3, {"column_threshold": 0.1}, ORIGIN,
        {"positions": received, "sink": sink}, labels=("T=64",) * PROMPTS,
    )  # fmt: skip
    tokens = ("<|im_start|>", "user", "\n", *(f" word{i}" for i in range(500)), " saff", "ron", "?")
    weights = {"L1H2": tuple(float(i == 503) for i in range(len(tokens))), "L0H0": (1 / len(tokens),) * len(tokens)}
    view = TokenView("First answer token", tokens, weights, {"answer": ((503, 505),)}, "saffron")
    scores = {"retrieval": retrieval, "induction": table("induction", 1), "sinks": sinks}
    top = retrieval.heads(top=2)
    return Findings(ORIGIN, LAYERS, HEADS, 2, scores, check(top), (view,), {"retrieval": {"length": 512}}, 192.0)


@pytest.fixture(scope="module")
def hostile(findings: Findings) -> Findings:
    text = HOSTILE.replace("\ud800", "")
    origin = replace(ORIGIN, model=HOSTILE, architecture=HOSTILE, command=HOSTILE, note=HOSTILE)
    origin = replace(origin, versions={HOSTILE: HOSTILE})
    scores = {
        f"{name}{HOSTILE}": replace(
            one,
            name=HOSTILE,
            unit=HOSTILE,
            labels=(HOSTILE,) * PROMPTS,
            settings={text: {text: text}},
            provenance=origin,
        )
        for name, one in findings.scores.items()
    }
    assert findings.causal
    rows = tuple(
        Outcome(replace(row.condition, name=HOSTILE), row.verdicts, (HOSTILE,) * 8, (HOSTILE,) * 8)
        for row in findings.causal.outcomes
    )
    view = findings.views[0]
    view = TokenView(
        HOSTILE, (HOSTILE, *view.tokens[1:503], HOSTILE, *view.tokens[504:]),
        {f"{head}{HOSTILE}": row for head, row in view.weights.items()}, {HOSTILE: ((503, 505),)}, HOSTILE,
    )  # fmt: skip
    causal = replace(findings.causal, outcomes=rows)
    settings = {HOSTILE: HOSTILE}
    return replace(findings, provenance=origin, scores=scores, causal=causal, views=(view,), settings=settings)


class Page(HTMLParser):
    """Elements, their attributes, and the text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag in {"dt", "dd", "td", "th", "p", "svg"}:
            self.text += " "

    def handle_data(self, data):
        if self.elements and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def page(findings: Findings) -> Page:
    return Page(render(findings))


@pytest.fixture(scope="module")
def hostile_page(hostile: Findings) -> Page:
    return Page(render(hostile))


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_four_scripts_of_our_own_and_nothing_from_elsewhere(which, request):
    page: Page = request.getfixturevalue(which)
    assert [attrs.get("type") for attrs in page.of("script")] == ["application/json", "application/json", None, None]
    for tag, attrs in page.elements:
        assert tag not in {"iframe", "object", "embed", "link", "base", "form", "img"}
        assert not [name for name in attrs if name.startswith("on") or name in {"src", "srcdoc", "action"}]
        assert re.fullmatch("#(found|compared|causal|heads|text|origin|a[123])", attrs.get("href", "#found") or "")
        assert not re.search(r"url\(|expression|[<>&]", attrs.get("style") or "")


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_the_policy_allows_these_two_scripts_and_no_network(which, request):
    page: Page = request.getfixturevalue(which)
    (policy,) = [a["content"] or "" for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[2:]]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["script-src"].split() == [f"'sha256-{found}'" for found in hashes]
    assert "http" not in policy


def test_hostile_text_is_shown_as_text(hostile_page: Page):
    shown = plots.visible(HOSTILE)
    squeezed = " ".join(shown.split())
    # heading, note, command and replies among others
    assert hostile_page.words.count(squeezed) > 20
    assert "{{ 7 * 7 }}" in hostile_page.words
    assert not re.search("[\x00\x1b\u2028\u2029\u202e]", hostile_page.text)


def test_hostile_text_in_embedded_json_stays_in_its_script(hostile_page: Page):
    for script in hostile_page.scripts[:2]:
        assert not set(script) & set("<>&\u2028\u2029")
    figures = json.loads(hostile_page.scripts[0])
    for figure in figures:
        # the numbers that a reader saves, as CSV and not as HTML
        figure["layout"].pop("meta", None)
    assert "&lt;script&gt;" in json.dumps(figures)
    assert "<script" not in json.dumps(figures)


def test_embedded_json_reads_back():
    value = {"text": HOSTILE.replace("\ud800", "")}
    assert json.loads(embed(json.dumps(value, ensure_ascii=False))) == value


def test_the_summary_says_the_numbers_of_the_data(findings: Findings, page: Page):
    for scores in findings.scores.values():
        best = scores.top(1)[0]
        low, high = (plots.number(float(end[best])) for end in (scores.low, scores.high))
        value = plots.number(scores[best])
        assert f"Best head {best} Score, 95% interval {value} [{low} to {high}]" in page.words
        assert f"{best} has the highest score, {value} share of attention" in page.words
        if scores.threshold is not None:
            assert f"{len(scores.heads())} of {LAYERS * HEADS} heads" in page.words
    assert "9 of 12 prompts counted" in page.words
    # planted far above the rest
    assert f"lies above that of the next head, {findings.scores['induction'].top(2)[1]}" in page.words


def test_the_header_says_what_was_measured(page: Page):
    assert [attrs.get("id") for attrs in page.of("section")] == [
        "found", "a1", "a2", "a3", "compared", "causal", "heads", "text", "origin",
    ]  # fmt: skip
    for said in ("tiny-model", "LlamaForCausalLM", "6 layers × 4 heads, 2 key-value heads", "dequantised from 4 bit",
                 "2 March 2026, 14:05 UTC", "3 min 12 s", "interp report tiny-model --seed 3", "w" * 16):  # fmt: skip
        assert said in page.words


def test_sections_carry_what_the_docstrings_say(page: Page):
    assert "the very answer token that the model writes." in page.words
    assert "That the head is needed" in page.words
    assert "That the head is idle; it may rest on the first token and still write." in page.words


def test_about_finds_variants_and_passes_over_the_unknown():
    assert words.about("retrieval_forced") == words.about("retrieval")
    assert [heading for heading, _ in words.about("sinks")] == ["Measures", "Cannot show", "Source"]
    assert words.about("no such analysis") == []


def test_the_causal_check_in_words(findings: Findings):
    said = " ".join(words.causal_words(findings))
    assert "As loaded, the model answered 8 of 8 prompts." in said
    assert "With the top 2 retrieval heads zeroed it answered 1 of 8." in said
    assert "drawn freely, 7 of 8 on average over 2 draws; matched by layer, 7 of 8 on average over 2 draws" in said
    assert "lies below those with random heads out" in said


def test_a_check_that_shows_nothing_says_so(findings: Findings):
    top = findings.scores["induction"].heads(top=2)
    equal = replace(findings, causal=check(top, (8, 6, 6, 6, 6, 7)))
    assert "does not tell them apart" in words.causal_words(equal)[-1]
    assert "top 2 induction heads" in " ".join(words.causal_words(equal))
    nothing = replace(findings, causal=check(top, (0, 0, 0, 0, 0, 0)))
    assert "says nothing" in words.causal_words(nothing)[-1]


def test_replies_show_first_what_was_lost_and_join_equal_replies(findings: Findings, page: Page):
    assert findings.causal
    first = words.replies(findings.causal)[0]
    assert (first["number"], first["expected"]) == (1, "saffron")
    assert [(right, text) for _, right, text in first["rows"]] == [(True, "it is saffron"), (False, "no idea")]
    assert first["rows"][1][0] == "top 1"
    assert "no idea" in page.words
    assert words.cut("x" * 100) == "x" * 80 + "…"


def test_all_figures_are_on_the_page_and_readable(findings: Findings, page: Page):
    figures = json.loads(page.scripts[0])
    places = [attrs for attrs in page.of("div") if "data-figure" in attrs]
    # atlas, depth, map and top for each of three, positions, scatter, causal
    assert len(figures) == len(places) == 11
    assert sorted(int(place["data-figure"] or -1) for place in places) == list(range(11))
    assert all((place["aria-label"] or "").strip(". ") for place in places)
    assert "L3H1" in json.dumps(figures[0])
    assert "Retrieval against induction" in page.words


def test_the_tokens_of_a_view_are_all_there_with_the_answer_outlined(findings: Findings, page: Page):
    tokens = [attrs for attrs in page.of("span") if "data-i" in attrs]
    view = findings.views[0]
    assert [int(token["data-i"] or -1) for token in tokens] == list(range(len(view.tokens)))
    assert tokens[503]["style"] == "--w:1.0"
    assert [attrs["data-name"] for attrs in page.of("mark")] == ["answer"]
    assert len([attrs for attrs in page.of("input") if attrs.get("type") == "radio"]) == 2
    stored = json.loads(page.scripts[1])
    assert stored[0][0] == list(view.weights["L1H2"])


def test_a_long_view_keeps_the_mark_and_the_strongest_and_counts_the_rest():
    n = 20_000
    row = [0.0] * n
    row[12_345] = 1.0
    shown = views.show(TokenView("t", ("a",) * n, {"L0H0": tuple(row)}, {"answer": ((5_000, 9_000),)}))
    kept = [i for run in shown.runs for i, _, _ in run.tokens]
    assert len(kept) + sum(run.gap for run in shown.runs) == n
    assert {0, 4_999, 5_000, 8_999, 12_345, n - 1} <= set(kept)
    assert len(kept) < views.MOST
    assert len(shown.weights[0]) == len(kept)
    assert shown.table[0]["most"][0] == (12_345, "a", 1.0)


def test_weights_that_do_not_fit_the_tokens_are_refused():
    with pytest.raises(RunError, match="has 2 tokens but 1 weights for L0H0"):
        views.show(TokenView("t", ("a", "b"), {"L0H0": (1.0,)}))


def test_the_file_is_one_page_below_eight_megabytes(hostile: Findings, tmp_path: Path):
    path = make_report(hostile, tmp_path / "report.html")
    assert path.stat().st_size < 8_000_000
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def dropped(prompts: int = 12, whole: float = 0.75) -> KeyCurve:
    """Selectors of known numbers: HeadKV-R above random keys at 40%, StreamingLLM below them, all equal at 10%."""
    right = {("random", 0.4): 0.25, ("StreamingLLM", 0.4): 0.0, ("HeadKV-R", 0.4): 0.75, ("whole", 1.0): whole}
    right |= {(name, 0.1): 0.125 for name, _ in right if name != "whole"}
    points = [
        KeyPoint(name, share, task, share, (2.0,) * prompts, (value + shift,) * prompts)
        for task, shift in (("needle", 0.0), ("new facts", 0.125 if whole else 0.0))
        for (name, share), value in right.items()
    ]
    return KeyCurve(tuple(points))


def test_key_selectors_stand_beside_random_keys_with_their_numbers(findings: Findings):
    page = Page(render(replace(findings, keys=dropped())))
    assert "keys" in [attrs.get("id") for attrs in page.of("section")]
    assert [attrs["href"] for attrs in page.of("a")].count("#keys") == 2
    for said in (
        "With every key the model gets 81% of the answers' tokens right (needle 75%, new facts 88%).",
        "at 10% none is told apart; at 40% HeadKV-R, +50 points [+50, +50].",
        "Below random keys: StreamingLLM at 40%.",
        "Of 4 such 95% intervals about 1 leaves 0 out by chance.",
        "HeadKV-R rests on scores found on needles of another seed",
        "Cannot show Quality of long replies",
        "Selector By scores 10% kept 40% kept random keys – 19% 31% StreamingLLM – 19% 0 [0, 0] 6% -25 [-25, -25] "
        "HeadKV-R Retrieval 19% 0 [0, 0] 81% +50 [+50, +50]",
    ):
        assert said in page.words, said
    apart = [attrs.get("class") for attrs in page.of("span") if "gain" in (attrs.get("class") or "")]
    assert apart == ["gain", "gain apart"] * 2
    # a figure of all tasks, and one for each
    figures = json.loads(page.scripts[0])
    assert len(figures) == 11 + 3
    assert sum("Mean over 2 tasks" in (attrs.get("aria-label") or "") for attrs in page.of("div")) == 1


def test_a_report_without_key_selectors_has_no_section_of_them(page: Page):
    assert "keys" not in [attrs.get("id") for attrs in page.of("section")]
    assert "#keys" not in [attrs["href"] for attrs in page.of("a")]
    assert "Key selectors" not in page.text


def test_selectors_that_nothing_can_be_said_of(findings: Findings):
    assert keys.said(dropped(whole=0.0))[1:] == ["Nothing could be lost, so this says nothing of the selectors."]
    assert keys.said(dropped(prompts=3))[-1] == "The prompts are few: 3 a task at least."
    without = tuple(point for point in dropped().points if point.selector != "HeadKV-R")
    assert keys.favoured(KeyCurve(without)) == ""
    hostile = tuple(replace(p, selector=HOSTILE if p.selector == "HeadKV-R" else p.selector) for p in dropped().points)
    page = Page(render(replace(findings, keys=KeyCurve(hostile))))
    assert len(page.scripts) == 4
    assert " ".join(plots.visible(HOSTILE).split()) in page.words


def test_one_analysis_alone_makes_a_report(findings: Findings):
    few = replace(findings, scores={"custom": table("custom", 2)}, causal=None, views=(), settings={}, seconds=0.0)
    page = Page(render(few))
    assert [attrs.get("id") for attrs in page.of("section")] == ["found", "a1", "heads", "origin"]


def test_scores_of_which_no_prompt_counts_are_reported_as_such(findings: Findings):
    nothing = HeadScores("retrieval", torch.full((3, LAYERS, HEADS), torch.nan), threshold=0.1)
    scores = {"retrieval": nothing, "induction": table("induction", 1)}
    page = Page(render(replace(findings, scores=scores, causal=None)))
    assert "No prompt counted, so no head has a score." in page.words
    assert "0 of 3 prompts counted" in page.words


def test_nothing_to_report_is_refused(findings: Findings, tmp_path: Path):
    with pytest.raises(RunError, match="hold no scores"):
        make_report(replace(findings, scores={}), tmp_path / "report.html")
    with pytest.raises(RunError, match="of 6 layers x 4 heads, the findings of 7 x 4"):
        make_report(replace(findings, layers=7), tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_scores_of_another_model_are_refused(findings: Findings, tmp_path: Path):
    other = replace(table("induction", 1), provenance=replace(ORIGIN, weights_hash="0" * 16))
    with pytest.raises(ScoreError, match=r"w{16}.*0{16}"):
        make_report(replace(findings, scores={"induction": other}), tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_and_left_as_it_was(findings: Findings, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match="cannot be written"):
        make_report(findings, tmp_path / "file" / "report.html")
    with pytest.raises(RunError, match="is a folder"):
        make_report(findings, tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        make_report(findings, tmp_path / "missing" / "report.html")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_write_that_breaks_off_leaves_the_old_report(findings: Findings, tmp_path: Path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        make_report(findings, path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, ""), (0.4, "0.4 s"), (42.4, "42 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert words.duration(seconds) == text
