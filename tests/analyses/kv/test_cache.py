"""Compact caches against hidden keys: the same tokens, and the memory that was promised."""

import sys
from typing import Any

import pytest
import torch
from kv_oracle import MORE, SELECTORS, continuation, continued, prompts, scores
from transformers import DynamicCache

from interp.analyses.kv.duo_attention import DuoAttention
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.errors import UsageError
from interp.hooks.edit.evicting_cache import EvictingCache, Hiding, nbytes
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_compact_cache_gives_the_same_and_holds_what_was_kept(name, family):
    model: Any = families.make(family)
    asked, later = prompts(), continuation()
    selector = SELECTORS[name](scores(model))
    hidden, noted = continued(model, selector, asked, later, DynamicCache(config=model.config))
    cache: Any = EvictingCache(model)
    compact, _ = continued(model, selector, asked, later, cache)
    assert torch.equal(hidden, compact)
    for layer, held in enumerate(cache.layers):
        if getattr(held, "is_sliding", False):
            continue
        kept = noted[layer].kept
        assert int(held.kept.sum()) == int(kept.sum())
        size = 2 * held.keys.shape[-1] * 4
        expected = int(kept.sum()) * size + kept.shape[0] * kept.shape[1] * MORE * size + held.kept.numel()
        assert held.nbytes == expected


@pytest.mark.parametrize("name", ["streaming", "snapkv", "taskkv", "duo"])
def test_generation_is_what_a_recompute_of_every_step_gives(name):
    model: Any = families.make("llama")
    asked = prompts(1)
    selector = SELECTORS[name](scores(model))
    with selecting(model, selector, asked):
        tokens = model.generate(**asked.tensors(), max_new_tokens=MORE, do_sample=False)
        # prompt and reply in one forward: rows of the prompt see all, rows after it what was kept
        logits = model(tokens, use_cache=False).logits
    assert torch.equal(logits[0, len(asked[0]) - 1 : -1].argmax(-1), tokens[0, len(asked[0]) :])


def test_everything_kept_changes_nothing_to_the_bit():
    model: Any = families.make("llama")
    asked, later = prompts(), continuation()
    kept, _ = continued(model, Streaming(1.0), asked, later, DynamicCache(config=model.config))
    inputs = asked.tensors()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        cache = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True).past_key_values
        place = torch.tensor(asked.lengths)[:, None] + torch.arange(MORE)
        whole = torch.cat([mask, torch.ones_like(later)], 1)
        plain = model(input_ids=later, attention_mask=whole, position_ids=place, past_key_values=cache).logits
    assert torch.equal(kept, plain)


def test_the_memory_of_a_cache_falls_by_the_share():
    model: Any = families.make("llama")
    asked = Prompts.from_ids([torch.randint(5, 60, (400,), generator=torch.Generator().manual_seed(3)).tolist()])
    sizes = {}
    for share in (1.0, 0.5, 0.1):
        cache: Any = EvictingCache(model) if share < 1 else DynamicCache(config=model.config)
        with selecting(model, SnapKV(share), asked, cache if share < 1 else None):
            model.generate(**asked.tensors(), max_new_tokens=2, do_sample=False, past_key_values=cache)
        sizes[share] = nbytes(cache)
    for share in (0.5, 0.1):
        # one byte for each kv head and key says where they were
        assert sizes[share] / sizes[1.0] == pytest.approx(share, abs=0.02)


@torch.no_grad()
def test_the_cache_of_streaming_heads_does_not_grow(monkeypatch):
    # the package has the function under this name
    monkeypatch.setattr(sys.modules["interp.analyses.kv.selecting"], "EVICTION_INTERVAL", 4)
    model: Any = families.make("llama")
    asked, new = prompts(), 40
    table = scores(model)
    for selector in (
        Streaming(0.3, n_sink=2, n_recent=3),
        DuoAttention.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3),
    ):
        inputs = {**asked.tensors(), "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with selecting(model, selector, asked):
            hidden = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        cache: Any = EvictingCache(model)
        with selecting(model, selector, asked, cache) as state:
            compact = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, past_key_values=cache)
        assert torch.equal(hidden.sequences, compact.sequences)
        assert torch.equal(torch.stack(hidden.logits), torch.stack(compact.logits))
        for layer, held in enumerate(cache.layers):
            window = state.memory[0, layer].window
            most = (selector.n_sink + window).clamp(max=1000)
            in_rows = held.kept.sum(-1)
            # full heads have every key; the others their window, and what came since the last time
            whole = most == 1000
            lengths = torch.tensor(asked.lengths)[:, None].expand_as(most)
            dense = cache.get_seq_length() - held.kept.shape[-1]
            assert dense < 4
            assert torch.equal(in_rows[whole], (lengths + new - 1 - dense)[whole])
            assert bool((in_rows <= most)[~whole].all())
            assert bool((~whole).any())


