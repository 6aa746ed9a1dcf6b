"""Every steering method against its paper's rule on probabilities, and what must hold of any edit."""

import itertools
import json
import warnings

import pytest
import torch
from edit_cases import IDLE, METHODS, NO_PAPER, SLOTS, VECTORS
from steering_oracle import (
    act,
    batch,
    key_scale,
    literal,
    logits,
    middle,
    pasta,
    real,
    redistribute,
    sinks,
    spotlight,
    weighed,
    zero,
)

from interp import steer
from interp.analyses import registry
from interp.errors import HeadError, SpanError, UsageError
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs

FAMILIES = ["llama", "qwen2", "gpt2", "gemma2", "phi3"]


def rules_of(name, model, prompts):
    """What `literal` takes for a method: its rule on probabilities, on keys or on outputs."""
    width = max(prompts.lengths)
    position = torch.arange(width)[None] - (width - torch.tensor(prompts.lengths))[:, None]
    prompt, first = position >= 0, position == 0

    def span(word):
        mask = prompts.span_mask(word, width)
        return mask.gather(1, position.clamp(min=0)) & prompt

    mark, other = span("mark"), span("other")
    edit = METHODS[name]
    layout = HeadLayout.of(model)
    chosen = edit.chosen(layout).mask(layout)
    limit = torch.full((len(prompts),), 0.08)
    last = torch.tensor(prompts.lengths)[:, None] - 1
    seen = {"sinks": 0, "moved": []}

    def changed(layer, pattern):
        if name == "pasta":
            return pasta(pattern, mark, prompt, 0.05)
        if name == "pasta, spans":
            return pasta(pattern, mark | other | first, prompt, 0.1)
        if name == "pasta, include":
            return weighed(pattern, torch.where(mark, 10.0, 1.0)[:, None, None])
        if name == "zerotuning":
            return zero(pattern, first, 3.0)
        if name == "boost":
            return weighed(pattern, torch.where(mark, 5.0, 1.0)[:, None, None])
        if name == "spotlight":
            return spotlight(pattern, mark, 0.3)
        if name == "middle":
            late = (position >= 12) & prompt
            return middle(pattern, torch.stack([mark, other], 1), late, torch.tensor([0.02, 0.05]), 0.05, 5.0)
        if name == "middle, clipped":
            late = (position >= 12) & prompt
            return middle(pattern, torch.stack([other, mark], 1), late, SLOTS[layer][:, None], 0.01, 0.7)
        if name == "redistribute, named":
            drained = (first | (position == 5) | (position == 6))[:, None].expand(-1, layout.heads, -1)
            rows, marked = (position >= 12) & prompt, mark | other
        else:
            found, received = sinks(pattern, prompt, prompt, first, limit)
            near = (received - 0.08).abs()[(prompt & ~first)[:, None].expand_as(received)].min()
            assert near > 1e-5, "a column too near to the threshold to compare"
            seen["sinks"] += int(found.sum())
            if name == "act":
                return act(pattern, prompt, prompt, first, limit, 0.4)[0]
            # the last token of the mark is that of each prompt
            rows, marked = position > torch.where(mark, position, -1).amax(1, keepdim=True), mark
            drained = found | first[:, None]
        new, near, share = redistribute(pattern, drained, marked, rows, 0.4, 0.1, 0.6)
        assert near > 1e-6, "a row too near to a limit to compare"
        seen["moved"].append(share)
        return new

    def on(layer, new, old):
        return torch.where(chosen[layer][:, None, None], new, old)

    def scaled(layer, key):
        return on(layer, key_scale(key, first, 1.4), key)

    def moved(layer, z):
        scale, rows = (1.0, position >= last) if name == "offset" else (0.5, prompt)
        vectors = torch.stack([VECTORS.get(f"L{layer}H{head}", torch.zeros(16)) for head in range(layout.heads)])
        return on(layer, z + rows[:, None, :, None] * scale * vectors[:, None], z)

    if name.startswith("offset"):
        return {"outputs": moved}, seen
    if name == "key scale":
        return {"keys": scaled}, seen
    return {"rule": lambda layer, pattern: on(layer, changed(layer, pattern), pattern)}, seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in NO_PAPER])
