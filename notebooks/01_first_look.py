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
# # First look: load a model, read attention, find induction heads
#
# This tutorial loads a model, checks which functions work on it, reads attention while it generates, and finds its
# induction heads. A control without repetition shows that the score does not find heads in every text.

# %%
import interp
from interp import keep, plots

# %%
MODEL = "demo"

# %% [markdown]
# `"demo"` is SmolLM2-135M-Instruct, which is built once from a Python package. A name on the Hugging Face hub, a folder
# with safetensors or a GGUF file also works. The doctor runs the model on a few random tokens and reports which
# functions are reliable on it.

# %%
model, tokenizer = interp.load(MODEL)
print(interp.doctor(model, tokenizer))

# %% [markdown]
# ## Read attention during generation
#
# A capture stores reductions of the attention pattern, never the pattern itself. Here it stores the share of attention
# on a span and the entropy of each row. Results are indexed by positions of the unpadded prompt, and generated tokens
# are included.

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
# ## Find induction heads
#
# The prompts are random tokens that are repeated once. An induction head attends to the token that followed the
# previous occurrence of the current token. The control has new tokens in the second half and is measured at the same
# positions.

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
# The score shows where heads attend. It does not show what they write, or that the model needs them. The tutorial
# [02_retrieval_heads](02_retrieval_heads.ipynb) tests this with an ablation.

# %%
# the conclusion: the best head follows repetition, and without repetition its score almost vanishes
assert scores[best] > 0.5 > 10 * control[best]
assert all(scores[head] > control[head] for head in scores.top(10))
