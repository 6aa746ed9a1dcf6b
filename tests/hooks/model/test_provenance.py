import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from tokenizers_tiny import byte_level
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from interp.errors import ScoreError
from interp.hooks.model.fingerprint import config_hash, template_hash, tokenizer_hash
from interp.hooks.model.origin import set_origin
from interp.hooks.model.provenance import Provenance

MAKE = """
import sys; sys.path[:0] = {path!r}
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tokenizers_tiny import byte_level
from interp.hooks.model.origin import set_origin
from interp.hooks.model.provenance import Provenance
torch.manual_seed(0)
config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=300)
made = Provenance.of(LlamaForCausalLM(config), byte_level())
print(made.config_hash, made.weights_hash, made.tokenizer_hash, made.template_hash)
"""


def llama(**settings) -> Any:
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 300,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))


@pytest.mark.slow
def test_hashes_are_the_same_in_another_process():
    made = Provenance.of(llama(), byte_level())
    found = subprocess.run(
        [sys.executable, "-c", MAKE.format(path=sys.path)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == [made.config_hash, made.weights_hash, made.tokenizer_hash, made.template_hash]


def test_only_entries_about_the_computation_change_the_config_hash():
    model = llama()
    before = config_hash(model.config)
    model.config.use_cache = False
    model.config._name_or_path = "elsewhere"
    model.config._attn_implementation = "eager"
    assert config_hash(model.config) == before
    model.config.rms_norm_eps = 0.5
    assert config_hash(model.config) != before


def test_tokenizer_hash_depends_on_the_vocabulary_not_on_the_last_call():
    tokenizer = byte_level(pad=True)
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != before
    assert tokenizer_hash(None) == template_hash(None) == template_hash(byte_level(chat=False)) == ""
    assert len(template_hash(tokenizer)) == 16


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("org/model", "org/model"),
        ("/home/me/secret/model", "model"),
        ("./models/mine/", "mine"),
        ("C:\\models\\mine", "mine"),
        ("/cache/hub/models--org--some-model/snapshots/0123abc", "org/some-model"),
        ("", ""),
    ],
)
def test_models_are_named_without_local_paths(name, stored):
    model = llama()
    model.config._name_or_path = name
    assert Provenance.of(model).model == stored


def test_provenance_records_how_the_result_was_made(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/bin/interp", "report", "org/model", "/data/me/out", "--out=/data/me/x.html", "-k=3"]
    )
    model = llama()
    set_origin(model, "demo", "weights dequantised")
    model.config._name_or_path = "org/model"
    made = Provenance.of(model, seed=7, backend="chunked", note="trial")
    assert made.command == "interp report org/model out --out=x.html -k=3"
    assert (made.model, made.architecture, made.seed, made.backend) == ("demo", "LlamaForCausalLM", 7, "chunked")
    assert (made.dtype, made.device, made.note) == ("float32", "cpu", "weights dequantised; trial")
    assert made.time.endswith("+00:00")
    assert made.versions["torch"] == torch.__version__
    assert "/" not in json.dumps(made.to_dict()).replace("org/model", "")


def test_provenance_survives_json():
    made = Provenance.of(llama(), byte_level())
    assert Provenance.from_dict(json.loads(json.dumps(made.to_dict())) | {"later": 1}) == made
    assert hash(made) == hash(dataclasses.replace(made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_hash": None}, '"weights_hash" of the provenance is None, not of type str'),
        ({"versions": "2"}, "not of type dict"),
        ("config_hash", 'has no entry "config_hash"'),
    ],
)
def test_broken_provenance_is_refused(change, message):
    stored = Provenance.of(llama()).to_dict()
    stored = stored | change if isinstance(change, dict) else {k: v for k, v in stored.items() if k != change}
    with pytest.raises(ScoreError, match=message):
        Provenance.from_dict(stored)


def test_stored_provenance_must_be_a_table():
    with pytest.raises(ScoreError, match="of type list"):
        Provenance.from_dict([])  # type: ignore[arg-type]


def test_another_model_is_refused_with_both_fingerprints():
    model, other = llama(), llama(num_hidden_layers=1)
    made, found = Provenance.of(model), Provenance.of(other)
    made.check_model(model)
    made.check_model(Provenance.of(llama()))
    assert not made.same_model(found)
    with pytest.raises(ScoreError, match=r"belong to .* the model given is") as caught:
        made.check_model(other)
    assert made.weights_hash in str(caught.value)
    assert found.weights_hash in str(caught.value)


def test_a_compiled_model_has_the_hashes_of_the_model_inside():
    model = llama()
    assert Provenance.of(torch.compile(model)).same_model(Provenance.of(model))


def test_a_bridge_has_the_hashes_of_the_model_inside(tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    from interp.hooks.model.heads import HeadLayout

    model = llama()
    made, layout = Provenance.of(model), HeadLayout.of(model)
    byte_level().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers("llama", hf_model=model, tokenizer=tokenizer)
    assert Provenance.of(bridge).same_model(made)
    assert HeadLayout.of(bridge) == layout
