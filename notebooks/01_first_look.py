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
# # First look
#
# Load a model, see what works for it, read attention while it generates, and find its induction heads, beside a
# control in which there is nothing to find.

# %%
import interp
from interp import keep, plots

# %%
MODEL = "demo"

# %% [markdown]
# `"demo"` is SmolLM2-135M-Instruct, made once from a Python package. A hub name, a folder with safetensors or a GGUF
# file does as well. The doctor runs the model on a few random tokens and says what can be relied on.

# %%
model, tokenizer = interp.load(MODEL)
print(interp.doctor(model, tokenizer))

# %% [markdown]
# ## Read while it generates
#
# A capture keeps reductions, never the pattern: here the share of attention on a span, and the entropy of each row.
# Results stand at positions of the unpadded prompt, generated tokens included.

# %%
prompts = interp.tasks.needle(tokenizer, lengths=(300,), n=2)
with interp.capture(model, [keep.mass("needle"), keep.entropy()], prompts) as cap:
    tokens = model.generate(**prompts.tensors(model.device), max_new_tokens=12, do_sample=False)
mass = cap[keep.mass("needle")]
print("batch, layer, head, query, span:", tuple(mass.shape))

# %%
for prompt, row in zip(prompts, tokens, strict=True):
    reply = tokenizer.decode(row[-12:], skip_special_tokens=True)
    print(prompt.meta["question"], "|", prompt.meta["prefix"] + reply.splitlines()[0])

# %% [markdown]
# ## Induction heads
#
# Random tokens, twice: an induction head looks at the token that came after the current one the first time. The
# control has fresh tokens in the second half, and is measured at the same places.

# %%
repeated = interp.tasks.repeated(tokenizer, n=40, batch=6)
scores = interp.identify.induction(model, repeated)
plots.head_map(scores)

# %%
control = interp.identify.induction(model, interp.tasks.repeated(tokenizer, n=40, batch=6, shuffled=True))
best = scores.top(1)[0]
print(scores, "in the control:", round(control[best], 3))
plots.top_heads(scores)

# %% [markdown]
# This shows where heads look, not what they write, nor that the model needs them: for that see the causal check in
# [02_retrieval_heads](02_retrieval_heads.ipynb).

# %%
# the conclusion: the best head follows repetition, and only repetition
assert scores[best] > 0.5 > 10 * control[best]
assert all(scores[head] > control[head] for head in scores.top(10))