@torch.no_grad()
def test_several_rows_of_a_prompt_choose_alike_and_beams_are_refused():
    model: Any = families.make("llama")
    asked = prompts()
    inputs = {**asked.tensors(), "max_new_tokens": 4, "num_return_sequences": 2}
    made = {}
    for name in ("hidden", "compact"):
        cache: Any = EvictingCache(model) if name == "compact" else None
        torch.manual_seed(3)
        with selecting(model, SnapKV(0.4, n_sink=2, n_recent=3, window=4), asked, cache):
            made[name] = model.generate(**inputs, do_sample=True, past_key_values=cache)
    assert torch.equal(made["hidden"], made["compact"])
    with (
        selecting(model, Streaming(0.4), asked, cache := EvictingCache(model)),
        pytest.raises(UsageError, match="beams"),
    ):
        model.generate(**inputs, num_beams=2, do_sample=False, past_key_values=cache)


def test_a_compact_cache_is_used_once_and_not_cropped():
    model: Any = families.make("llama")
    cache: Any = EvictingCache(model)
    asked = prompts(1)
    with selecting(model, Streaming(0.5), asked, cache), torch.no_grad():
        model(**asked.tensors(), past_key_values=cache)
    with pytest.raises(UsageError, match="cannot be cropped"):
        cache.layers[0].crop(-1)
    with pytest.raises(UsageError, match="of the call before, and no more"):
        cache.layers[0].evict(cache.layers[0].kept[..., :-1])


@torch.no_grad()
@pytest.mark.parametrize("later", ["all", "none", "others", "a longer prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_keys_that_were_evicted_do_not_return(family, later):
    model: Any = families.make(family)
    asked, new = prompts(1), 5
    cache: Any = EvictingCache(model)
    model(**asked.tensors(), past_key_values=cache)
    held = cache.layers[0]
    whole_keys, whole_values = held.keys.clone(), held.values.clone()
    n, groups = whole_keys.shape[2], whole_keys.shape[1]
    draw = torch.Generator().manual_seed(1)
    before = torch.rand(1, groups, n, generator=draw) < 0.6
    held.evict(before)
    more = torch.randn(2, 1, groups, new, whole_keys.shape[3], generator=draw)
    held.hiding = Hiding()
    keys, values = held.update(more[0], more[1])
    for whole, part, found in ((whole_keys, more[0], keys), (whole_values, more[1], values)):
        assert torch.equal(found[:, :, :n], whole * before[..., None])
        assert torch.equal(found[:, :, n:], part)
    width = n if later == "others" else n + new
    kept = {
        "all": torch.ones(1, groups, width, dtype=torch.bool),
        "none": torch.zeros(1, groups, width, dtype=torch.bool),
        "others": ~before,
        "a longer prompt": torch.rand(1, groups, width, generator=draw) < 0.5,
    }[later]
    held.evict(kept)
    # new keys that `kept` does not reach stay
    here = torch.cat([before, torch.ones(1, groups, new, dtype=torch.bool)], -1)
    stored = torch.nn.functional.pad(kept, (0, n + new - width), value=True) & here
    assert int(held.kept.sum()) == int(stored[..., :width].sum())
    nothing = more[0][:, :, :0]
    keys, values = held.update(nothing, nothing)
    for whole, part, found in ((whole_keys, more[0], keys), (whole_values, more[1], values)):
        assert torch.equal(found, torch.cat([whole, part], 2) * stored[..., None])
