"""ACT and Redistribute against their rules where rows see different numbers of keys, and the cost of finding sinks."""

import itertools

import pytest
import torch
from steering_oracle import batch, literal, logits, real

from interp import steer
from interp.analyses.steer import check
from interp.hooks.edit import edit_context
from interp.hooks.edit.edit import steering
from interp.hooks.model.heads import HeadLayout

SHORT, LONG = (17, 23), (44, 50)
# (family, lengths of the prompts, edit): rows see the whole prompt, a window, or a learned sink too
CASES = {
    "prompts of one length": ("llama", (20, 20), steer.Act(0.4, "2/n")),
    "prompts of two lengths": ("llama", (12, 60), steer.Act(0.4, "2/n")),
    "a window in every layer": ("mistral", LONG, steer.Act(0.4, "2/n")),
    "a window in some layers": ("gemma3", LONG, steer.Act(0.3, "2/n")),
    "learned sinks and a window": ("gpt_oss", LONG, steer.Act(0.4, "2/n")),
    "a window shorter than one of the prompts": ("mistral", (14, 60), steer.Act(0.4, "1.5/n")),
    "sinks that keep nothing": ("llama", SHORT, steer.Act(0.0, "2/n")),
    "sinks that keep nothing in a window": ("gemma3", LONG, steer.Act(0.0, "2/n")),
    "sinks that keep nothing next to learned ones": ("gpt_oss", LONG, steer.Act(0.0, "2/n")),
    "without the first layer": ("llama", SHORT, steer.Act(0.4, "2/n", skip_first=1)),
    "without the last layer": ("llama", SHORT, steer.Act(0.4, "2/n", skip_last=1)),
    "a share in place of 5/n": ("mistral", LONG, steer.Act(0.4, 0.05)),
    "redistribution in a window": ("mistral", LONG, steer.Redistribute((20, 40), 0.4, 0.1, 0.3, threshold="2/n")),
    "redistribution of all": ("llama", SHORT, steer.Redistribute("mark", 0.0, 0.05, 0.3, threshold="2/n")),
}


def rule_of(model, prompts, edit, seen):
    """The rule of the paper on probabilities, on what the rows of each prompt see."""
    width = max(prompts.lengths)
    position = torch.arange(width)[None] - (width - torch.tensor(prompts.lengths))[:, None]
    inside, first = position >= 0, position == 0
    layout = HeadLayout.of(model)
    of_sink = getattr(model.config, "model_type", "") == "gpt_oss"

    def rule(layer, pattern):
        if not edit.skip_first <= layer < layout.layers - edit.skip_last:
            return pattern
        keys = pattern[..., :-1] if of_sink else pattern
        visible = (keys > 0) & inside[:, None, :, None]
        n = visible.sum(-1).amax((1, 2))
        received = (keys * inside[:, None, :, None]).sum(2) / visible.sum(2).clamp(min=1)
        limit = edit.threshold
        if isinstance(limit, str):
            limit = (float(limit.partition("/")[0]) / n)[:, None, None]
            whole = float(edit.threshold.partition("/")[0]) / max(prompts.lengths)
            seen["by the longest"] += int(((received > whole) != (received > limit)).sum())
        assert (received - limit).abs()[inside[:, None].expand_as(received)].min() > 1e-6, "too near to compare"
        on = (received > limit) & (inside & ~first)[:, None]
        seen["sinks"] += int(on.sum())
        if isinstance(edit, steer.Redistribute):
            return redistributed(pattern, on | first[:, None])
        on = torch.nn.functional.pad(on, (0, int(of_sink)))[:, :, None]
        s, rest = (pattern * on).sum(-1, keepdim=True), (pattern * ~on).sum(-1, keepdim=True)
        new = pattern * torch.where(on, edit.beta, (1 - edit.beta * s) / rest.clamp(min=1e-30))
        return torch.where(rest < 1e-6, pattern, new)

    def redistributed(pattern, drained):
        low, high = edit.spans[0] if isinstance(edit.spans[0], tuple) else (4, 8)
        low = low if isinstance(edit.spans[0], tuple) else torch.tensor([4 + i for i in range(len(prompts))])[:, None]
        high = high if isinstance(edit.spans[0], tuple) else torch.tensor([8 + i for i in range(len(prompts))])[:, None]
        span = ((position >= low) & (position < high))[:, None, None]
        late = (position >= high)[:, None, :, None] & inside[:, None, :, None]
        on, to = drained[:, :, None], span & ~drained[:, :, None]
        s, v, m = ((pattern * x).sum(-1, keepdim=True) for x in (on, to, span))
        moved = pattern * torch.where(on, edit.keep, 1.0) + torch.where(to, (1 - edit.keep) * s * pattern / v, 0.0)
        chosen = late & (m >= edit.least) & (v >= edit.share * m) & (v > 1e-6)
        seen["moved"] += int(chosen.sum())
        return torch.where(chosen, moved, pattern)

    return rule


@pytest.mark.parametrize("whole", [True, False], ids=["pattern", "passes"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_rule_on_what_rows_see(tiny_model, monkeypatch, name, whole):
    family, lengths, edit = CASES[name]
    if not whole:
        # long calls are read by passes, and not from the whole pattern
        monkeypatch.setattr(edit_context, "MAX_PATTERN_ENTRIES", 0)
    model, prompts = tiny_model(family, attn_implementation="eager"), batch(lengths)
    seen = {"sinks": 0, "by the longest": 0, "moved": 0}
    with literal(model, rule_of(model, prompts, edit, seen)):
        expected = logits(model, prompts)
    assert seen["sinks"] > 0
    assert "/" not in str(edit.threshold) or len(set(lengths)) == 1 or seen["by the longest"] > 0
    assert isinstance(edit, steer.Act) or seen["moved"] > 0
    with steering(model, edit, prompts):
        found = logits(model, prompts)
    assert (real(found, prompts) - real(logits(model, prompts), prompts)).abs().max() > 1e-5
    torch.testing.assert_close(real(found, prompts), real(expected, prompts), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "edit", [steer.Act(0.4, 0.0), steer.Redistribute("mark", 0.4, 0.0, 0.0, threshold=0.0)], ids=repr
)
def test_passes_do_not_depend_on_the_number_of_sinks(tiny_model, monkeypatch, edit):
    model, counts = tiny_model("llama"), []
    monkeypatch.setattr(edit_context, "MAX_PATTERN_ENTRIES", 0)
    read = edit_context.EditContext._read
    monkeypatch.setattr(edit_context.EditContext, "_read", lambda *a: (counts.append(1), read(*a))[1])
    passes = []
    for length in (20, 200):
        prompts = batch((length,))
        counts.clear()
        # every key but the first is a sink
        with steering(model, edit, prompts):
            logits(model, prompts)
        passes.append(len(counts))
    layers = HeadLayout.of(model).layers
    assert passes == [2 * layers] * 2


@pytest.mark.parametrize(("first", "last"), list(itertools.product((0, 1), (0, 1))))
def test_controls_avoid_the_layers_that_an_edit_leaves_out(first, last):
    layout = HeadLayout(layers=4, heads=4, kv_heads=2)
    edit = steer.Act(0.4, skip_first=first, skip_last=last, heads="L1H0 L2H3")
    drawn = [c for c in check.steering_conditions(edit, layout, n_random_sets=30) if c.name.startswith("random")]
    layers = {head.layer for condition in drawn for head in condition.heads}
    assert layers == set(range(first, 4 - last))