def test_equals_the_literal_rule(tiny_model, family, name):
    model, prompts = tiny_model(family, attn_implementation="eager"), batch()
    rules, seen = rules_of(name, model, prompts)
    with literal(model, **rules):
        expected = logits(model, prompts)
    with steering(model, METHODS[name], prompts):
        found = logits(model, prompts)
    plain = logits(model, prompts)
    assert name not in ("act", "redistribute") or seen["sinks"] > 0
    assert not seen["moved"] or 0 < sum(seen["moved"]) < len(seen["moved"]), "all rows or none were changed"
    assert (real(found, prompts) - real(plain, prompts)).abs().max() > 1e-4
    torch.testing.assert_close(real(found, prompts), real(expected, prompts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_batch_is_single_and_leaves_nothing(tiny_model, name):
    model, prompts = tiny_model("llama"), batch()
    before = logits(model, prompts)
    with steering(model, METHODS[name], prompts):
        together = logits(model, prompts)
    alone = []
    for i in range(len(prompts)):
        with steering(model, METHODS[name], prompts[i : i + 1]):
            alone.append(logits(model, prompts[i : i + 1])[0])
    torch.testing.assert_close(real(together, prompts), torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, prompts), before)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", METHODS)
def test_cached_generation_is_full_recompute(tiny_model, name, cache):
    model, prompts = tiny_model("llama"), batch()
    steps = 5
    settings = {"max_new_tokens": steps, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    settings |= {"cache_implementation": cache, "pad_token_id": 0, "eos_token_id": None}
    with steering(model, METHODS[name], prompts):
        out = model.generate(**model_inputs(model, prompts), **settings)
        for step in range(steps):
            ids = out.sequences[:, : max(prompts.lengths) + step]
            mask = torch.nn.functional.pad(prompts.tensors()["attention_mask"], (0, step), value=1)
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1]
            torch.testing.assert_close(out.scores[step], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("edit", IDLE, ids=repr)
def test_edits_that_change_nothing_are_equal_to_the_bit(tiny_model, edit):
    model, prompts = tiny_model("qwen2"), batch()
    before = logits(model, prompts)
    with steering(model, edit, prompts):
        assert torch.equal(logits(model, prompts), before)


def test_a_range_past_a_prompts_end_changes_only_longer_prompts(tiny_model):
    model, prompts = tiny_model("llama"), batch()
    before = logits(model, prompts)
    with steering(model, steer.Pasta((18, 20), 0.05), prompts):
        after = logits(model, prompts)
    torch.testing.assert_close(after[0, -17:], before[0, -17:], atol=1e-5, rtol=1e-5)
    assert (after[1] - before[1]).abs().max() > 1e-4
    with steering(model, steer.Pasta((100, 110), 0.05), prompts):
        assert torch.equal(logits(model, prompts), before)


def test_beams_and_samples_follow_their_prompts(tiny_model):
    model, prompts = tiny_model("llama"), batch()
    settings = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "num_return_sequences": 2}
    for more, name in itertools.product(({"num_beams": 2}, {"do_sample": True}), ("sum", "all of them")):
        with steering(model, METHODS[name], prompts):
            out = model.generate(**model_inputs(model, prompts), **settings, **more)
        assert out.shape[0] == 4


def test_heads_of_one_group_are_steered_apart(tiny_model):
    model, prompts = tiny_model("llama"), batch()
    from interp.hooks.read.capture import capture
    from interp.hooks.read.keep import mass

    with capture(model, mass("mark"), prompts) as plain:
        logits(model, prompts)
    with (
        steering(model, steer.Pasta("mark", 0.05, heads="L0H1"), prompts),
        capture(model, mass("mark"), prompts) as cap,
    ):
        logits(model, prompts)
    moved = (cap[mass("mark")] - plain[mass("mark")]).nan_to_num().abs().amax((0, 3, 4))[0]
    assert moved[1] > 1e-3
    assert moved[[0, 2, 3]].max() == 0


def test_steering_is_read_inside_of_a_capture(tiny_model):
    model, prompts = tiny_model("llama"), batch((20,))
    from interp.hooks.read.capture import capture
    from interp.hooks.read.keep import mass

    edit = steer.SpotLight("mark", 0.5)
    with steering(model, edit, prompts), capture(model, mass("mark"), prompts, queries=slice(8, None)) as cap:
        logits(model, prompts)
    assert (cap[mass("mark")] >= 0.5 - 1e-4).all()


def test_a_span_outside_of_the_window_is_warned_of(tiny_model):
    model = tiny_model("mistral")
    window = model.config.sliding_window
    prompts = Prompts.from_ids([list(range(3, 3 + 2 * window))], spans=[{"mark": (2, 5)}])
    far, near = steer.Pasta("mark", 0.05), steer.Pasta((2 * window - 4, 2 * window - 1), 0.05)
    warned = pytest.warns(UserWarning, match=f"outside of the window of {window} keys")
    with warned, steering(model, far, prompts):
        logits(model, prompts)
    with warnings.catch_warnings(), steering(model, near, prompts):
        warnings.simplefilter("error")
        logits(model, prompts)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(
    "name",
    [
        "pasta",
        "pasta, spans",
        "boost",
        "zerotuning",
        "spotlight",
        "key scale",
        "redistribute",
        "redistribute, named",
        "middle",
        "offset",
    ],
)
def test_windows_and_chunks_are_full_recompute(tiny_model, family, name):
    model = tiny_model(family)
    prompts = batch((44, 50))
    steps, edit = 3, METHODS[name]
    settings = {"max_new_tokens": steps, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with warnings.catch_warnings(), steering(model, edit, prompts):
        warnings.simplefilter("ignore")
        out = model.generate(**model_inputs(model, prompts), **settings, pad_token_id=0, eos_token_id=None)
        ids = out.sequences[:, : max(prompts.lengths) + steps - 1]
        mask = torch.nn.functional.pad(prompts.tensors()["attention_mask"], (0, steps - 1), value=1)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1]
    torch.testing.assert_close(out.scores[-1], whole, atol=1e-4, rtol=1e-4)


def test_learned_sinks_are_part_of_what_is_left(tiny_model):
    from interp.hooks.read.capture import capture
    from interp.hooks.read.keep import mass

    model, prompts = tiny_model("gpt_oss"), batch((14,))
    with steering(model, steer.SpotLight("mark", 0.5), prompts), capture(model, mass("mark"), prompts) as cap:
        logits(model, prompts)
    assert (cap[mass("mark")][0, :, :, 8:] >= 0.5 - 1e-4).all()


def test_replaced_edits_keep_their_spans():
    from dataclasses import replace

    for spans in ([3, 5], (3, 5), "mark", ["mark", (2, 4), 9]):
        edit = steer.Pasta(spans)
        assert replace(edit, alpha=0.2).spans == edit.spans


def test_edits_print_hash_and_save(tmp_path):
    edits = METHODS["sum"] + steer.Boost([(3, 5), 9], 2.0) + steer.Boost([3, 5], 2.0)
    assert steer.load_edits(edits.save(tmp_path / "edits.json")) == edits
    assert hash(edits) == hash(Edits(edits.edits))
    assert "Pasta(" in repr(edits)
    assert "alpha=0.05" in repr(edits)
    for edit in METHODS.values():
        again = steer.load_edits((Edits() + edit).save(tmp_path / "edits.json"))
        assert again == Edits() + edit
        assert hash(again) == hash(Edits() + edit)
    assert len(repr(METHODS["offset"])) < 120
    (tmp_path / "bad.json").write_text('[{"edit": "Nothing"}]')
    with pytest.raises(UsageError, match="unknown edit 'Nothing'; install or import"):
        steer.load_edits(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('[{"edit": "Boost", "much": 1}]')
    with pytest.raises(UsageError, match="Boost cannot be made from"):
        steer.load_edits(tmp_path / "bad.json")
    for text in ("{", "{}", "[1]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match="no saved edits"):
            steer.load_edits(tmp_path / "bad.json")


def test_every_declared_edit_is_here_and_can_be_made_from_plain_settings():
    parts = [part for row in METHODS.values() for part in Edits() + row]
    assert {type(part) for part in parts} == {entry.thing for entry in registry.entries("edit")}
    for part in parts:
        settings = json.loads(json.dumps(part.to_dict()))
        name, heads = settings.pop("edit"), settings.pop("heads")
        assert steer.make_edit(name, settings, heads=heads) == part


BAD = [
    (lambda: steer.Pasta("mark", 0.0), "alpha=0.0 is not a positive number"),
    (lambda: steer.Pasta("mark", mode="only"), "unknown mode 'only'"),
    (lambda: steer.ZeroTuning(-1.0), "gamma=-1.0 is not a positive number"),
    (lambda: steer.Act(-0.1), r"beta=-0.1 is not in \[0, 1\]"),
    (lambda: steer.Act(skip_first=-1), "skip_first=-1 is not a number of layers"),
    (lambda: steer.Act(skip_last=1.5), "skip_last=1.5 is not a number of layers"),
    (lambda: steer.Act(threshold="much"), "cannot be read; give a number"),
    (lambda: steer.Boost("mark", 0.0), "factor=0.0 is not a positive number"),
    (lambda: steer.SpotLight("mark", 1.0), "target=1.0 is not in"),
    (lambda: steer.KeyScale(0.0), "factor=0.0 is not a positive number"),
    (lambda: steer.Redistribute("mark", 1.5), r"keep=1.5 is not in \[0, 1\]"),
    (lambda: steer.Redistribute("mark", least=2), r"least=2 is not in \[0, 1\]"),
    (lambda: steer.Redistribute("mark", threshold="n"), "cannot be read; give a number"),
    (lambda: steer.Redistribute("mark", sinks=[]), "no span was given"),
    (lambda: steer.FoundInTheMiddle(["a", "b"], [0.1]), r"bias of shape \[1\] does not fit 2 documents"),
    (lambda: steer.FoundInTheMiddle("a", [float("nan")]), "give finite numbers"),
    (lambda: steer.FoundInTheMiddle("a", "much"), "much holds no bias"),
    (lambda: steer.FoundInTheMiddle("a", {}), "not a table of numbers"),
    (lambda: steer.FoundInTheMiddle("a", [0.1], temperature=0), "temperature=0 is not a positive number"),
    (lambda: steer.FoundInTheMiddle("a", [0.1], clip=-1), r"clip=-1 is not in \[0, 100\)"),
    (lambda: steer.Offset({}), "vectors is empty"),
    (lambda: steer.Offset({"L0H0": [[1.0]]}), "other things than lists of finite numbers"),
    (lambda: steer.Offset(3), "not a table of numbers by head"),
    (lambda: steer.Offset({"head": [1.0]}), "does not name a head"),
    (lambda: steer.Offset("nowhere.safetensors"), "nowhere.safetensors holds no vectors"),
    (lambda: steer.Offset(VECTORS, at="first"), "unknown position at='first'"),
    (lambda: steer.Offset(VECTORS, scale=float("inf")), "scale=inf is not a finite number"),
    (lambda: steer.Gate(float("nan")), "factor=nan is not a finite number"),
    (lambda: steer.Temperature(0.0), "temperature=0.0 is not a positive number"),
]


@pytest.mark.parametrize(("make", "text"), BAD)
def test_bad_settings(make, text):
    with pytest.raises((UsageError, SpanError, HeadError), match=text):
        make()
