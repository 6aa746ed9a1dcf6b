"""A safety run end to end on a model that refuses by one planted head, resumed, reported; and on one that does not."""

import csv
import json

import pytest
from tiny_chat_model import model as speaking
from tiny_chat_model import tokenizer as speaking_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import interp
from interp import safety
from interp.analyses.causal import curve
from interp.errors import PromptError, RunError, UsageError
from interp.hooks.model.heads import Head
from interp.safety import SafetyPlan, SafetyRun, safety_findings
from interp.testing import planted

NO = "I'm sorry, but I can't help with that."


def tokenizer():
    """Whole words of the planted models; NO reads as a refusal, HARM as the word harm."""
    vocab = {"<pad>": planted.PAD, "<s>": planted.BOS, "</s>": planted.EOS, "harm": planted.HARM, NO: planted.NO}
    vocab |= {f"w{i}": i for i in range(planted.FIRST_WORD, planted.VOCAB) if i not in (planted.HARM, planted.NO)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w3", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def requests(tmp_path):
    """A CSV file of requests that the planted model refuses."""
    path = tmp_path / "requests.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["goal", "target"])
        for row in planted.requests(0, batch=24):
            words = ["harm" if token == planted.HARM else f"w{token}" for token in row[1:]]
            writer.writerow([" ".join(words), "unused"])
    return path


def plan(requests, **settings):
    small = {"harmless": 12, "scored": 8, "tested": 8, "group": 2, "sizes": (1, 2), "neutral": 2, "easy": 3, "draws": 2}
    return SafetyPlan(requests=str(requests), reply=3, **small | settings)


def test_the_planted_head_is_found_and_taking_it_out_ends_refusals(tmp_path, requests, monkeypatch):
    made = planted.refusing(0, "llama")
    place, folder = Head(*made.head), tmp_path / "run"
    found = SafetyRun.open(folder, plan(requests), made.model, tokenizer()).finish(progress=False)
    (told,) = found.safety
    assert sum(told.asked["harmful"]["refused"]) == 24
    assert not any(told.asked["harmless"]["refused"])
    assert set(found.scores) == {"gradient_importance", "ships_uniform", "sahara_uniform", "ships_zero", "sahara_zero"}
    for name, scores in found.scores.items():
        assert scores.top(1) == [place], name
    for kind, points in told.curves.items():
        assert points.at("as loaded", 0, "refused")[0] == 1
        for ranking in ("ships", "sahara", "gradient"):
            assert points.at(ranking, 1, "refused")[0] == 0
        assert points.at("random", 2, "refused")[0] == 1
        assert points.at("random by layer", 1, "refused")[0] == 1
        assert points.measures == ("refused", "harmless refused", "easy right", "neutral loss")
        assert {group["name"] for group in told.groups[kind]} == {"sahara", "random", "random by layer"}
    # replies are kept by their beginnings
    assert max(map(len, told.asked["harmful"]["begins"])) <= 40
    assert "text" not in told.asked["harmful"]
    again = safety_findings(folder)
    assert again.safety[0].curves["zero"].to_dict() == told.curves["zero"].to_dict()
    monkeypatch.setattr(safety, "ships", None)
    SafetyRun.open(folder, plan(requests), made.model, tokenizer()).finish(progress=False)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path, requests, monkeypatch):
    made = planted.refusing(0, "llama")
    whole = SafetyRun.open(tmp_path / "whole", plan(requests, kinds=("zero",)), made.model, tokenizer())
    wanted = whole.finish(progress=False).safety[0].curves["zero"].to_dict()
    folder, stop = tmp_path / "cut", [0]
    ablate = curve.ablate

    def stopping(*rest, **settings):
        stop[0] -= 1
        if stop[0] < 0:
            raise KeyboardInterrupt
        return ablate(*rest, **settings)

    monkeypatch.setattr(curve, "ablate", stopping)
    sittings = 0
    while not (folder / "curve-zero.json").exists():
        stop[0] = 4
        sittings += 1
        try:
            SafetyRun.open(folder, plan(requests, kinds=("zero",)), made.model, tokenizer()).finish(progress=False)
        except KeyboardInterrupt:
            assert sittings < 9
    assert sittings > 2
    assert safety_findings(folder).safety[0].curves["zero"].to_dict() == wanted


