"""Loading is by allow-list: a folder, an index, a GGUF file or a hub model cannot bring what it should not."""

import json
import os
import shutil
import struct
import subprocess
import sys

import gguf
import pytest
import tiny_chat_model
import torch
from gguf_file import write_gguf
from safetensors.torch import load_file, save_file

from interp.errors import ModelError
from interp.hooks.model.provenance import Provenance
from interp.models import demo as demo_module
from interp.models.load import load

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return tiny_chat_model.folder(tmp_path / "tiny")


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder, change):
    """Store the weights again, after a change of the dict of tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def sharded(folder, name, metadata=None):
    """Move the weights to a file that an index names."""
    tensors = load_file(folder / "model.safetensors")
    target = folder / name
    if target.parent.is_dir():
        shutil.copy(folder / "model.safetensors", target)
    (folder / "model.safetensors").unlink()
    stored = {"metadata": {} if metadata is None else metadata, "weight_map": dict.fromkeys(tensors, name)}
    (folder / INDEX).write_text(json.dumps(stored))


def as_integers(tensors):
    """One matrix as int8 with a scale for each row, as several tools write it."""
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = tensors[name].abs().amax(1, keepdim=True) / 127
    tensors[name] = (tensors[name] / scale).round().to(torch.int8)
    tensors[f"{name}_scale"] = scale


def integers(kind):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(kind)

    return change


def more(name):
    return lambda tensors: tensors.update({name: torch.ones(2)})


def fifo(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def device(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


BAD = {
    "int8 weights with scales": (lambda f: weights(f, as_integers), "as I8, but config.json names no quantisation"),
    "bytes": (lambda f: weights(f, integers(torch.uint8)), "as U8, but config.json names no quantisation"),
    "integers of 32 bits": (lambda f: weights(f, integers(torch.int32)), "as I32"),
    "8-bit floats without scales": (lambda f: weights(f, integers(torch.float8_e4m3fn)), "as F8_E4M3"),
    "unknown method of quantisation": (
        lambda f: config(f, quantization_config={"quant_method": "mine", "bits": 4}), "is quantised by 'mine'",
    ),
    "method without a name": (lambda f: config(f, quantization_config={"bits": 4}), "is quantised by None"),
    "method in an inner config": (
        lambda f: config(f, text_config={"quantization_config": {"quant_method": "mine"}}), "is quantised by 'mine'",
    ),
    "another spelling of the method": (lambda f: config(f, compression_config={"quant_method": "x"}), "by 'x'"),
    "scales of a method left out": (lambda f: weights(f, more("model.layers.0.mlp.up_proj.weight_scale_inv")), "use"),
    "a layer too many": (lambda f: weights(f, more("model.layers.2.input_layernorm.weight")), "does not use"),
    "a bias of an unknown name": (lambda f: weights(f, more("model.layers.0.self_attn.q_proj.bias")), "does not use"),
    "a weight too few": (lambda f: weights(f, lambda t: t.pop("model.norm.weight")), "lacks 1 weights"),
    "index names a pickle": (lambda f: sharded(f, "pytorch_model.bin"), "not a .safetensors file"),
    "index names code": (lambda f: sharded(f, "weights.py"), "not a .safetensors file"),
    "index leads out": (lambda f: sharded(f, "../other.safetensors"), "not in its folder"),
    "index leads out in the middle": (lambda f: sharded(f, "a/../../other.safetensors"), "not in its folder"),
    "index has an absolute path": (lambda f: sharded(f, "/tmp/other-interp.safetensors"), "not in its folder"),
    "index has a path of Windows": (lambda f: sharded(f, "..\\other.safetensors"), "not in its folder"),
    "index names nothing": (lambda f: sharded(f, "none/x.safetensors"), "cannot be read"),
    "index without a map": (
        lambda f: (sharded(f, "a.safetensors"), (f / INDEX).write_text('{"metadata": {}}')), "has no weight_map",
    ),
    "index is a list": (lambda f: (sharded(f, "a.safetensors"), (f / INDEX).write_text("[]")), "holds a list"),
    "config names a pickle": (lambda f: config(f, transformers_weights="adapter_model.bin"), "adapter_model.bin"),
    "config names a file outside": (lambda f: config(f, transformers_weights="../x.safetensors"), "names the weights"),
    "an adapter as well": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter as well"),
    "an adapter alone": (
        lambda f: ((f / "adapter_config.json").write_text("{}"), (f / "config.json").unlink()), "holds an adapter",
    ),
    "weights are a pipe": (fifo, "is a named pipe"),
    "config is a device": (device, "is a device"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_folder_cannot_bring(folder, case):
    change, text = BAD[case]
    change(folder)
    with pytest.raises(ModelError) as caught:
        load(folder, device="cpu")
    assert text in str(caught.value)
    assert str(caught.value).endswith(".")


GOOD = {
    "shards": lambda f: sharded(f, "model-00001-of-00001.safetensors", {"total_size": 1}),
    "shards in a folder inside": lambda f: ((f / "parts").mkdir(), sharded(f, "parts/a.safetensors")),
    "a link, as in the cache of the hub": lambda f: (
        shutil.move(f / "model.safetensors", f.parent / "blob"), (f / "model.safetensors").symlink_to("../blob"),
    ),
    "tables of old versions": lambda f: weights(f, more("model.layers.0.self_attn.rotary_emb.inv_freq")),
    "pickles next to safetensors": lambda f: (f / "pytorch_model.bin").write_bytes(b"never opened"),
    "code next to the weights": lambda f: (f / "modeling_tiny.py").write_text("raise SystemExit"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_what_a_folder_may_hold(folder, case):
    ids = torch.arange(3, 20)[None]
    expected = load(folder, device="cpu").model(ids).logits
    GOOD[case](folder)
    torch.testing.assert_close(load(folder, device="cpu").model(ids).logits, expected)


@pytest.mark.parametrize("entry", ["interp_name", "interp_note", "_name_or_path", "_interp_origin"])
def test_a_config_cannot_name_its_model(folder, entry):
    config(folder, **{entry: "meta-llama/Llama-3.1-8B"})
    made = Provenance.of(load(folder, device="cpu").model)
    assert (made.model, made.note) == ("tiny", "")


def test_a_folder_named_as_the_demo_is_not_the_demo(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / demo_module.FOLDER_NAME)
    made = Provenance.of(load(other, device="cpu").model)
    assert (made.model, made.note) == (demo_module.FOLDER_NAME, "")


@pytest.fixture
def gguf_file(tiny_model, tmp_path):
    place = tmp_path / "quantised"
    place.mkdir()
    write_gguf(place / "tiny-q.gguf", tiny_model("llama"))
    return place / "tiny-q.gguf"


NEIGHBOURS = {
    "tokenizer": lambda place: tiny_chat_model.tokenizer().save_pretrained(place),
    "model": lambda place: tiny_chat_model.folder(place, seed=1),
    "chat template": lambda place: (place / "chat_template.jinja").write_text("{{ messages[0]['content'] }} mine"),
    "tokens": lambda place: (place / "tokenizer_config.json").write_text('{"bos_token": "ab", "chat_template": "x"}'),
    "settings": lambda place: (place / "generation_config.json").write_text('{"max_length": 3, "do_sample": true}'),
    "added tokens": lambda place: (place / "added_tokens.json").write_text('{"zzz": 1}'),
}


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_a_gguf_file_takes_nothing_from_its_neighbours(gguf_file, case):
    model, alone = load(gguf_file, device="cpu")
    settings = model.generation_config.to_dict()
    NEIGHBOURS[case](gguf_file.parent)
    model, tokenizer = load(gguf_file, device="cpu")
    assert tokenizer is not None
    assert alone is not None
    assert tokenizer.get_vocab() == alone.get_vocab()
    assert (tokenizer.chat_template, tokenizer.bos_token) == (alone.chat_template, alone.bos_token)
    assert model.generation_config.to_dict() == settings
    assert Provenance.of(model, tokenizer).model == "tiny-q"


def test_a_gguf_file_without_a_tokenizer_takes_none(gguf_file, tmp_path, monkeypatch, tiny_model):
    for name in ("add_tokenizer_model", "add_token_list", "add_token_types", "add_token_merges"):
        monkeypatch.setattr(gguf.GGUFWriter, name, lambda *_: None)
    bare = tmp_path / "bare.gguf"
    write_gguf(bare, tiny_model("llama"))
    tiny_chat_model.tokenizer().save_pretrained(tmp_path)
    assert load(bare, device="cpu").tokenizer is None


def patched(file, old, new):
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))


def overwritten(file, place, new):
    data = file.read_bytes()
    file.write_bytes(data[:place] + new + data[place + len(new) :])


def stated(n):
    """The entry with the number of layers, 2, replaced."""
    return lambda f: patched(f, BLOCKS + struct.pack("<I", 2), BLOCKS + struct.pack("<I", n))


BLOCKS = b"llama.block_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
HEADERS = {
    "no magic": (lambda f: f.write_bytes(b"GGML" + f.read_bytes()[4:]), "does not begin with GGUF"),
    "a later version": (lambda f: f.write_bytes(b"GGUF\x09" + f.read_bytes()[5:]), "version 9"),
    "cut off": (lambda f: f.write_bytes(f.read_bytes()[:400]), "header is broken"),
    "empty": (lambda f: f.write_bytes(b""), "header is broken"),
    "many tensors": (lambda f: overwritten(f, 8, b"\xff" * 7 + b"\x00"), "entries"),
    "many entries": (lambda f: overwritten(f, 16, b"\xff" * 8), "entries"),
    "a billion layers": (stated(10**9), "states 1000000000 layers"),
    "a layer left out": (stated(1), "holds the weights of 2"),
    "no number of layers": (lambda f: patched(f, b"llama.block_count", b"llama.block_coun2"), "states None layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_gguf_header_is_read_within_its_file(gguf_file, case):
    change, text = HEADERS[case]
    change(gguf_file)
    with pytest.raises(ModelError) as caught:
        load(gguf_file, device="cpu")
    assert text in str(caught.value)


HUB = """
import interp
from interp.hooks.model.provenance import Provenance

print(Provenance.of(interp.load("org/tiny", device="cpu").model).model)
"""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: None, "org/tiny"),
        (lambda f: weights(f, as_integers), "as I8"),
        (lambda f: sharded(f, "../x"), "not in"),
    ],
)
def test_hub_models_pass_the_same_checks(folder, tmp_path, change, text):
    """The cache of the hub holds the model already, and nothing is requested."""
    change(folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, check=False)
    assert text in done.stdout + done.stderr
    assert (done.returncode == 0) == (text == "org/tiny"), done.stderr


def test_the_digests_of_the_demo_are_compared_when_it_is_loaded(tmp_path, monkeypatch):
    whole = tmp_path / demo_module.FOLDER_NAME
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    sums = f"# 2 config.json\n{demo_module._sha256(whole / 'config.json')}  config.json\n"
    (whole / demo_module.CHECKSUM_FILE).write_text(sums)
    assert demo_module.demo_folder(tmp_path) == whole
    # of the same size
    (whole / "config.json").write_text("[]")
    made = []
    monkeypatch.setattr(demo_module, "_make", made.append)
    demo_module.demo_folder(tmp_path)
    assert made == [whole]
