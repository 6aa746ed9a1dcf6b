"""Positions of a batch whose padding lies anywhere, with and without a cache: each row is read as if it were alone."""

import pytest
import torch
from capture_oracle import KEYS, ROWS, STREAMS, prompts
from transformers import DynamicCache

from interp.analyses import kv, steer
from interp.analyses.kv.selecting import selecting
from interp.errors import ModelError, SpanError
from interp.hooks.edit.ablation import ablate
from interp.hooks.edit.edit import steering
from interp.hooks.edit.evicting_cache import EvictingCache
from interp.hooks.edit.streaming_mix import streaming_mix
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run

# windows count columns in transformers, so that padding between tokens changes what such a layer sees
FAMILIES = ["llama", "gpt2"]
LENGTHS = (33, 50)
ITEMS = [*ROWS, *KEYS, *STREAMS, keep.rows(logits=True)]
# the number of tokens of each row in each forward pass, and the side on which they are padded
LAYOUTS: dict[str, list[tuple[tuple[int, ...], str]]] = {
    "left": [((33, 50), "left")],
    "right": [((33, 50), "right")],
    "more padding than needed": [((33, 50), "both")],
    "a prefix for all, then the rest": [((10, 10), "left"), ((23, 40), "left")],
    "three parts": [((5, 9), "left"), ((20, 3), "right"), ((8, 38), "left")],
    "right, then one by one": [((31, 48), "right"), ((1, 1), "left"), ((1, 1), "left")],
    "one row has ended": [((33, 40), "right"), ((0, 6), "left"), ((0, 4), "both")],
    "one row begins late": [((0, 20), "left"), ((33, 30), "left")],
}
LATER = [name for name, steps in LAYOUTS.items() if len(steps) > 1]


