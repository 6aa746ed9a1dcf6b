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
# # Read the attention of all heads on a long context
#
# This tutorial reads all heads in one forward pass, at a length at which their patterns do not fit into memory: 16,384
# tokens on a CPU, and 131,072 tokens on a GPU. For each head and query it stores a few numbers: the attention to a
# span, the most attended key and the entropy. It also stores a map of the attention between blocks of tokens. The
# patterns themselves would take 4 bytes for each head, query and key.

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
# ## Extend the context of the model
#
# The demo model was trained on 8,192 tokens. YaRN (Peng et al. 2309.00071) slows the rotation of its slow dimensions,
# so that distant positions resemble those of training. `interp.load` does not change a model, so the extended copy is
# loaded with `transformers`, and interp reads this copy in the same way. A model whose context is long enough is not
# changed.

# %%
short, tokenizer = interp.load(MODEL)
known = short.config.max_position_embeddings


def extended(length):
    """The model with a context of `length` tokens, extended by YaRN if it was trained on fewer."""
    config = AutoConfig.from_pretrained(short.name_or_path)
    if known < length:
        yarn = {"rope_type": "yarn", "factor": 2 * length / known, "original_max_position_embeddings": known}
        config.rope_parameters = {**config.rope_parameters, **yarn}
        config.max_position_embeddings = length
    made = AutoModelForCausalLM.from_pretrained(short.name_or_path, config=config, dtype=short.dtype)
    return made.to(short.device).eval()


model = extended(LENGTH)
print(f"{known:,} tokens in training, {model.config.max_position_embeddings:,} after the extension")

# %% [markdown]
# The extension has a cost, which the loss on short texts shows. The model was not trained on the new positions, so its
# replies far beyond the trained length are less reliable than those within it.

# %%
texts = interp.tasks.passages(tokenizer, n=3, length=512, seed=0)
before, after = (float(token_losses(each, texts).mean()) for each in (short, model))
print(f"loss on 512 tokens: {before:.3f} unmodified, {after:.3f} extended")

# %% [markdown]
# ## Find retrieval heads on short prompts
#
# The heads are scored on needles of 300 tokens, in the extended model. `form="forced"` reads all steps of the answer in
# one forward pass.

# %%
near = interp.identify.retrieval(model, interp.tasks.needle(tokenizer, lengths=(300,), n=6), form="forced")
near

# %% [markdown]
# ## Read a long prompt in one forward pass
#
# The long text contains five facts. The prompt ends with the question, its answer and the four other facts, repeated
# word for word, so that all steps at which a head should copy are in the same forward pass. The memory that reading
# needs is computed before the forward pass.

# %%
needles = interp.tasks.needle(tokenizer, lengths=(LENGTH - 200,), depths=(0.1,), n=1, needles=5, seed=1)
prompt = needles[0]
link = tokenizer('"\nThe text says: "', add_special_tokens=False)["input_ids"]
ids, steps = list(prompt.ids), []
for start, stop in (*prompt.spans["answer"], *prompt.spans["distractor"]):
    if steps:
        ids += link
        # the first words only identify the sentence
        begin = start + 6
    else:
        begin = start
    ids += prompt.ids[start:begin]
    # the row that should copy a token is the one before it
    steps.append([(len(ids) - 1 + n, source) for n, source in enumerate(range(begin, stop))])
    ids += prompt.ids[begin:stop]
prompts = replace(needles, items=(replace(prompt, ids=tuple(ids)),))
print(f"{len(ids):,} tokens; copying steps of each fact: {[len(part) for part in steps]}")
print("distance to the source in tokens:", [part[0][0] - part[0][1] for part in steps])

# %%
block = LENGTH // 64
mass, top, entropy, blocks = keep.mass("needle"), keep.top_keys(1), keep.entropy(), keep.blocks(block)
cap = interp.capture(model, [mass, top, entropy, blocks], prompts)
print(cap.cost(1, len(ids)))
print(f"the patterns would take {4 * len(near) * len(ids) ** 2 / 1e9:,.0f} GB")


# %%
def forward(model, prompts):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.no_grad():
        logits = model(**prompts.tensors(model.device), use_cache=False, logits_to_keep=200).logits[0]
    return logits.float().cpu(), time.perf_counter() - started


