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
# # A long context
#
# All heads at once, at a length where their patterns could not be held, in one forward: 16,384 tokens, on a CPU too,
# and 131,072 where there is a GPU. A few numbers a query are kept for each head: what it gives to a span, its most
# attended key, its entropy, and a map of blocks. The patterns themselves would take 4 bytes for each head, query and
# key.

# %%
import time
from dataclasses import replace

import plotly.graph_objects as go
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import interp
from interp import keep, plots
from interp.analyses.measures.losses import token_losses

# %%
MODEL = "demo"
LENGTH, ON_A_GPU = 16_384, 131_072

# %% [markdown]
# ## A model that reads that far
#
# The demo model was trained on 8,192 tokens. YaRN (Peng et al. 2309.00071) slows the rotation of its slow dimensions,
# so that far positions look like those it knows. `interp.load` takes a model as it is, so the extended copy is loaded
# with `transformers`; whatever it returns can be read. A model whose context is long enough is left alone.

# %%
short, tokenizer = interp.load(MODEL)
known = short.config.max_position_embeddings


def extended(length):
    """The model with a context of so many tokens, YaRN where it was not trained on as many."""
    config = AutoConfig.from_pretrained(short.name_or_path)
    if known < length:
        yarn = {"rope_type": "yarn", "factor": 2 * length / known, "original_max_position_embeddings": known}
        config.rope_parameters = {**config.rope_parameters, **yarn}
        config.max_position_embeddings = length
    made = AutoModelForCausalLM.from_pretrained(short.name_or_path, config=config, dtype=short.dtype)
    return made.to(short.device).eval()


model = extended(LENGTH)
print(f"{known:,} tokens as trained, {model.config.max_position_embeddings:,} now")

# %% [markdown]
# What that costs: the loss on short texts, with and without. No training was done for the new positions, so this is a
# price, and what the model says far beyond its training is worth less than what it says within.

# %%
texts = interp.tasks.passages(tokenizer, n=3, length=512, seed=0)
before, after = (float(token_losses(each, texts).mean()) for each in (short, model))
print(f"loss on 512 tokens: {before:.3f} as loaded, {after:.3f} extended")

# %% [markdown]
# ## Which heads retrieve, at a short length
#
# On needles of 300 tokens, in the extended model. `form="forced"` reads all steps of the answer in one forward.

# %%
near = interp.identify.retrieval(model, interp.tasks.needle(tokenizer, lengths=(300,), n=6), form="forced")
near

# %% [markdown]
# ## One forward
#
# Five facts lie in a long text. Behind the question the answer is put, and then the four other sentences once more,
# word for word, so that the rows that should copy are part of the same forward. What reading costs in memory is known
# before it is paid.

# %%
needles = interp.tasks.needle(tokenizer, lengths=(LENGTH - 200,), depths=(0.1,), n=1, needles=5, seed=1)
prompt = needles[0]
link = tokenizer('"\nThe text says: "', add_special_tokens=False)["input_ids"]
ids, steps = list(prompt.ids), []
for start, stop in (*prompt.spans["answer"], *prompt.spans["distractor"]):
    if steps:
        ids += link
        # the first words only say which sentence is meant
        begun = start + 6
    else:
        begun = start
    ids += prompt.ids[start:begun]
    # the row that should copy a token is the one before it
    steps.append([(len(ids) - 1 + n, source) for n, source in enumerate(range(begun, stop))])
    ids += prompt.ids[begun:stop]
prompts = replace(needles, items=(replace(prompt, ids=tuple(ids)),))
print(f"{len(ids):,} tokens; steps that should copy: {[len(part) for part in steps]}")
print("from so many tokens back:", [part[0][0] - part[0][1] for part in steps])

# %%
block = LENGTH // 64
mass, top, entropy, blocks = keep.mass("needle"), keep.top_keys(1), keep.entropy(), keep.blocks(block)
cap = interp.capture(model, [mass, top, entropy, blocks], prompts)
print(cap.cost(1, len(ids)))
print(f"the patterns would be {4 * len(near) * len(ids) ** 2 / 1e9:,.0f} GB")


# %%
def forward(model, prompts):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.no_grad():
        logits = model(**prompts.tensors(model.device), use_cache=False, logits_to_keep=200).logits[0]
    return logits.float().cpu(), time.perf_counter() - started


