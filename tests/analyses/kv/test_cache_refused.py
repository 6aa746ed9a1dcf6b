"""Caches and models that a selector cannot work with are refused, and nothing is read from evicted places."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from kv_oracle import SELECTORS, continuation, prompts, scores
from transformers import DynamicCache, StaticCache

from interp.analyses.kv.kv_curve import kv_curve
from interp.analyses.kv.kv_tasks import KVTask
from interp.analyses.kv.layer_errors import layer_errors
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.errors import UsageError
from interp.hooks.edit.edit import steering
from interp.hooks.edit.evicting_cache import EvictingCache
from interp.testing import families

SELECTOR = SnapKV(0.4, n_sink=2, n_recent=3, window=4)


def read(model: Any, cache: Any, asked: Any, selector: Any = SELECTOR) -> Any:
    with selecting(model, selector, asked, cache) as state:
        model(**asked.tensors(), past_key_values=cache)
    return state


def go_on(model: Any, cache: Any, rows: int = 1) -> torch.Tensor:
    later = continuation()[:rows]
    return model(input_ids=later, past_key_values=cache).logits


def used_in_generate(model: Any, cache: Any) -> None:
    asked = prompts(1)
    ids = torch.cat([asked.tensors()["input_ids"], continuation()[:1, :1]], 1)
    model.generate(ids, max_new_tokens=2, past_key_values=cache)


def copied_inside(model: Any, cache: Any) -> None:
    fresh: Any = EvictingCache(model)
    asked = prompts(1)
    with selecting(model, SELECTOR, asked, fresh):
        model(**asked.tensors(), past_key_values=fresh)
        copy = deepcopy(fresh)
    go_on(model, copy)


def in_another_context(model: Any, cache: Any) -> None:
    with selecting(model, SELECTOR, prompts(1), cache):
        go_on(model, cache)


def in_a_steering_context(model: Any, cache: Any) -> None:
    with steering(model, SELECTOR, prompts(1)):
        go_on(model, cache)


AFTER = {
    "a forward pass": go_on,
    "a copy of the cache": lambda model, cache: go_on(model, deepcopy(cache)),
    "a copy made inside of the context": copied_inside,
    "generate": used_in_generate,
    "another context without its choices": in_another_context,
    "steering with the selector": in_a_steering_context,
}


@torch.no_grad()
@pytest.mark.parametrize("name", AFTER)
def test_a_cache_with_evicted_keys_is_refused_after_its_context(name):
    model: Any = families.make("llama")
    cache: Any = EvictingCache(model)
    read(model, cache, prompts(1))
    with pytest.raises(UsageError, match=r"EvictingCache has evicted keys.*noted="):
        AFTER[name](model, cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["streaming", "snapkv", "taskkv", "duo", "headkv"])
def test_a_context_with_the_choices_of_the_one_before_goes_on(name):
    model: Any = families.make("llama")
    selector, asked, later = SELECTORS[name](scores(model)), prompts(1), continuation()[:1]
    cache: Any = EvictingCache(model)
    state = read(model, cache, asked, selector)
    with selecting(model, selector, asked, cache, noted=state.memory):
        apart = model(input_ids=later, past_key_values=cache).logits
    whole: Any = EvictingCache(model)
    with selecting(model, selector, asked, whole):
        model(**asked.tensors(), past_key_values=whole)
        together = model(input_ids=later, past_key_values=whole).logits
    assert torch.equal(apart, together)


@torch.no_grad()
def test_a_cache_that_kept_everything_or_was_reset_is_an_ordinary_one():
    model: Any = families.make("llama")
    asked = prompts(1)
    cache: Any = EvictingCache(model)
    read(model, cache, asked)
    cache.reset()
    plain = model(**asked.tensors()).logits
    assert torch.equal(model(**asked.tensors(), past_key_values=cache).logits, plain)
    cache.layers[0].evict(torch.ones(1, 2, len(asked[0]), dtype=torch.bool))
    other = model(**asked.tensors(), use_cache=True).past_key_values
    torch.testing.assert_close(go_on(model, cache), go_on(model, other), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", "a list", "unused"])
def test_a_cache_that_cannot_evict_is_refused(kind):
    model: Any = families.make("llama")
    asked = prompts(1)
    if kind == "unused":
        with (
            pytest.raises(UsageError, match="does not use the EvictingCache"),
            selecting(model, SELECTOR, asked, EvictingCache(model)),
        ):
            model(**asked.tensors(), past_key_values=DynamicCache(config=model.config))
        return
    given: Any = {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=60),
        "a list": [],
    }[kind]
    with pytest.raises(UsageError, match="cannot evict keys"), selecting(model, SELECTOR, asked, given):
        pass
    assert torch.equal(model(**asked.tensors()).logits, families.make("llama")(**asked.tensors()).logits)


def steered(model: Any) -> None:
    with torch.no_grad(), steering(model, Streaming(0.4), prompts(1)):
        model(**prompts(1).tensors())


WINDOWS_ALONE = {
    "selecting": lambda model: selecting(model, SELECTOR, prompts(1)).__enter__(),
    "steering": steered,
    "a curve": lambda model: kv_curve(
        model, [KVTask.cut("made", prompts(1), [30], [[7]])], {"random": Streaming}, keep_ratios=(0.4,)
    ),
    "errors of layers": lambda model: layer_errors(model, prompts(1), SELECTOR, max_new_tokens=1),
    "a cache": EvictingCache,
}


@pytest.mark.parametrize("name", WINDOWS_ALONE)
def test_a_model_of_windows_alone_is_refused(name):
    with pytest.raises(UsageError, match="every layer of this model has a sliding window"):
        WINDOWS_ALONE[name](families.make("mistral"))
