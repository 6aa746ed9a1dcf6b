# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own analysis, edit and key selector
#
# This tutorial defines a head analysis, an attention edit and a key selector. Each is an ordinary function or dataclass
# of about ten lines. A decorator declares it, so that the registry and saved files know it by its name. Functions of
# `interp.testing` check that it keeps the contract that every built-in method keeps.

# %%
from dataclasses import dataclass, replace

import torch

import interp
from interp import keep, kv, plots, steer, testing
from interp.analyses import registry
from interp.analyses.prompt_sizes import PromptSizes
from interp.analyses.registry import analysis, edit, selector
from interp.hooks.edit.edit import SpanEdit
from interp.hooks.model.provenance import Provenance
from interp.hooks.read.capture import read

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL, dtype="float32")
layers = interp.HeadLayout.of(model).layers

# %% [markdown]
# ## An analysis: heads that attend to full stops
#
# An analysis reads a reduction of the attention pattern, averages it over the queries that count, and returns
# `HeadScores`, which have intervals, selection, comparison, saving and plots. This one measures how much attention goes
# to full stops. They are marked as a span when the texts are encoded. `prompts=` names the function that makes the
# prompts of a run. The control is the same number of positions, drawn at random from the same texts.


# %%
def texts_with_stops(sizes, tokenizer):
    """Plain texts in which every full stop is marked."""
    passages = interp.tasks.passages(tokenizer, n=sizes.n_texts, length=sizes.text_length, seed=sizes.seed)
    texts = [prompt.text for prompt in passages]
    return interp.Prompts.encode(tokenizer, texts, spans={"stops": {"text": ".", "occurrence": "all"}})


@analysis(title="Attention to a span", group="tutorial", prompts=texts_with_stops)
def span_focus(model, prompts, *, span="stops", batch_size=4, seed=0):
    """Mean share of attention that goes to a span, over the queries after its first token."""
    mass, parts = keep.mass(span), []
    for batch, cap in read(model, prompts, mass, batch_size=batch_size):
        for row, prompt in zip(cap[mass][..., 0], batch, strict=True):
            begin = prompt.spans[span][0][1] if isinstance(span, str) else span[1]
            parts.append(row[:, :, begin : len(prompt)].mean(-1))
    provenance = Provenance.of(model, prompts.tokenizer, seed=seed)
    return interp.HeadScores(f"attention to {span}", torch.stack(parts), "share of attention", provenance=provenance)


# %%
sizes = PromptSizes(n_texts=8, text_length=128, explorer_tokens=0)
stops = texts_with_stops(sizes, tokenizer)
random = torch.Generator().manual_seed(0)


def with_elsewhere(prompt):
    """The prompt with random positions marked, as many as there are full stops, none of them a stop or the first."""
    taken = {i for start, stop in prompt.spans["stops"] for i in range(start, stop)}
    free = [i for i in range(1, len(prompt)) if i not in taken]
    drawn = sorted(free[i] for i in torch.randperm(len(free), generator=random)[: len(taken)])
    return replace(prompt, spans={**prompt.spans, "elsewhere": tuple((i, i + 1) for i in drawn)})


marked = replace(stops, items=tuple(map(with_elsewhere, stops)))
scores, control = span_focus(model, marked), span_focus(model, marked, span="elsewhere")
print(scores)
print(control)
plots.scatter(scores, control)

# %% [markdown]
# ## Test the analysis on planted heads
#
# An analysis that finds a head in every model shows nothing. `testing.check_detector` builds ten tiny models, in each
# of which one head attends to the first token. The analysis must rank that head first, and its score must vanish when
# the query weights of the head are shuffled. `testing.check_invariances` checks that batches, padding and the order of
# prompts change no score. Both raise an error where this fails.

# %%
testing.check_detector(span_focus, "sink", span=(0, 1))
testing.check_invariances(span_focus, span="answer")
print("the contract of analyses holds")

# %% [markdown]
# The same test is possible in the model itself. `steer.Boost` makes one head attend to the random positions, and the
# analysis must rank this head first.