# what reading costs beside the same forward alone, at a length where a CPU need not do both for minutes
sample = interp.tasks.needle(tokenizer, lengths=(LENGTH // 8,), n=1)
forward(model, sample)
_, alone = forward(model, sample)
with interp.capture(model, cap.keep, sample):
    forward(model, sample)
with interp.capture(model, cap.keep, sample):
    _, read = forward(model, sample)
print(f"{LENGTH // 8:,} tokens: {alone:.1f} s alone, {read:.1f} s read, {read / alone:.2f} times")

with cap:
    logits, reading = forward(model, prompts)
print(f"{len(ids):,} tokens read in {reading:.1f} s")

# %% [markdown]
# ## The needles, far back
#
# Which heads look, at each step, exactly at the token that comes next, thousands of tokens back? Chance would be one
# in the length of the text. And does the model itself name that token first?

# %%
keys = cap[top].keys[0, ..., 0]
rows, sources = ([torch.tensor([pair[i] for pair in part]) for part in steps] for i in (0, 1))
looked = torch.stack([(keys[..., at] == source).float().mean(-1) for at, source in zip(rows, sources, strict=True)])
far = interp.HeadScores("retrieval, far", looked, "share of steps")
told = logits.argmax(-1)[torch.cat(rows) - len(ids) + 200]
right = (told == torch.tensor(ids)[torch.cat(sources)]).split([len(part) for part in steps])
for part, said, row in zip(steps, right, looked, strict=True):
    strongest = list(far)[int(row.argmax())]
    model_share, head_share = float(said.float().mean()), float(row.max())
    back = part[0][0] - part[0][1]
    print(f"{back:8,} tokens back: the model {model_share:4.0%}, {strongest} {head_share:4.0%}")
far

# %%
plots.scatter(near, far)

# %% [markdown]
# The eight heads that retrieve best from short needles, beside others of the same layers:

# %%
best = near.heads(top=8)
drawn = [near.random_like(best, seed, "layer") for seed in range(20)]


def mean(table, heads):
    return sum(float(table[head]) for head in heads) / len(heads)


on_needle = cap[mass][0, :, :, rows[0], 0].mean(-1)
spread = cap[entropy][0, ..., torch.cat(rows)].mean(-1)
for name, table in (("steps looked at", far.values), ("mass on the needle", on_needle), ("entropy, nats", spread)):
    others = sum(mean(table, heads) for heads in drawn) / len(drawn)
    print(f"{name:20s} {mean(table, best):.3f}, others of their layers {others:.3f}")
start, stop = prompt.spans["needle"][0]
print(f"flat attention: mass {(stop - start) / len(prompt):.5f}")

# %% [markdown]
# ## The map of one head
#
# Attention between blocks, each the mean over its queries, on a square-root scale. The last row has the question and
# the answer in it.

# %%
head = far.top(1)[0]
between = cap[blocks][0, head.layer, head.head]
figure = go.Figure(go.Heatmap(z=between.sqrt().numpy(), colorscale="Blues", showscale=False))
figure.update_layout(title=f"{head}: attention between blocks of {block} tokens", height=460, width=520)
figure.update_xaxes(title="block of keys")
figure.update_yaxes(title="block of queries", autorange="reversed")
figure

# %% [markdown]
# ## The explorer
#
# From all heads to the blocks of one and to its tokens, in one HTML file that opens offline. It reads in a forward of
# its own: here of a shorter text, with maps and top keys of the heads that retrieve, so that this notebook stays small.
# 16,000 tokens with the maps of all heads make a page of 3 MB.

# %%
page = interp.tasks.needle(tokenizer, lengths=(1024,), depths=(0.1,), n=1)
few = near.heads(top=6)
explored = interp.explore(model, page, heads=few, maps=few, k=2, title=prompt.meta["question"])
explorer = plots.explorer(explored)
path = explorer.save("explorer.html")
print(explored)
print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB")
explorer if path.stat().st_size < 250_000 else path

# %% [markdown]
# ## 131,072 tokens, where there is a GPU
#
# Sixteen times what the demo model was trained on: it reads no needle there, as YaRN alone does not make it a model of
# long texts, so only what reading gives and costs is looked at. Put a model that knows such lengths in the `MODEL` line
# to see its heads.

# %%
if torch.cuda.is_available():
    long = extended(ON_A_GPU)
    text = interp.tasks.passages(tokenizer, n=1, length=ON_A_GPU)
    wide = interp.capture(long, [top, entropy, keep.blocks(ON_A_GPU // 64)], text)
    # kernels are made on their first call
    with interp.capture(long, wide.keep, text):
        forward(long, text)
    with wide:
        _, read = forward(long, text)
    _, alone = forward(long, text)
    print(f"{ON_A_GPU:,} tokens: {alone:.1f} s alone, {read:.1f} s read, {read / alone:.2f} times")
    print(f"the patterns would be {4 * len(near) * ON_A_GPU**2 / 1e12:,.0f} TB")
    assert torch.allclose(wide[wide.keep[2]][0].sum(-1), torch.ones(()), atol=1e-2)
    assert read < 2 * alone
else:
    print("left out: no GPU here")

# %% [markdown]
# What this cannot show: that these heads are needed at this length (take them out, as in
# [02_retrieval_heads](02_retrieval_heads.ipynb)), or that the model reads all of the text. Five needles are five
# needles.

# %%
# the conclusion: heads found on short texts look at needles across the whole text, others do not, and reading all heads
# costs a small multiple of the forward
chance = sum(mean(far.values, heads) for heads in drawn) / len(drawn)
assert len(ids) > 0.98 * LENGTH
assert max(part[0][0] - part[0][1] for part in steps) > 0.8 * LENGTH
assert mean(far.values, best) > 0.1
assert mean(far.values, best) > 2.5 * chance
assert near.compare(far, k=8).p_overlap < 0.01
assert torch.allclose(cap[blocks][0].sum(-1), torch.ones(()), atol=1e-3)
assert read < 4 * alone
assert path.stat().st_size > 10_000