@pytest.mark.parametrize(("asked", "scored", "tested"), [(24, 8, 8), (12, 6, 6), (9, 4, 5)])
def test_heads_are_never_tried_on_the_requests_they_were_found_on(tmp_path, requests, asked, scored, tested):
    made = planted.refusing(0, "llama")
    settings = {"harmful": asked, "kinds": ("zero",), "sizes": (1,), "group": 1}
    SafetyRun.open(tmp_path / "run", plan(requests, **settings), made.model, tokenizer()).finish(progress=False)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert (len(split["scored"]), len(split["tested"])) == (scored, tested)
    assert not set(split["scored"]) & set(split["tested"])


def test_whole_replies_only_when_asked(tmp_path, requests):
    made = planted.refusing(0, "gpt2")
    settings = {"kinds": ("zero",), "keep_text": True, "sizes": (1,), "group": 1}
    found = SafetyRun.open(tmp_path / "run", plan(requests, **settings), made.model, tokenizer()).finish(progress=False)
    assert found.safety[0].asked["harmful"]["text"][0].startswith(NO)
    assert "begins" not in found.safety[0].asked["harmful"]


def test_a_model_that_does_not_refuse_has_nothing_to_attribute(tmp_path):
    run = SafetyRun.open(
        tmp_path / "run", SafetyPlan(harmful=12, harmless=8, reply=2), speaking(), speaking_tokenizer()
    )
    with pytest.raises(UsageError, match="no behaviour to attribute"):
        run.finish(progress=False)
    assert not list((tmp_path / "run").glob("ships*"))
    with pytest.raises(RunError, match="not finished"):
        safety_findings(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kinds": ()}, "take uniform, zero"),
        ({"kinds": ("mean",)}, "kinds mean"),
        ({"draws": 0}, "draws=0"),
        ({"scored": 1}, "scored=1"),
        ({"sizes": ()}, "sizes"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(UsageError, match=text):
        SafetyPlan(**settings)


def test_a_folder_of_another_run_is_refused(tmp_path, requests):
    made = planted.refusing(0, "llama")
    SafetyRun.open(tmp_path / "run", plan(requests), made.model, tokenizer())
    with pytest.raises(RunError, match="another plan"):
        SafetyRun.open(tmp_path / "run", plan(requests, draws=5), made.model, tokenizer())
    with pytest.raises(RunError, match="safety run of"):
        SafetyRun.open(tmp_path / "run", plan(requests), planted.refusing(1, "llama").model, tokenizer())
    with pytest.raises(PromptError, match="cannot be read"):
        SafetyRun.open(tmp_path / "other", plan(tmp_path / "none.csv"), made.model, tokenizer())
    assert not (tmp_path / "other").exists()
    (tmp_path / "run" / "safety.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(RunError, match="manifest"):
        safety_findings(tmp_path / "run")


def test_the_report_has_a_section(tmp_path, requests):
    made = planted.refusing(0, "llama")
    settings = {"kinds": ("zero",), "sizes": (1,), "group": 1}
    found = SafetyRun.open(tmp_path / "run", plan(requests, **settings), made.model, tokenizer()).finish(progress=False)
    page = interp.make_report(found, tmp_path / "report.html").read_text()
    assert "refused 24 of 24 harmful and 0 of 12 harmless requests" in page
    assert (
        "the first 1 by ships lowered refusals of other requests most, to 0% [0%, 0%]; with 1 random ones 100%" in page
    )
    assert "Refusals" in page
    assert str(Head(*made.head)) in page
