"""Files of results: every marked type comes back bit for bit, and broken or hostile files are refused."""

import dataclasses
import hashlib
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from torch import Tensor

from interp.analyses.results import codec
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.result import Result
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.errors import ScoreError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance

NAN = torch.nan
ORIGIN = Provenance("tiny", "LlamaForCausalLM", "c" * 16, "w" * 16, versions={"torch": "2.9.0"}, seed=3)
NAMES = sorted({*codec._modules(), "HeadLayout"})


def example(hint: Any) -> Any:
    """A value of an annotation: every tensor axis has two entries, floats are not round."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        return example(options[0])
    if get_origin(hint) is Literal:
        return options[0]
    if get_origin(hint) is tuple:
        return tuple(example(each) for each in ([options[0]] * 2 if options[-1] is ... else options))
    if get_origin(hint) in (list, Sequence):
        return [example(options[0])] * 2
    if get_origin(hint) in (dict, Mapping):
        return {"a": example(options[1]), "b.c": example(options[1])}
    known = {
        str: "A fox said \u201cno\u201d.\n", int: 1, float: 0.1 + 0.2, bool: True,
        Any: [1, 0.5, None, "x", {"y": [True]}],
        Head: Head(1, 0), HeadSet: HeadSet.parse("L0H1, L1H0"), HeadLayout: HeadLayout(2, 2, 1), Provenance: ORIGIN,
        Tensor: torch.tensor([[1.5, NAN], [torch.inf, -0.0]]),
    }  # fmt: skip
    if hint in known:
        return known[hint]
    if getattr(hint, "array_type", None) is Tensor:
        whole = "int64" in hint.dtypes
        values = torch.arange(2.0 ** len(hint.dims)) / 7
        return values.view([2] * len(hint.dims)).to(torch.int64 if whole else torch.float32)
    return make(hint)


def make(kind: type) -> Any:
    """An instance of a marked type with a value in every field."""
    hints = codec._hints(kind)
    values = {field.name: example(hints[field.name]) for field in dataclasses.fields(kind) if field.init}
    if kind is HeadScores:
        values |= {"kv_heads": 1, "extras": {"ends": torch.tensor([NAN, -0.0]).expand(2, 2, 2, 2)}}
    if kind.__name__ == "Explored":
        values |= {"block": 1, "marks": {"answer": ((0, 1), (1, 2))}}
    return kind(**values)


def same(one: Any, other: Any) -> bool:
    """Equal in type and value; tensors bit for bit, NaN equal to NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
    if isinstance(one, Head | HeadSet | Provenance | HeadLayout):
        return one == other
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() and x.is_floating_point() else x


@pytest.mark.parametrize("name", NAMES)
def test_every_marked_type_comes_back(tmp_path, name):
    kind = codec.find_type(name)
    assert kind is not None
    value = make(kind)
    path = codec.save(value, tmp_path / "value.v1")
    # only the last part is an ending
    assert path.name == "value.v1.json"
    again = codec.load(tmp_path / "value.v1")
    assert same(again, value)
    # the file of what was read is the same file
    assert codec.save(again, tmp_path / "again").read_text() == path.read_text()
    if issubclass(kind, Result):
        assert same(kind.load(path), value)
        other = HeadScores if kind is not HeadScores else Trials
        with pytest.raises(ScoreError, match=f"holds a {name}, not a {other.__name__}"):
            other.load(path)


@codec.result
@dataclasses.dataclass
class Nest:
    """Fields of every kind; no method, so that the codec alone is tested."""

    child: "Nest | None" = None
    numbers: tuple[float, ...] = ()
    pairs: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    more: list[tuple[Tensor, ...]] = dataclasses.field(default_factory=list)
    heads: HeadSet = dataclasses.field(default_factory=lambda: HeadSet(()))
    best: Head | None = None
    anything: Any = None


def test_nested_values_come_back_bit_for_bit(tmp_path):
    shared = torch.tensor([NAN, -0.0, 1e-45, 3.4e38])
    value = Nest(
        child=Nest(numbers=(math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2), best=Head(3, 7)),
        pairs={"a": (1.5, 2), "b.c": (math.nan, -1)},
        # one tensor twice, keys whose dots make equal paths, no entries, no axes, a view, and other types
        tensors={
            "x": shared, "x.y": shared, "none": torch.zeros(0, 3), "one": torch.tensor(2.5), "view": shared[::2],
            "int": torch.arange(3), "bool": torch.tensor([True, False]), "half": torch.tensor([1.5]).bfloat16(),
        },
        more=[(shared, shared[1:]), ()],
        heads=HeadSet.parse("L1H2, L0H0"),
        anything=[1, "two", {"three": [None, True]}, math.inf, torch.ones(2)],
    )  # fmt: skip
    value.tensors |= {"q": shared + 1, "q.0": shared + 2}
    again = codec.load(codec.save(value, tmp_path / "nest"))
    assert same(again, value)
    # -0.0 equals 0.0, so the signs are compared apart
    assert math.copysign(1, again.child.numbers[3]) == -1
    assert same(codec.load(codec.save(Nest(), tmp_path / "empty")), Nest())
    assert not (tmp_path / "empty.safetensors").exists()


