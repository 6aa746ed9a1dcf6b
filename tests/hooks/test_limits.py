"""No file or argument takes all time or memory: each reader has limits, and says which."""

import json
import os
import time

import pytest

import interp
from interp.analyses import registry
from interp.analyses.results import codec
from interp.analyses.results.head_list_formats import (
    read_compresskv,
    read_duo_attention,
    read_qrhead,
    read_retrieval_head,
)
from interp.analyses.steer.load_edits import load_edits
from interp.analyses.tasks import jsonl, prose, refusal
from interp.analyses.tasks.standard import PromptSizes
from interp.errors import HeadError, InterpError, ModelError, PromptError, UsageError
from interp.hooks import limits
from interp.hooks.limits import check_regular, parse_json, parse_yaml, read_text
from interp.models.model_files import check_sizes
from interp.runs import folder as folders
from interp.runs.plan import ScorePlan
from interp.runs.safety import SafetyPlan
from interp.runs.steer import SteerPlan

LAYOUT = interp.HeadLayout(layers=4, heads=4, kv_heads=2)
DIGITS = "9" * 5000


def bomb(levels=9):
    """A YAML of a few hundred bytes that stands for 9 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"attn_head_set: *a{levels - 1}"])


def in_folder(path, name):
    """A folder that holds the file under this name."""
    folder = path.with_name("folder")
    folder.mkdir()
    path.rename(folder / name)
    return folder


READERS = {
    "prompts": lambda path: interp.Prompts.from_file(path.rename(path.with_suffix(".jsonl")), None),
    "items of a task": jsonl.read,
    "scores of Retrieval_Head": read_retrieval_head,
    "gates of DuoAttention": read_duo_attention,
    "heads of QRHead": read_qrhead,
    "heads of CompressKV": read_compresskv,
    "a result": lambda path: codec.load(path.rename(path.with_suffix(".json"))),
    "a manifest": lambda path: folders.read_manifest(in_folder(path, "manifest.json")),
    "edits": load_edits,
}
JSON = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 50_000,
    "closed lists": "[" * 2000 + "]" * 2000,
    "a long number": f'{{"0-0": {DIGITS}}}',
    "a long number as a list": f"[{DIGITS}]",
    "a long key": f'{{"{DIGITS}": [1]}}',
}
YAML = {
    "a bomb": bomb(),
    "an alias": "a: &a x\nattn_head_set: *a",
    "deep lists": "[" * 5000,
    "a long number": f"attn_head_set: {DIGITS}",
    "a number of base 60": "attn_head_set: " + "59:" * 3000 + "59",
    "a merge": "a: &a {b: 1}\nc: {<<: *a}",
    "an object of Python": "attn_head_set: !!python/object/apply:os.system [ls]",
}


@pytest.fixture(autouse=True)
def _quick():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", JSON | YAML)
def test_no_text_takes_a_reader_long(tmp_path, reader, case):
    path = tmp_path / "given"
    path.write_text((JSON | YAML)[case])
    with pytest.raises(InterpError) as caught:
        READERS[reader](path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_readers_take_regular_files_of_bounded_size(tmp_path, reader, kind, monkeypatch):
    path = tmp_path / "given"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        # no disk is filled: the file has a hole
        with path.open("wb") as file:
            file.truncate(limits.MAX_TEXT_BYTES + 1)
    with pytest.raises(InterpError):
        READERS[reader](path)


@pytest.mark.parametrize("case", YAML)
def test_yaml_is_read_without_aliases(case):
    with pytest.raises(ValueError, match=r"aliases|levels|digits|constructor"):
        parse_yaml(YAML[case])


def test_what_is_within_the_limits_is_read(tmp_path):
    deep: list = []
    for _ in range(limits.MAX_DEPTH - 1):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == deep
    assert parse_json('{"a": [1, -2.5, "x", null, true]}') == {"a": [1, -2.5, "x", None, True]}
    assert parse_yaml('a: 1\nb: [x, "5000"]') == {"a": 1, "b": ["x", "5000"]}
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone")
    assert read_text(tmp_path / "a", PromptError) == "one"
    assert check_regular(tmp_path / "a", PromptError) == 6


HEADS = {
    "a long range": "L0H0-L0H999999999",
    "a range of layers": "L0-L999999999",
    "a long number": f"L{DIGITS}H0",
    "a long number with a point": f"{DIGITS}.{DIGITS}",
    "a layer of many digits": f"L{DIGITS}",
    "a head of all layers": f"L*H{DIGITS}",
    "a layer": "L999999999",
    "a range of many digits": f"L0H0-L0H{DIGITS}",
    "many ranges": ", ".join(f"L{layer}H0-L{layer}H99999" for layer in range(100)),
    "a pair": (10**9, 10**9),
    "a pair of many digits": (int("9" * 4000) ** 2, 0),
    "a negative pair": (-(int("9" * 4000) ** 2), 0),
    "pairs": [(0, 0), (10**30, 1)],
    "a long word": "x" * 100_000,
}


@pytest.mark.parametrize("layout", [None, LAYOUT])
@pytest.mark.parametrize("case", HEADS)
def test_heads_are_no_more_than_a_model_has(case, layout):
    with pytest.raises(HeadError) as caught:
        interp.HeadSet.parse(HEADS[case], layout)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("spec", ["L2H0-L2H3", "L1-L3", "L*H3", "all", "0002.0003", (3, 3)])
def test_heads_within_the_limits_are_read(spec):
    assert len(interp.HeadSet.parse(spec, LAYOUT)) > 0


NUMBERS = {
    "texts": lambda: ScorePlan(sizes=PromptSizes(n_texts=10**9)),
    "lengths": lambda: ScorePlan(sizes=PromptSizes(needle_length=10**18)),
    "a seed": lambda: ScorePlan(sizes=PromptSizes(seed=2**63)),
    "a seed below 0": lambda: ScorePlan(sizes=PromptSizes(seed=-1)),
    "lengths of a sweep": lambda: ScorePlan(sizes=PromptSizes(sweep_lengths=(10**12,))),
    "a depth": lambda: ScorePlan(sizes=PromptSizes(needle_depths=(float("nan"),))),
    "random sets": lambda: ScorePlan(n_random_sets=10**30),
    "heads": lambda: ScorePlan(n_heads=int("9" * 4000) ** 2),
    "a batch": lambda: ScorePlan(batch_size=10**9),
    "a setting": lambda: ScorePlan(analyses=("retrieval",), settings={"retrieval": {"max_new_tokens": 10**20}}),
    "a setting that is no number": lambda: ScorePlan(analyses=("qada",), settings={"qada": {"tau": float("inf")}}),
    "a steering setting": lambda: SteerPlan(method="pasta", task="json", settings={"alpha": float("nan")}),
    "sizes of sets": lambda: SteerPlan(method="pasta", task="json", head_set_sizes=(10**12,)),
    "requests": lambda: SafetyPlan(n_harmful=10**12),
    "a group": lambda: SafetyPlan(group_size=10**12),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_a_plan_can_be_counted_to(case):
    with pytest.raises(UsageError, match=r"too large; give at most|is not finite|is not valid; give a number from"):
        NUMBERS[case]()


@pytest.mark.parametrize("text", [f"qada.tau={DIGITS}", f"qada.tau={'[' * 100_000}", f"qada.tau={'1' * 2000}"])
def test_a_setting_of_many_digits_is_a_text(text):
    assert isinstance(registry.parse_setting(text)[2], str)


CONFIGS = {
    "layers": {"num_hidden_layers": 10**9},
    "layers of GPT-2": {"n_layer": 10**9},
    "layers of an inner config": {"text_config": {"num_hidden_layers": 22}},
    "width": {"hidden_size": 10**12},
    "vocabulary": {"vocab_size": 10**12},
    "heads": {"num_attention_heads": 10**10},
    "positions": {"max_position_embeddings": 10**15},
    "a table of positions": {"model_type": "gpt_neo", "max_position_embeddings": 10**6},
    "experts": {"num_local_experts": 10**9},
    "not a number": {"num_hidden_layers": float("nan")},
    "infinitely wide": {"hidden_size": float("inf")},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_describes_no_more_than_its_weights(case):
    with pytest.raises(ModelError, match=r"config\.json states .*, and its 21 weight tensors of 5,000 numbers allow"):
        check_sizes(CONFIGS[case], 21, 5000, "config.json")


def test_usual_configs_are_within_the_limits():
    usual = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 300, "max_position_embeddings": 10_485_760}
    check_sizes(usual | {"rope_theta": 1e12, "sliding_window": 4096, "eos_token_id": 128_009}, 21, 5000, "config.json")


def test_other_readers_have_the_limits_too(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(PromptError, match="cannot be read as a CSV file in UTF-8, since it is a named pipe"):
        refusal.read(tmp_path / "a.csv", None)
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    with pytest.raises(PromptError, match="a device"):
        prose.read_text(tmp_path / "a.txt", PromptError)