class Feeder:
    """Feeds the prompts of a batch to a model in steps, and keeps the logits of each token."""

    def __init__(self, model, batch, name, cache=None):
        self.model, self.batch, self.steps = model, batch, list(LAYOUTS[name])
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.mask = torch.zeros(len(batch), 0, dtype=torch.int64)
        self.logits = [[] for _ in batch]

    def step(self):
        counts, side = self.steps.pop(0)
        width = max(counts) + (3 if side == "both" else 0)
        ids, live = torch.zeros(2, len(counts), width, dtype=torch.int64)
        for b, count in enumerate(counts):
            start = {"left": width - count, "right": 0, "both": (width - count) // 2}[side]
            done = int(self.mask[b].sum())
            ids[b, start : start + count] = torch.tensor(self.batch[b].ids[done : done + count])
            live[b, start : start + count] = 1
        self.mask = torch.cat([self.mask, live], 1)
        position = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        with torch.no_grad():
            out = self.model(
                ids, attention_mask=self.mask, position_ids=position, past_key_values=self.cache, use_cache=True
            )
        for b, row in enumerate(self.logits):
            row.append(out.logits[b, live[b].bool()])

    def run(self):
        while self.steps:
            self.step()
        return [torch.cat(row) for row in self.logits]

    def done(self):
        return self.mask.sum(1).tolist()


@pytest.mark.parametrize("opened", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:the cache already holds")
def test_every_reduction_is_that_of_the_row_alone(tiny_model, name, layout, opened):
    model, batch = tiny_model(name), prompts(LENGTHS)
    feeder = Feeder(model, batch, layout)
    if opened >= len(feeder.steps):
        pytest.skip("nothing is left to read")
    for _ in range(opened):
        feeder.step()
    starts = feeder.done()
    with capture(model, ITEMS, batch) as together, capture(model, ITEMS, batch, queries=slice(20, None)) as some:
        feeder.run()
    assert together.lengths == LENGTHS
    for b, start in enumerate(starts):
        one = batch[b : b + 1]
        for cap, begin in ((together, start), (some, max(start, 20))):
            n = len(one[0]) - begin
            assert cap.queries[b].tolist() == [*range(begin, begin + n), *[-1] * (cap.queries.shape[1] - n)]
            with capture(model, ITEMS, one, queries=slice(begin, None)) as alone:
                run(model, one)
            for item in ITEMS if n else []:
                x, y = cap[item], alone[item]
                for part, whole in zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]:
                    cut = part[b][tuple(slice(0, size) for size in whole.shape[1:])]
                    torch.testing.assert_close(
                        cut, whole[0], atol=1e-4, rtol=1e-4, equal_nan=True, msg=lambda m, i=item: f"{i}: {m}"
                    )


EDITS = {
    "Boost": lambda m, p: steering(m, steer.Boost("mark", 5.0), p),
    "Boost of positions": lambda m, p: steering(m, steer.Boost((3, 8), 5.0)),
    "Pasta": lambda m, p: steering(m, steer.Pasta("mark", alpha=0.1), p),
    "ZeroTuning": lambda m, p: steering(m, steer.ZeroTuning(3.0), p),
    "KeyScale": lambda m, p: steering(m, steer.KeyScale(1.5), p),
    "Gate": lambda m, p: steering(m, steer.Gate(0.5), p),
    "first": lambda m, p: ablate(m, "L0H1, L1H2", "first"),
    "uniform": lambda m, p: ablate(m, "L0H1, L1H2", "uniform"),
    "mean": lambda m, p: ablate(m, "L0H1, L1H2", "mean", reference=prompts((9,), seed=4)),
    "resample": lambda m, p: ablate(m, "L0H1, L1H2", "resample", reference=prompts((60,), seed=4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_that_of_the_row_alone(tiny_model, edit, layout):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    with EDITS[edit](model, batch):
        found = Feeder(model, batch, layout).run()
    for b, logits in enumerate(found):
        one = batch[b : b + 1]
        with EDITS[edit](model, one):
            alone = run(model, one).logits[0]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
        assert (alone - run(model, one).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("evicts", [False, True])
@pytest.mark.parametrize("selector", [kv.Streaming, kv.SnapKV, kv.RazorAttention])
@pytest.mark.parametrize("layout", ["right, then one by one", "a prefix for all, then the rest", "one row has ended"])
def test_selectors_keep_the_keys_of_the_row_alone(tiny_model, selector, layout, evicts):
    model, whole = tiny_model("llama"), prompts(LENGTHS)
    # the prompts that are selected from end with the first step
    counts = LAYOUTS[layout][0][0]
    batch = prompts(LENGTHS)
    batch = type(batch).from_ids([prompt.ids[:n] for prompt, n in zip(batch, counts, strict=True)])

    def read(part, rows, name):
        cache = EvictingCache(model) if evicts else None
        made = selector(0.5, n_sink=1, n_recent=3)
        feeder = Feeder(model, rows, name, cache)
        with selecting(model, made, part, cache):
            return feeder.run()

    together = read(batch, whole, layout)
    for b, n in enumerate(counts):
        LAYOUTS["alone"] = [((step[0][b],), "left") for step in LAYOUTS[layout] if step[0][b]]
        alone = read(batch[b : b + 1], whole[b : b + 1], "alone")[0]
        del LAYOUTS["alone"]
        torch.testing.assert_close(together[b][n:], alone[n:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_four_axes_shows_padding_where_a_token_does_not_see_itself(tiny_model, additive):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    inputs = batch.tensors()
    live = inputs["attention_mask"].bool()
    mask = torch.ones(50, 50, dtype=torch.bool).tril() & live[:, None, None] & live[:, None, :, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    position = (live.cumsum(-1) - 1).clamp(min=0)
    edit = steer.Boost("mark", 5.0)
    with torch.no_grad(), steering(model, edit, batch), capture(model, [keep.mass("mark"), keep.lse()], batch) as cap:
        logits = model(inputs["input_ids"], attention_mask=mask, position_ids=position).logits
    assert cap.lengths == LENGTHS
    for b, n in enumerate(LENGTHS):
        one = batch[b : b + 1]
        with steering(model, edit, one), capture(model, [keep.mass("mark"), keep.lse()], one) as alone:
            torch.testing.assert_close(logits[b, -n:], run(model, one).logits[0], atol=1e-4, rtol=1e-4)
        for item in (keep.mass("mark"), keep.lse()):
            torch.testing.assert_close(cap[item][b, :, :, :n], alone[item][0], atol=1e-4, rtol=1e-4)


def cached(model, ids, mask=None):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


def second_turn(model, batch):
    """The prompts are a second turn, and the cache holds another text before them."""
    cache = cached(model, torch.full((2, 12), 7))
    inputs = batch.tensors()
    mask = torch.cat([torch.ones(2, 12, dtype=torch.int64), inputs["attention_mask"]], 1)
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "past_key_values": cache}


def virtual_keys(model, batch):
    """Prefix tuning: the cache begins with learned keys that are no tokens."""
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16), layer)
    inputs = batch.tensors()
    mask = torch.cat([torch.ones(2, 5, dtype=torch.int64), inputs["attention_mask"]], 1)
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "past_key_values": cache}


def no_mask_for_a_padded_cache(model, batch):
    inputs = batch.tensors()
    return {"input_ids": torch.full((2, 1), 9), "past_key_values": cached(model, *inputs.values())}


def longer_than_the_prompts(model, batch):
    ids = batch.tensors()["input_ids"]
    more = torch.full((2, 60), 9)
    return {"input_ids": more, "past_key_values": cached(model, ids[:, 17:20])}


UNFIT = [second_turn, virtual_keys, no_mask_for_a_padded_cache, longer_than_the_prompts]


@pytest.mark.parametrize("context", [capture, steering])
@pytest.mark.parametrize("make", UNFIT)
def test_prompts_that_are_not_the_text_of_the_cache_are_refused(tiny_model, make, context):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    arguments = make(model, batch)
    what = keep.mass("mark") if context is capture else steer.Boost("mark", 2.0)
    refused = pytest.raises(SpanError, match=r"tokens after \[\d+, \d+\] in its cache, but the given prompts have")
    with torch.no_grad(), refused, context(model, what, batch):
        model(**arguments)


def test_a_context_may_open_after_the_prompt(tiny_model):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    edit = steer.Boost("mark", 5.0)
    inputs = batch.tensors()
    cache = cached(model, *inputs.values())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with torch.no_grad(), steering(model, edit, batch), capture(model, keep.mass("mark"), batch, queries="generated"):
        model(torch.full((2, 1), 9), attention_mask=mask, past_key_values=cache)
    cache = cached(model, *inputs.values())
    told = pytest.warns(UserWarning, match="already holds 33, 50 tokens")
    with torch.no_grad(), told, capture(model, keep.entropy()) as cap:
        model(torch.full((2, 1), 9), attention_mask=mask, past_key_values=cache)
    assert cap.queries.tolist() == [[33], [50]]


def test_a_mask_that_leaves_out_the_cache_is_refused(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 20))
    cache = cached(model, batch.tensors()["input_ids"])
    refused = pytest.raises(ModelError, match="has 1 columns, but the batch and its cache have 21; give one column")
    with torch.no_grad(), refused, capture(model, keep.entropy()):
        model(torch.full((2, 1), 9), attention_mask=torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)


def test_keys_of_a_cache_that_a_mask_of_four_axes_hides_are_unknown(tiny_model):
    model, batch = tiny_model("llama"), prompts((20,))
    mask = torch.ones(1, 1, 1, 21, dtype=torch.bool)
    mask[..., 3] = False
    arguments = {"input_ids": torch.full((1, 1), 9), "attention_mask": mask}
    cache = cached(model, batch.tensors()["input_ids"])
    with torch.no_grad(), ablate(model, "L0H1", "uniform"):
        # needs no positions
        model(**arguments, past_key_values=cache)
    cache = cached(model, batch.tensors()["input_ids"])
    refused = pytest.raises(ModelError, match="hides keys of a cache, so interp cannot tell which of them are padding")
    with torch.no_grad(), refused, capture(model, keep.entropy()):
        model(**arguments, past_key_values=cache)


@pytest.mark.parametrize("context", [lambda m, p: capture(m, keep.blocks(8), p), lambda m, p: mix(m)])
def test_blocks_and_streaming_refuse_padding_between_tokens(tiny_model, context):
    model, batch = tiny_model("llama"), prompts(LENGTHS)
    with context(model, batch):
        Feeder(model, batch, "right").run()
    feeder = Feeder(model, batch, "a prefix for all, then the rest")
    with pytest.raises(ModelError, match="padding between two tokens of a row"), context(model, batch):
        feeder.run()


def mix(model):
    return streaming_mix(model, torch.full((2, 2), 0.5), sink=2, recent=4)