# %%
planted = interp.Head(layers // 6, 1)
with interp.steering(model, steer.Boost("elsewhere", 1e6, heads=planted), marked[:4]):
    boosted = span_focus(model, marked[:4], span="elsewhere")
print(boosted, " before:", round(control[planted], 3))

# %% [markdown]
# ## Find the declaration by name
#
# The registry holds the title, the settings and the prompts of a declared analysis. In a package that lists the
# function under the entry point group `interp.analyses`, `interp list`, `interp score` and reports find it as well.

# %%
declared = registry.get("span_focus")
print(declared.title, declared.settings)
again = declared.thing(model, declared.prompts(sizes, tokenizer))
print(again)

# %% [markdown]
# ## An edit: give a span a fixed share of attention
#
# An edit is a frozen dataclass whose `apply` returns the attention call with a bias on its logits. This edit adds the
# bias that gives the marked span a share of `target` in every row, whether the span had more or less before. The
# argument `here` holds keys and rows by their positions in the prompt, and reads the attention of the unedited call.
# The edit need not consider the KV cache, padding or generation.


# %%
@edit(title="Fixed share", group="spans")
@dataclass(frozen=True)
class FixedShare(SpanEdit):
    """Set the attention to the spans to `target` in each row that sees the spans and another key."""

    target: float = 0.5

    def apply(self, here):
        span = here.keys(self.spans)
        inside, outside = here.mass(span)
        bias = torch.log(self.target / (1 - self.target) * outside / inside)
        return here.add_row_bias(torch.where((inside > 0) & (outside > 0), bias, 0.0), span)


# %%
testing.check_edit(FixedShare("mark", 0.3))
print("the contract of edits holds")

# %% [markdown]
# `testing.check_edit` has checked on tiny models that the edit changes only the heads that it names, that cached
# generation equals a full recomputation, that padding changes nothing, and that nothing remains after the context. The
# next cell reads the share back while the model of this tutorial generates.

# %%
task = interp.tasks.get("counterfact")
prompts = task.prompts(tokenizer, "dev", 4)
edited_layer, other_layer = layers // 3, layers // 3 - 1
fixed = FixedShare("mark", 0.3, heads=f"L{edited_layer}H*")
mass, n_new = keep.mass("mark"), 8
with (
    interp.steering(model, fixed, prompts),
    interp.capture(model, mass, prompts, layers=(other_layer, edited_layer)) as cap,
):
    model.generate(**prompts.tensors(model.device), min_new_tokens=n_new, max_new_tokens=n_new, do_sample=False)
after = [prompt.spans["mark"][-1][1] for prompt in prompts]
rows = [cap[mass][b, :, :, start : len(prompts[b]) + n_new - 1, 0] for b, start in enumerate(after)]
unedited, edited = (torch.cat([row[layer].flatten() for row in rows]) for layer in (0, 1))
for name, shares in ((f"layer {other_layer}, not edited", unedited), (f"layer {edited_layer}, edited", edited)):
    print(f"{name}: the span receives {float(shares.min()):.4f} to {float(shares.max()):.4f} of the attention")

# %% [markdown]
# In the edited layer the share is 0.3 in rows of the prompt and in generated rows. Edits can be added, passed to
# `steer.choose`, `steer.profile` and `steer.steer_check`, and saved with their heads. The next cell measures the effect
# of this edit on the task. The margin is how much more probable the new fact is than the old one. The controls are the
# same edit on the earlier tokens that state the old fact, and the same edit in as many heads of later layers.


# %%
def with_old(prompt):
    start, stop = prompt.spans["mark"][0]
    # "The old fact. Currently, the new fact": three tokens between the two
    return replace(prompt, spans={**prompt.spans, "old": ((2 * start - stop - 3, start - 3),)})


items = task.prompts(tokenizer, "dev", 16)
items = replace(items, items=tuple(map(with_old, items)))
middle, late = (f"L{first}-L{first + layers // 3 - 1}" for first in (layers // 3, 2 * layers // 3))
ranked = steer.choose(
    model,
    items,
    {
        "new fact": FixedShare("mark", 0.3, heads=middle),
        "old fact": FixedShare("old", 0.3, heads=middle),
        "new fact, later layers": FixedShare("mark", 0.3, heads=late),
    },
)
for setting in ranked:
    print(f"{setting.name:24s} {setting.score:+.2f} [{setting.low:+.2f}, {setting.high:+.2f}] nats per token")

# %% [markdown]
# ## A key selector: keep keys with a small norm
#
# A key selector is a frozen dataclass whose `rank` orders the keys of each kv head. The highest ranks are kept. Keys
# with a small norm tend to receive much attention (Devoto et al. 2406.11430), so this selector keeps them.
# `testing.check_selector` checks that as many keys are kept as requested, and that later tokens attend to these keys
# and to no others.


# %%
@selector(title="Small key norm")
@dataclass(frozen=True)
class SmallKeyNorm(kv.KeySelector):
    """Keep the keys with the smallest norm."""

    def rank(self, here):
        return 1 / (1 + here.call.k.float().norm(dim=-1))


testing.check_selector(SmallKeyNorm)
print("the contract of key selectors holds")

# %% [markdown]
# `kv.kv_curve` compares it with random keys and with SnapKV on known answers, here with 40 % of the keys.

# %%
curve = kv.kv_curve(
    model,
    kv.kv_tasks(tokenizer, n=4, length=160, seed=1),
    {"random": kv.RandomKeys, "small norm": SmallKeyNorm, "snapkv": kv.SnapKV},
    keep_ratios=(0.4,),
)
print(curve)

# %% [markdown]
# ## Limits
#
# The tutorial does not show that heads that attend to full stops use them, or that this edit helps on other tasks. A
# contract shows that a method does what its name states. It does not show that the method is useful. Four prompts of
# each task are too few to order key selectors.

# %%
# the conclusion: the analysis finds the heads that attend to full stops and the planted head, the edit sets the share
# where it should and helps only there, and dropping keys has a cost that the curve measures
best = scores.top(1)[0]
margin = {setting.name: setting.score for setting in ranked}
assert scores[best] > 3 * control[best]
assert float(scores.low[best]) > float(control.high[best])
assert boosted.top(1) == [planted]
assert boosted[planted] > 0.8 > 3 * control[planted]
assert torch.equal(again.values, scores.values)
assert float((edited - 0.3).abs().max()) < 1e-4 < float((unedited - 0.3).abs().max())
assert margin["new fact"] > margin["baseline"] + 0.5
assert margin["new fact"] > margin["old fact"] + 0.5
assert curve.mean("baseline", "loss").mean < curve.mean("small norm", "loss").mean
