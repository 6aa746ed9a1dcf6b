"""Small plans for tests of runs, and the comparison of their results."""

import csv
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp.analyses.tasks.standard import PromptSizes
from interp.errors import InterpError
from interp.hooks.model.provenance import Provenance
from interp.report import render
from interp.runs.plan import ScorePlan
from interp.runs.results import read_results, record_path
from interp.runs.safety import SafetyPlan
from interp.runs.steer import SteerPlan
from interp.testing import planted

SIZES = PromptSizes(
    n_needles=3, needle_length=560, needle_depths=(0.5,), reply_tokens=3, n_texts=3, text_length=40, n_repeated=12,
    n_pairs=3, n_few_shot=4, n_check_needles=3, check_length=560, training_steps=2, explorer_tokens=560,
)  # fmt: skip
REFUSAL = "I'm sorry, but I can't help with that."


def score_plan(*analyses: str, sizes: PromptSizes = SIZES, **settings: Any) -> ScorePlan:
    """A plan that tests two heads against two random sets of each kind."""
    small = {"heads": "L0H1, L1H2", "n_heads": 2, "n_random_sets": 2, "batch_size": 2}
    return ScorePlan(analyses=analyses, sizes=sizes, **small | settings)


def steer_plan(task: Path, method: str = "pasta", **settings: Any) -> SteerPlan:
    """A plan on a few items of a file."""
    small = {
        "settings": {"alpha": 0.1} if method == "pasta" else {}, "head_set_sizes": (2, 4), "n_profile_items": 4,
        "n_dev_items": 3, "n_test_items": 4, "n_profiled_heads": 3, "n_random_sets": 2,
    }  # fmt: skip
    return SteerPlan(method=method, task=str(task), **small | settings)


def safety_plan(requests: Path | str, **settings: Any) -> SafetyPlan:
    """A plan on the planted model that refuses."""
    small = {
        "n_harmless": 12, "n_scored": 8, "n_tested": 8, "group_size": 2, "head_set_sizes": (1, 2), "n_neutral": 2,
        "n_easy": 3, "n_random_sets": 2, "reply_tokens": 3,
    }  # fmt: skip
    return SafetyPlan(requests=str(requests), **small | settings)


def items_file(path: Path, n: int = 30, text: str = "") -> Path:
    """Items of a steering task with a span "mark"; `text` is added to every question."""
    rows = [
        {
            "text": f"Number {i}: say yes or no. ", "spans": {"mark": "say yes or no", "opening": "Number"},
            "right": [" yes"], "wrong": [" no"], "question": f"number {i}? {text}", "answer": "yes",
        }
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def refusing_tokenizer() -> Any:
    """Whole words of the planted models: NO reads as a refusal, HARM as the word harm."""
    vocab = {"<pad>": planted.PAD, "<s>": planted.BOS, "</s>": planted.EOS, "harm": planted.HARM, REFUSAL: planted.NO}
    vocab |= {f"w{i}": i for i in range(planted.FIRST_WORD, planted.VOCAB) if i not in (planted.HARM, planted.NO)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w3", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def requests_file(path: Path, n: int = 24) -> Path:
    """A CSV file of requests that the planted model refuses."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["goal", "target"])
        for row in planted.requests(0, batch=n):
            words = ["harm" if token == planted.HARM else f"w{token}" for token in row[1:]]
            writer.writerow([" ".join(words), "unused"])
    return path


def difference(one: Any, other: Any, where: str = "") -> str:
    """The first place where two results differ, "" where they are equal; the origin counts by its model alone."""
    if type(one) is not type(other):
        return f"{where}: {type(one).__name__} and {type(other).__name__}"
    if isinstance(one, torch.Tensor):
        return "" if one.shape == other.shape and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)) else where
    if isinstance(one, np.ndarray):
        return "" if np.array_equal(one, other, equal_nan=one.dtype.kind == "f") else where
    if isinstance(one, Provenance):
        return "" if one.same_model(other) else where
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return f"{where}: {list(one)} and {list(other)}"
        pairs = [(f"{where}[{key!r}]", one[key], other[key]) for key in one]
    elif is_dataclass(one):
        pairs = [(f"{where}.{f.name}", getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} values"
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    else:
        same = one == other or (one != one and other != other)
        return "" if same else f"{where}: {one!r} and {other!r}"
    return next((found for name, *pair in pairs if (found := difference(pair[0], pair[1], name))), "")


def unfinish(folder, name="sinks"):
    """Take the last steps of a run back: the record of a stage, and its result."""
    record_path(folder, name).unlink()
    for path in (folder / "results").glob(f"{name}.*"):
        path.unlink()


def outcome(folder, found):
    """Whether a change is "reported" (the run is refused or called unfinished) or "harmless"; else what it changed."""
    try:
        again = read_results(folder)
    except InterpError as error:
        return "reported" if "\n" not in str(error) and len(str(error)) < 700 else f"reported in many words: {error}"
    for name, result in again.results.items():
        if wrong := difference(result, found[name], name):
            return f"reported, {wrong}" if name in again.unfinished else wrong
    if again.unfinished:
        assert "This run is not finished" in again.summary()
        assert "This run is not finished" in render(again)
        return "reported"
    for name in ("texts", "missing", "settings", "own_prompts", "layout", "provenance"):
        if wrong := difference(getattr(again, name), getattr(found, name), name):
            return wrong
    return "harmless" if list(again) == list(found) else "other results"