# the time of reading compared with the same forward pass alone, on a prompt that is short enough for a CPU
sample = interp.tasks.needle(tokenizer, lengths=(LENGTH // 8,), n=1)
forward(model, sample)
_, plain_seconds = forward(model, sample)
with interp.capture(model, cap.keep, sample):
    forward(model, sample)
with interp.capture(model, cap.keep, sample):
    _, read_seconds = forward(model, sample)
ratio = read_seconds / plain_seconds
print(f"{LENGTH // 8:,} tokens: {plain_seconds:.1f} s plain, {read_seconds:.1f} s with reading, ratio {ratio:.2f}")

with cap:
    logits, seconds = forward(model, prompts)
print(f"{len(ids):,} tokens read in {seconds:.1f} s")

# %% [markdown]
# ## Retrieval over thousands of tokens
#
# The score is the share of steps at which a head's most attended key is exactly the token that comes next, thousands of
# tokens earlier. By chance, it would be one divided by the length of the text. The cell also shows how often the model
# itself predicts that token.

# %%
keys = cap[top].keys[0, ..., 0]
rows, sources = ([torch.tensor([pair[i] for pair in part]) for part in steps] for i in (0, 1))
hits = torch.stack([(keys[..., at] == source).float().mean(-1) for at, source in zip(rows, sources, strict=True)])
far = interp.HeadScores("long-range retrieval", hits, "share of steps")
predicted = logits.argmax(-1)[torch.cat(rows) - len(ids) + 200]
correct = (predicted == torch.tensor(ids)[torch.cat(sources)]).split([len(part) for part in steps])
for part, by_model, row in zip(steps, correct, hits, strict=True):
    strongest = list(far)[int(row.argmax())]
    model_share, head_share = float(by_model.float().mean()), float(row.max())
    distance = part[0][0] - part[0][1]
    print(f"distance {distance:8,} tokens: the model {model_share:4.0%}, {strongest} {head_share:4.0%}")
far

# %%
plots.scatter(near, far)

# %% [markdown]
# The next cell compares the eight heads with the highest scores on short needles with other heads of the same layers.

# %%
best = near.heads(top=8)
drawn = [near.random_like(best, seed, "layer") for seed in range(20)]


def mean(table, heads):
    return sum(float(table[head]) for head in heads) / len(heads)


on_needle = cap[mass][0, :, :, rows[0], 0].mean(-1)
spread = cap[entropy][0, ..., torch.cat(rows)].mean(-1)
for name, table in (("share of steps", far.values), ("mass on the needle", on_needle), ("entropy, nats", spread)):
    others = sum(mean(table, heads) for heads in drawn) / len(drawn)
    print(f"{name:20s} {mean(table, best):.3f}, other heads of the same layers {others:.3f}")
start, stop = prompt.spans["needle"][0]
print(f"uniform attention: mass {(stop - start) / len(prompt):.5f}")

# %% [markdown]
# ## The map of one head
#
# The map shows the attention between blocks of tokens, averaged over the queries of a block, on a square-root scale.
# The last row contains the question and the answer.

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
# The explorer leads from all heads to the blocks of one head and to its tokens, in one HTML file that opens offline. It
# runs a separate forward pass. Here the text is short, and maps and top keys are stored for the retrieval heads only,
# so that this notebook remains small. A page of 16,000 tokens with the maps of all heads has 3 MB.

# %%
page = interp.tasks.needle(tokenizer, lengths=(1024,), depths=(0.1,), n=1)
retrieval_heads = near.heads(top=6)
explored = interp.explore(model, page, heads=retrieval_heads, maps=retrieval_heads, k=2, title=prompt.meta["question"])
explorer = plots.explorer(explored)
path = explorer.save("explorer.html")
print(explored)
print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB")
explorer if path.stat().st_size < 250_000 else path

# %% [markdown]
# ## 131,072 tokens on a GPU
#
# This is sixteen times the trained length of the demo model. The demo model finds no needle at this length, because
# YaRN alone does not make it a long-context model. The cell therefore measures only the cost of reading. To see
# retrieval at this length, name a long-context model in the `MODEL` line.

# %%
if torch.cuda.is_available():
    long = extended(ON_A_GPU)
    text = interp.tasks.passages(tokenizer, n=1, length=ON_A_GPU)
    wide = interp.capture(long, [top, entropy, keep.blocks(ON_A_GPU // 64)], text)
    # kernels are compiled at their first call
    with interp.capture(long, wide.keep, text):
        forward(long, text)
    with wide:
        _, read_seconds = forward(long, text)
    _, plain_seconds = forward(long, text)
    ratio = read_seconds / plain_seconds
    print(f"{ON_A_GPU:,} tokens: {plain_seconds:.1f} s plain, {read_seconds:.1f} s with reading, ratio {ratio:.2f}")
    print(f"the patterns would take {4 * len(near) * ON_A_GPU**2 / 1e12:,.0f} TB")
    assert torch.allclose(wide[wide.keep[2]][0].sum(-1), torch.ones(()), atol=1e-2)
    assert read_seconds < 2 * plain_seconds
else:
    print("skipped: this machine has no GPU")

# %% [markdown]
# ## Limits
#
# The scores do not show that the model needs these heads at this length. An ablation test, as in
# [02_retrieval_heads](02_retrieval_heads.ipynb), would show that. They also do not show that the model uses all of the
# text. Five needles are a small sample.

# %%
# the conclusion: heads that were found on short texts attend to needles across the whole text far more than other heads
# do, and reading all heads takes a small multiple of the time of a forward pass
chance = sum(mean(far.values, heads) for heads in drawn) / len(drawn)
assert len(ids) > 0.98 * LENGTH
assert max(part[0][0] - part[0][1] for part in steps) > 0.8 * LENGTH
assert mean(far.values, best) > 0.1
assert mean(far.values, best) > 2.5 * chance
assert near.compare(far, k=8).p_overlap < 0.01
assert torch.allclose(cap[blocks][0].sum(-1), torch.ones(()), atol=1e-3)
assert read_seconds < 4 * plain_seconds
assert path.stat().st_size > 10_000