def test_a_gradient_and_a_view_do_not_reach_the_file(tmp_path):
    leaf = torch.ones(3, requires_grad=True)
    again = codec.load(codec.save(Nest(tensors={"leaf": leaf, "column": torch.ones(4, 100)[:, 1]}), tmp_path / "x"))
    assert not again.tensors["leaf"].requires_grad
    assert (tmp_path / "x.safetensors").stat().st_size < 400


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Nest(anything={1, 2}), r"Nest.anything is a set, which cannot be stored; use numbers"),
        (Nest(anything=[print]), r"Nest.anything\[0\] is a builtin_function_or_method"),
        (Nest(anything={1: 2}), r"Nest.anything has the key 1; give texts as keys"),
        (Nest(anything={"$type": 2}), r"has the key '\$type'; give texts as keys, none of which begins with '\$'"),
        (Nest(anything=Head), r"is a type"),
        (dataclasses.make_dataclass("Unmarked", ["x"])(1), "holds a Unmarked, which is not a result; mark its class"),
    ],
)
def test_values_that_cannot_be_stored(tmp_path, value, text):
    with pytest.raises(ScoreError, match=text):
        codec.save(value, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_two_types_of_one_name_are_refused():
    other = dataclasses.make_dataclass("Nest", ["x"])
    with pytest.raises(ScoreError, match="two results are named 'Nest'"):
        codec.result(other)
    # the same class, made again by a reload, takes the place of the first
    assert codec.result(Nest) is Nest


def stored(tmp_path, **changes):
    """A file of a Trials with changed entries; None removes one."""
    trials = Trials("made", (Trial("top", {"loss": (1.0, 2.0)}, HeadSet.parse("L0H1"), intervals={"x": (0.0, 1.0)}),))
    path = trials.save(tmp_path / "x")
    content = json.loads(path.read_text()) | {"sha256": None} | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def unsealed(path):
    """The content of a file without its checksum, which other programs may leave out."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}


def trial(**changes):
    return [{"$type": "Trial", "condition": "top", "values": {"loss": [1.0]}} | changes]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"format": "interp.result/1"},
            r"the format 'interp.result/1', expected 'interp.result/2'; make",
        ),
        ({"format": None}, "has the format None"),
        ({"$type": None}, "names no type of result"),
        ({"$type": "Path"}, "holds a 'Path', which is unknown here; install the package that defines it"),
        ({"$type": "os.system"}, "holds a 'os.system', which is unknown here"),
        ({"$type": ["Trials"]}, "which is unknown here"),
        ({"$type": {"$type": "Trials"}}, "which is unknown here"),
        ({"$type": "Trial"}, "is broken"),
        ({"name": None}, 'it has no "name"; make it again'),
        ({"name": 3}, r'no usable "name" \(3, expected str\)'),
        ({"name": True}, "expected str"),
        ({"seed": 1.5}, r"\(1.5, expected int\)"),
        ({"seed": True}, "expected int"),
        ({"seed": "1"}, "expected int"),
        ({"shares": "accuracy"}, "expected list"),
        ({"units": ["x"]}, "expected object"),
        ({"units": {"loss": 1}}, "expected str"),
        ({"trials": {}}, "expected list"),
        ({"trials": []}, "are empty"),
        ({"trials": ["top"]}, "expected Trial"),
        ({"trials": [{"condition": "top"}]}, "expected Trial"),
        ({"trials": [{"$type": "HeadLayout", "layers": 1, "heads": 1, "kv_heads": 1}]}, "expected Trial"),
        ({"trials": trial(values={"loss": []})}, "has no numbers"),
        ({"trials": trial(values={"loss": [None]})}, "expected float"),
        ({"trials": trial(values={"loss": ["1"]})}, "expected float"),
        ({"trials": trial(values={"loss": [{"$float": "one"}]})}, "is broken"),
        ({"trials": trial(values={"loss": {"$tensor": "x"}})}, "expected list"),
        ({"trials": trial(heads="L0")}, "is broken"),
        ({"trials": trial(heads=[0, 1])}, "expected str"),
        ({"trials": trial(heads="L0H1; import os")}, "is broken"),
        ({"trials": trial(intervals={"x": [0.0, 1.0, 2.0]})}, "expected 2 entries"),
        ({"settings": {"x": {"$tensor": "y"}}}, "no tensor 'y'; keep the two files"),
        ({"settings": {"x": {"$tensor": ["y"]}}}, "no tensor"),
        ({"provenance": {"model": 1}}, "is broken"),
        ({"provenance": "me"}, "expected NoneType or object"),
    ],
)
def test_broken_files_are_refused_in_one_sentence(tmp_path, changes, text):
    path = stored(tmp_path, **changes)
    with pytest.raises(ScoreError, match=text) as raised:
        codec.load(path)
    message = str(raised.value)
    assert "\n" not in message
    assert path.name in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_files_that_hold_no_result(tmp_path, data, text):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ScoreError, match=text):
        codec.load(tmp_path / "x.json")
    with pytest.raises(ScoreError, match="cannot be read"):
        codec.load(tmp_path / "missing")


def test_deep_nesting_is_refused(tmp_path):
    path = codec.save(Nest(), tmp_path / "x")
    inner = '{"$type": "Nest", "child": ' * 400 + "null" + "}" * 400
    path.write_text(f'{{"format": "{codec.FORMAT}", "$type": "Nest", "child": {inner}}}')
    with pytest.raises(ScoreError, match=r"is broken|is not JSON"):
        codec.load(path)


def test_tensors_belong_to_their_file(tmp_path):
    one = codec.save(Nest(tensors={"x": torch.ones(2)}), tmp_path / "one")
    codec.save(Nest(tensors={"x": torch.zeros(2)}), tmp_path / "two")
    mine, foreign = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    own = mine.read_bytes()
    mine.write_bytes(foreign.read_bytes())
    with pytest.raises(ScoreError, match=r"does not belong to one\.json; keep the two files of one save together"):
        codec.load(one)
    mine.unlink()
    with pytest.raises(ScoreError, match=r"needs one\.safetensors next to it, which cannot be read"):
        codec.load(one)
    # a hash that fits does not make tensors of something else
    mine.write_bytes(b"\x80\x04pickle")
    content = unsealed(one) | {"tensors_sha256": hashlib.sha256(mine.read_bytes()).hexdigest()}
    one.write_text(json.dumps(content))
    with pytest.raises(ScoreError, match="is not a safetensors file"):
        codec.load(one)
    mine.write_bytes(own)
    content["tensors_sha256"] = hashlib.sha256(own).hexdigest()
    one.write_text(json.dumps(content | {"tensors": {"x": {"$tensor": "tensors.y"}}}))
    with pytest.raises(ScoreError, match=r"no tensor 'tensors\.y'"):
        codec.load(one)


def test_a_file_makes_marked_types_and_nothing_else(tmp_path, monkeypatch):
    imported = []
    monkeypatch.setattr(codec, "import_module", lambda name: imported.append(name))
    path = codec.save(Nest(), tmp_path / "x")
    names = ["subprocess.Popen", "Popen", "interp.runs.run.Run", "Head", "Prompts", "__import__", "../x", "this", ""]
    before = set(sys.modules)
    for name in names:
        for content in (
            {"$type": name, "args": ["touch", str(tmp_path / "ran")]},
            {"$type": "Nest", "anything": [{"$type": name}]},
        ):
            path.write_text(json.dumps({"format": codec.FORMAT, **content}))
            with pytest.raises(ScoreError, match="unknown here"):
                codec.load(path)
    assert not imported
    assert "this" not in set(sys.modules) - before
    assert not (tmp_path / "ran").exists()


def test_names_lead_to_modules_of_analyses_only():
    assert codec._modules()["SaharaResult"] == "interp.analyses.identify.sahara"
    assert all(module.startswith("interp.analyses.") for module in codec._modules().values())


def test_results_of_other_packages_are_found(tmp_path, monkeypatch):
    path = codec.save(Nest(), tmp_path / "x")
    monkeypatch.setattr(codec, "_TYPES", {name: kind for name, kind in codec._TYPES.items() if name != "Nest"})

    def broken():
        raise ImportError("no such module")

    monkeypatch.setattr(codec, "_packages", lambda: [broken])
    with pytest.raises(ScoreError, match="'Nest', which is unknown here; install the package"):
        codec.load(path)
    monkeypatch.setattr(codec, "_packages", lambda: [broken, lambda: codec.result(Nest)])
    assert same(codec.load(path), Nest())


def test_a_killed_save_leaves_the_old_file_or_a_pair_that_is_refused(tmp_path, monkeypatch):
    path = codec.save(Nest(tensors={"x": torch.ones(2)}), tmp_path / "x")
    write = codec.write_atomic

    def killed(to, data, **settings):
        if to.suffix == ".json":
            raise KeyboardInterrupt
        return write(to, data, **settings)

    monkeypatch.setattr(codec, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        codec.save(Nest(tensors={"x": torch.zeros(2)}), path)
    with pytest.raises(ScoreError, match="does not belong"):
        codec.load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


def test_a_result_of_another_model_is_refused(tmp_path, tiny_model):
    origin = Provenance.of(tiny_model("llama"))
    table = HeadScores("made", torch.zeros(1, 2, 4), provenance=origin)
    path = table.save(tmp_path / "x")
    assert same(HeadScores.load(path, tiny_model("llama")), table)
    with pytest.raises(ScoreError):
        HeadScores.load(path, tiny_model("gpt2"))
    HeadScores("made", torch.zeros(1, 2, 4)).save(path)
    with pytest.raises(ScoreError, match="does not name the model it belongs to; load it without a model"):
        HeadScores.load(path, tiny_model("llama"))
