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
# Load a model, see what works for it, read attention while it generates, and find its induction heads.

# %%
MODEL = "demo"

# %%
import interp
from interp import keep, plots

model, tokenizer = interp.load(MODEL)
print(interp.doctor(model, tokenizer))

# %% [markdown]
# ## Read while it generates
#
# A capture keeps reductions, never the pattern. Results stand at positions of the unpadded prompt.

# %%
prompts = interp.tasks.needle(tokenizer, lengths=(300,), n=2)
with interp.capture(model, [keep.mass("needle"), keep.entropy()], prompts) as cap:
    tokens = model.generate(**prompts.tensors(), max_new_tokens=12, do_sample=False)
tuple(cap[keep.mass("needle")].shape)

# %%
for prompt, row in zip(prompts, tokens, strict=True):
    reply = tokenizer.decode(row[-12:], skip_special_tokens=True)
    print(prompt.meta["question"], "|", prompt.meta["prefix"], reply.splitlines()[0])

# %% [markdown]
# ## Induction heads

# %%
repeated = interp.tasks.repeated(tokenizer, n=40, batch=6)
scores = interp.identify.induction(model, repeated)
plots.head_map(scores)

# %%
control = interp.identify.induction(model, interp.tasks.repeated(tokenizer, n=40, batch=6, shuffled=True))
best = scores.top(1)[0]
print(scores, "in the control:", round(control[best], 3))

# %%
# the conclusion: the best head follows repetition, and only repetition
assert scores[best] > 0.5 > 10 * control[best]
