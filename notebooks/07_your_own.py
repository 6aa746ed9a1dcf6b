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
# # Your own analysis, your own edit
#
# A head analysis of your own in ten lines, tested against a control and against a planted head; an attention edit of
# your own in eight, tested by reading it back. Nothing is registered: both are ordinary Python.

# %%
from dataclasses import dataclass, replace

import torch

import interp
from interp import plots, steer
from interp.hooks.edit.edit import SpanEdit
from interp.hooks.model.provenance import Provenance
from interp.hooks.read.capture import read
from interp.hooks.read.keep import mass

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL, dtype="float32")
layers = interp.HeadLayout.of(model).layers

# %% [markdown]
# ## An analysis: heads that look at full stops
#
# Ask for a reduction, take its mean over the queries that count, return `HeadScores`: intervals, selection,
# comparison, saving and plots come with it. Here: how much attention goes to full stops, which are named as spans
# when the texts are encoded. The control is as many positions, drawn at random in the same texts.


# %%
def span_focus(model, prompts, span="stops", *, batch_size=4, seed=0):
    """Share of a query's attention that goes to a span, mean over queries that come after its first token."""
    keep, parts = mass(span), []
    for batch, cap in read(model, prompts, keep, batch_size=batch_size):
        for row, prompt in zip(cap[keep][..., 0], batch, strict=True):
            begun = prompt.spans[span][0][1]
            parts.append(row[:, :, begun : len(prompt)].mean(-1))
    provenance = Provenance.of(model, prompts.tokenizer, seed=seed)
    return interp.HeadScores(f"focus on {span}", torch.stack(parts), "share of attention", provenance=provenance)


# %%
texts = [prompt.text for prompt in interp.tasks.passages(tokenizer, n=8, length=128, seed=0)]
stops = interp.Prompts.encode(tokenizer, texts, spans={"stops": {"text": ".", "occurrence": "all"}})
random = torch.Generator().manual_seed(0)


def with_elsewhere(prompt):
    """As many positions as there are full stops, drawn from the others but the first."""
    taken = {i for start, stop in prompt.spans["stops"] for i in range(start, stop)}
    free = [i for i in range(1, len(prompt)) if i not in taken]
    drawn = sorted(free[i] for i in torch.randperm(len(free), generator=random)[: len(taken)])
    return replace(prompt, spans={**prompt.spans, "elsewhere": tuple((i, i + 1) for i in drawn)})


marked = replace(stops, items=tuple(map(with_elsewhere, stops)))
scores, control = span_focus(model, marked), span_focus(model, marked, "elsewhere")
print(scores)
print(control)
plots.scatter(scores, control)

# %% [markdown]
# ## The same on a planted head
#
# An analysis that finds something in every model may find anything. `steer.Boost` makes one chosen head look at the
# span, whatever the model was trained for: that head has to come first, and only there.

# %%
planted = interp.Head(layers // 6, 1)
with interp.steering(model, steer.Boost("elsewhere", 1e6, heads=planted), marked[:4]):
    seen = span_focus(model, marked[:4], "elsewhere")
print(seen, " before:", round(control[planted], 3))

# %% [markdown]
# ## An edit: a span gets exactly this share
#
# An edit is a frozen dataclass whose `change` returns the attention call with a bias on its logits: here the one that
# gives the marked span a share of `target` in every row, whether it had more or less. `here` has keys and rows at
# their positions in the prompt, and reads masses of the call as it stands. The KV cache, padding and generation are
# not its business.


# %%
@dataclass(frozen=True)
class Exactly(SpanEdit):
    """Attention on the spans set to `target` in each row that sees them and something else."""

    target: float = 0.5

    def apply(self, here):
        span = here.keys(self.spans)
        inside, outside = here.mass(span)
        bias = torch.log(self.target / (1 - self.target) * outside / inside)
        return here.add_row_bias(torch.where((inside > 0) & (outside > 0), bias, 0.0), span)


# %%
task = interp.tasks.get("counterfact")
prompts = task.prompts(tokenizer, "dev", 4)
named, other = layers // 3, layers // 3 - 1
edit = Exactly("mark", 0.3, heads=f"L{named}H*")
keep, new = mass("mark"), 8
with interp.steering(model, edit, prompts), interp.capture(model, keep, prompts, layers=(other, named)) as cap:
    model.generate(**prompts.tensors(model.device), min_new_tokens=new, max_new_tokens=new, do_sample=False)
after = [prompt.spans["mark"][-1][1] for prompt in prompts]
rows = [cap[keep][b, :, :, start : len(prompts[b]) + new - 1, 0] for b, start in enumerate(after)]
unedited, edited = (torch.cat([row[layer].flatten() for row in rows]) for layer in (0, 1))
for name, found in ((f"layer {other}, not named", unedited), (f"layer {named}", edited)):
    print(f"{name}: the span has {float(found.min()):.4f} to {float(found.max()):.4f} of each row")

# %% [markdown]
# Rows of the prompt and generated rows alike have 0.3. Edits of your own add up with the others, go through
# `steer.choose`, `steer.profile` and `steer.steer_check`, and are saved with their heads. Does this one do anything
# for the task? The margin says how much more probable the new fact is than the old one. Beside it stand the same edit
# on the tokens before, where the old fact is, and the same edit in as many heads of other layers.


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
        "new fact": Exactly("mark", 0.3, heads=middle),
        "old fact": Exactly("old", 0.3, heads=middle),
        "new fact, later layers": Exactly("mark", 0.3, heads=late),
    },
)
for choice in ranked:
    print(f"{choice.name:24s} {choice.score:+.2f} [{choice.low:+.2f}, {choice.high:+.2f}] nats per token")

# %% [markdown]
# What this cannot show: that the heads that look at full stops use them, or that this edit would help elsewhere. A
# control that is passed says that the number is of the thing it is named after, no more.

# %%
# the conclusion: the analysis finds what is there and what was planted, and the edit does what it says where it says so
best = scores.top(1)[0]
margin = {choice.name: choice.score for choice in ranked}
assert scores[best] > 3 * control[best]
assert float(scores.low[best]) > float(control.high[best])
assert seen.top(1) == [planted]
assert seen[planted] > 0.8 > 3 * control[planted]
assert float((edited - 0.3).abs().max()) < 1e-4 < float((unedited - 0.3).abs().max())
assert margin["new fact"] > margin["as loaded"] + 0.5
assert margin["new fact"] > margin["old fact"] + 0.5
