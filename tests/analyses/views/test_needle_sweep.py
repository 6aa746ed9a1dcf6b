"""Needle sweeps: verdicts by length and depth, against replies one by one, in files, figures, sections and runs."""

from typing import Any

import pytest
import run_cases
import tiny_chat_model

import interp
from interp.analyses import tasks
from interp.analyses.prompt_sizes import doubling
from interp.analyses.tasks import standard
from interp.analyses.tasks.standard import PromptSizes
from interp.analyses.views.needle_sweep import NeedleSweep, needle_sweep
from interp.errors import PromptError, UsageError
from interp.hooks.generate import generate
from interp.hooks.prompts.prompts import Prompts
from interp.plots.static import picture
from interp.runs.plan import ScorePlan
from interp.runs.run import Run


def made(**more):
    """Two prompts at each of two depths of 256 tokens, one of 1,024."""
    settings = {"max_new_tokens": 8, "haystack": "grammar"}
    return NeedleSweep(
        lengths=(256, 256, 256, 256, 1024), depths=(0.1, 0.1, 0.9, 0.9, 0.9), right=(1.0, 1.0, 0.0, 1.0, 0.0),
        recall=(1.0, 0.9, 0.2, 0.8, 0.0), at_limit=(0.0, 1.0, 1.0, 0.0, 1.0), replies=("a", "b", "c", "d", "e"),
        settings=settings, **more,
    )  # fmt: skip


def test_verdicts_are_those_of_replies_one_by_one():
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    prompts = tasks.needle(tokenizer, lengths=(560, 700), depths=(0.2, 0.8))
    seen = []

    def judge(reply, prompt):
        seen.append(reply)
        return len(seen) % 2 == 1

    found = needle_sweep(model, prompts, judge=judge, max_new_tokens=3, batch_size=3)
    single = [generate(model, prompts[i : i + 1], max_new_tokens=3, stop="\n")[0].text for i in range(4)]
    assert list(found.replies) == seen == single
    assert (found.lengths, found.depths) == ((560, 560, 700, 700), (0.2, 0.8) * 2)
    assert found.right == (1, 0, 1, 0)
    assert found.cell(560) == (1, 0)
    assert found.cell(700, 0.8) == (0,)
    assert found.answers == tuple(prompt.meta["answer"] for prompt in prompts)
    parts = [needle_sweep(model, prompts[i : i + 2], max_new_tokens=3) for i in (0, 2)]
    assert NeedleSweep.concat(parts).replies == found.replies


def test_summary_frame_and_file(tmp_path):
    found = made()
    lines = found.summary().splitlines()
    assert lines == [
        "    256 tokens  75% [30%, 95%]  by depth 0.1: 2 of 2, 0.9: 1 of 2",
        "  1,024 tokens  0% [0%, 79%]  by depth 0.9: 0 of 1",
        "3 of 5 replies ended at the limit of 8 new tokens; 2 of them are wrong.",
    ]
    assert list(found.to_frame().columns) == ["length", "depth", "right", "recall", "at_limit", "reply"]
    assert NeedleSweep.load(found.save(tmp_path / "sweep.json")) == found
    with pytest.raises(UsageError, match="no prompts, or rows of different lengths"):
        NeedleSweep((256,), (0.1,), (), (), (), ())


def test_the_figure_shows_the_share_of_each_length_and_depth():
    drawn: Any = interp.plots.figure(made())
    cells = drawn.data[0].z
    assert cells[0, 0] == 1
    assert cells[1].tolist() == [0.5, 0]
    # no prompt has this length and depth
    assert cells[0, 1] != cells[0, 1]
    assert drawn.data[0].text[1][0] == "256 tokens, depth 0.9<br>1 of 2 right"
    assert list(drawn.layout.xaxis.ticktext) == ["256", "1,024"]
    assert "1 to 2 prompts in a cell" in drawn.layout.title.subtitle.text
    assert len(picture(drawn).axes) == 2


def test_prompts_without_length_depth_or_answer_are_refused():
    model = tiny_chat_model.model()
    with pytest.raises(PromptError, match='prompt 0 has no "depth" in its meta; give prompts of tasks'):
        needle_sweep(model, Prompts.from_ids([[5, 6]], meta=[{"length": 2}]))


def test_lengths_double_up_to_the_context(demo):
    assert [doubling(n) for n in (100, 256, 300, 1024)] == [(100,), (256,), (256, 300), (256, 512, 1024)]
    sizes = PromptSizes(needle_depths=(0.0, 1.0), sweep_lengths=doubling(1500), n_sweep=2)
    prompts = standard.needle_grid(sizes, demo.tokenizer)
    cells = [(prompt.meta["length"], prompt.meta["depth"]) for prompt in prompts]
    assert cells == [(length, depth) for length in (256, 512, 1024, 1500) for depth in (0.0, 1.0)] * 2
    assert max(prompts.lengths) <= 1500
    plan = ScorePlan(analyses=("needle_sweep",), check=False)
    fitted = plan._fitted(demo.model).sizes
    assert fitted.sweep_lengths == (256, 512, 1024, 2048, 4096, 8192 - fitted.reply_tokens)
    short = ScorePlan(analyses=("needle_sweep",), sizes=PromptSizes(sweep_lengths=(300,)), check=False)
    assert short._fitted(demo.model).sizes.sweep_lengths == (300,)
    with pytest.raises(UsageError, match=r"sweep_lengths=\(5, 0\) has a length below 1"):
        PromptSizes(sweep_lengths=(5, 0))


def test_a_run_and_its_report_show_it(tmp_path):
    sizes = PromptSizes(
        needle_depths=(0.1, 0.9), sweep_lengths=(560, 700), n_sweep=2, reply_tokens=2, explorer_tokens=0
    )
    plan = run_cases.score_plan("needle_sweep", sizes=sizes, check=False, heads="")
    run = Run.open(tmp_path / "run", plan, tiny_chat_model.model(), tiny_chat_model.tokenizer())
    found = run.finish(progress=False)
    sweep = found["needle_sweep"]
    assert len(sweep.right) == 8
    assert sweep.settings == {"max_new_tokens": 2, "haystack": "grammar"}
    page = interp.make_report(found, tmp_path / "report.html").read_text()
    assert "Needles by length and depth" in page
    assert "8 of 8 replies ended at the limit of 2 new tokens" in page
