"""Rows of a batch that end at different steps of generate(): each is read and edited as if it had run alone."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from capture_oracle import KEYS, ROWS, STREAMS, prompts
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import interp
from interp.analyses import kv, steer
from interp.analyses.kv.selecting import selecting
from interp.hooks.edit.ablation import ablate
from interp.hooks.edit.edit import steering
from interp.hooks.read import keep
from interp.hooks.read.capture import capture, run
from interp.hooks.read.visibility import Visibility, keys_from
from interp.hooks.seam import tapping
from interp.testing import families

FAMILIES = ["llama", "gemma3", "gpt2", "gpt_oss"]
MIXIN: Any = GenerationMixin
N_NEW = 7
"""New tokens of the row that ends last."""
ITEMS = [*ROWS, *KEYS, *STREAMS, keep.blocks(16), keep.rows(logits=True)]


class EndsAt(StoppingCriteria):
    """Ends each row of a batch when it has a number of new tokens."""

    def __init__(self, width, counts):
        self.width, self.counts = width, torch.tensor(counts)

    def __call__(self, input_ids, scores, **kwargs):
        return self.width + self.counts <= input_ids.shape[1]


def by_criterion(model, batch, counts, **more):
    """Tokens [b n] of generate(), where row b ends after counts[b] new tokens and other tokens are fed from then on."""
    ends = StoppingCriteriaList([EndsAt(max(batch.lengths), counts)])
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**batch.tensors(), **settings, **more, stopping_criteria=ends)


class WritesEnd(torch.nn.Module):
    """Makes an end token the likeliest of a row at its last step."""

    def __init__(self, width, counts, end):
        super().__init__()
        self.width, self.counts, self.end = width, torch.tensor(counts), end

    def __call__(self, input_ids, scores):
        last = self.width + self.counts == input_ids.shape[1] + 1
        scores[:, self.end] = torch.where(last, 1e9, -1e9)
        return scores


def by_end_token(model, batch, counts, **more):
    """Tokens [b n] of generate(), where row b writes an end token as its token counts[b] and is padded from then on."""
    processors = [WritesEnd(max(batch.lengths), counts, 2), WritesEnd(max(batch.lengths), [99] * len(batch), 3)]
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": [2, 3], "pad_token_id": 0}
    return model.generate(**batch.tensors(), **settings, **more, logits_processor=processors)


WAYS = {
    "criterion": by_criterion,
    "end token": by_end_token,
    "static cache": lambda *a: by_end_token(*a, cache_implementation="static", disable_compile=True),
    "chunked prefill": lambda *a: by_end_token(*a, prefill_chunk_size=21),
    "sampled": lambda *a: by_criterion(*a, num_return_sequences=1),
}


def same(together, alone, b, what):
    for x, y in zip(together, alone, strict=True) if isinstance(together, tuple) else [(together, alone)]:
        part = x[b][tuple(slice(0, n) for n in y.shape[1:])]
        torch.testing.assert_close(part, y[0], atol=1e-4, rtol=1e-4, equal_nan=True, msg=lambda m: f"{what}: {m}")
        # nothing follows the end of a row
        rest = x[b].clone()
        rest[tuple(slice(0, n) for n in y.shape[1:])] = -1 if not x.is_floating_point() else torch.nan
        assert ((rest == -1) | (rest == 0) | (rest == -torch.inf) | rest.isnan()).all(), what


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_that_has_ended_is_read_as_if_it_were_alone(tiny_model, name, way):
    model, batch, counts = tiny_model(name), prompts((33, 50, 42)), [2, N_NEW, 4]
    with capture(model, ITEMS, batch) as together, capture(model, ITEMS, batch, queries="generated") as new:
        tokens = WAYS[way](model, batch, counts)
    assert tokens.shape[1] == 50 + N_NEW
    for b, count in enumerate(counts):
        one = batch[b : b + 1]
        with capture(model, ITEMS, one) as alone, capture(model, ITEMS, one, queries="generated") as new_alone:
            assert WAYS[way](model, one, [count]).shape[1] == len(one[0]) + count
        # the last token is written and not read
        assert together.lengths[b] == alone.lengths[0] == len(one[0]) + count - 1
        assert new.queries[b].tolist() == [*new_alone.queries[0].tolist(), *[-1] * (N_NEW - count)]
        for item in ITEMS:
            same(together[item], alone[item], b, item)
            same(new[item], new_alone[item], b, item)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("way", [by_criterion, by_end_token])
def test_tokens_of_generate_are_those_of_the_model_alone(tiny_model, name, way):
    model, batch, counts = tiny_model(name), prompts((33, 50)), [2, N_NEW]
    plain = way(model, batch, counts)
    with capture(model, [keep.entropy(), keep.columns()], batch):
        assert torch.equal(way(model, batch, counts), plain)
    # an edit computes the rows after their end as well
    with capture(model, keep.entropy(), batch), steering(model, steer.Boost("mark", 1 + 1e-7), batch):
        assert torch.equal(way(model, batch, counts), plain)


EDITS = {
    "Boost": lambda m, p: steering(m, steer.Boost("mark", 5.0), p),
    "Pasta on new keys": lambda m, p: steering(m, steer.Pasta("mark", alpha=0.1, scope="generated"), p),
    "KeyScale": lambda m, p: steering(m, steer.KeyScale(1.5), p),
    "first": lambda m, p: ablate(m, "L0H1, L1H2", "first"),
    "Streaming": lambda m, p: selecting(m, kv.Streaming(0.4, n_sink=1, n_recent=2), p),
    "SnapKV": lambda m, p: selecting(m, kv.SnapKV(0.4, n_sink=1, n_recent=2, window=4), p),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_a_batch_that_ends_row_by_row_are_those_of_each_row_alone(tiny_model, edit):
    model, batch, counts = tiny_model("llama"), prompts((33, 50, 42)), [2, N_NEW, 4]
    with EDITS[edit](model, batch), capture(model, keep.entropy(), batch) as together:
        tokens = by_criterion(model, batch, counts)
    for b, count in enumerate(counts):
        one = batch[b : b + 1]
        with EDITS[edit](model, one), capture(model, keep.entropy(), one) as alone:
            assert torch.equal(by_criterion(model, one, [count])[0], tokens[b, 50 - len(one[0]) : 50 + count])
        same(together[keep.entropy()], alone[keep.entropy()], b, edit)


def test_new_keys_of_a_row_that_has_ended_are_not_seen(tiny_model):
    model, batch, counts = tiny_model("llama"), prompts((20, 30)), [1, N_NEW]
    # the keys that a row has after its prompt
    after = keys_from([0, 0], [range(20, 40), range(30, 40)])
    sight = Visibility(after)
    with tapping(model, sight):
        by_end_token(model, batch, counts)
    assert sight.seen[0].sum(-1).unique().tolist() == [0]
    assert sight.seen[1].sum(-1).unique().tolist() == [N_NEW - 1]


def test_ends_are_forgotten_with_their_generate(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 30))
    longer = prompts((45, 60))
    # the outer tap keeps interp open between the runs
    with tapping(model, Visibility(lambda position: position[..., None])):
        by_end_token(model, batch, [1, 3])
        with capture(model, keep.entropy(), longer) as cap:
            run(model, longer)
        assert cap.lengths == longer.lengths
        stopped = pytest.raises(RuntimeError, match="enough")
        with capture(model, keep.entropy(), batch), stopped as kept:
            model.generate(**batch.tensors(), max_new_tokens=5, stopping_criteria=[Stops(30)])
        # the traceback holds the frames of generate(), and with them the ends
        assert kept.tb is not None
        with capture(model, keep.entropy(), batch) as cap:
            run(model, batch)
        assert cap.lengths == batch.lengths


class Stops(StoppingCriteria):
    """Ends the first row at once, and fails after three tokens."""

    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > self.width + 2:
            raise RuntimeError("enough")
        return torch.tensor([True, False])


def test_generate_is_as_it_was_when_all_contexts_have_closed(tiny_model):
    before = MIXIN._get_stopping_criteria
    one, two, batch = tiny_model("llama"), tiny_model("gpt2"), prompts((20, 30))
    with capture(one, keep.entropy(), batch):
        with capture(two, keep.entropy(), batch):
            pass
        assert MIXIN._get_stopping_criteria is not before
        # a model that is not read keeps its own criteria
        by_end_token(two, batch, [1, 3])
    assert MIXIN._get_stopping_criteria is before


def test_beams_are_read_as_they_run(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 30))
    with capture(model, keep.entropy(), batch) as cap:
        model.generate(**batch.tensors(), max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    assert cap.lengths == (23, 23, 33, 33)


def test_rows_that_end_in_the_loop_of_a_bridge_are_read_as_if_they_were_alone(tiny_model):
    model, batch = tiny_model("llama"), prompts((20, 20), seed=3)
    ids = batch.tensors()["input_ids"]
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "verbose": False, "return_type": "tokens"}
    free = model.generate(ids, max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False)[:, 20:].tolist()
    # a token that one row writes early, and the other later or never
    end = next(token for token in free[0][1:3] if token not in free[1][:3])
    counts = [row.index(end) + 1 if end in row else N_NEW for row in free]
    item = keep.entropy()
    with interp.bridge(model) as tl:
        with capture(tl, item, batch) as together:
            tl.generate(ids, stop_at_eos=True, eos_token_id=end, **settings)
        for b, count in enumerate(counts):
            with capture(tl, item, batch[b : b + 1]) as alone:
                tl.generate(ids[b : b + 1], stop_at_eos=True, eos_token_id=end, **settings)
            assert together.lengths[b] == alone.lengths[0] == 20 + count - 1
            same(together[item], alone[item], b, item)


def test_each_thread_has_the_ends_of_its_own_generate():
    model, batch, counts = families.make("llama"), prompts((33, 50)), ([2, N_NEW], [5, 1])
    item, at_once = keep.entropy(), threading.Barrier(2, timeout=60)

    def read(ends, processors=None):
        with capture(model, item, batch) as cap:
            by_criterion(model, batch, ends, logits_processor=processors)
        return cap.lengths, cap[item]

    def wait(input_ids, scores):
        # the threads take each step together, as long as both generate
        with contextlib.suppress(threading.BrokenBarrierError):
            at_once.wait()
        return scores

    expected = [read(each) for each in counts]
    assert expected[0][0] != expected[1][0]
    with ThreadPoolExecutor(2) as pool:

        def apart(ends):
            try:
                return read(ends, LogitsProcessorList([wait]))
            finally:
                at_once.abort()

        found = list(pool.map(apart, counts))
    for (lengths, entropy), (right, values) in zip(found, expected, strict=True):
        assert lengths == right
        torch.testing.assert_close(entropy, values, equal_nan=True)
