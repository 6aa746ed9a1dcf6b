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
# # Retrieval heads
#
# A retrieval head copies from the context: while the model writes an answer, the head looks at the very token that
# comes next (Wu et al. 2404.15574). Here they are found on needles, facts hidden in a long text, and then taken out
# while the model looks for *other* needles, beside random heads. A score alone says where a head looks; only the
# second step says that the model needs it.

# %%
import interp
from interp import plots

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL)

# %% [markdown]
# ## Needles
#
# Each prompt is a text of its own with a made-up fact in it, and a question that only this sentence answers.

# %%
needles = interp.tasks.needle(tokenizer, lengths=(220,), n=8, seed=0)
first = needles[0]
start, stop = first.spans["needle"][0]
print(needles)
print("needle:  ", tokenizer.decode(first.ids[start:stop]))
print("question:", first.meta["question"])
print("answer:  ", first.meta["answer"])

# %% [markdown]
# ## Scores
#
# The share of answer tokens at which a head's most attended key is the token that the model then writes. Prompts that
# the model does not answer do not count. Intervals are over prompts.

# %%
scores = interp.identify.retrieval(model, needles)
scores

# %%
plots.head_map(scores)

# %%
plots.top_heads(scores)

# %% [markdown]
# Are these the heads of these eight needles, or of needles? Other texts, other facts, and a shorter prompt:

# %%
again = interp.identify.retrieval(model, interp.tasks.needle(tokenizer, lengths=(140,), n=8, seed=2))
plots.scatter(scores, again)

# %% [markdown]
# ## Are they needed?
#
# The ten highest heads write nothing (zero ablation) while the model answers needles that no score was made from.
# Beside them as many other heads, drawn from the whole model and from the same layers, since retrieval heads sit in
# few. Where all eight prompts agree, the interval is [100%, 100%], as a bootstrap gives it; eight of eight is
# compatible with 63%.

# %%
others = interp.tasks.needle(tokenizer, lengths=(220,), n=8, seed=1)
check = interp.ablation_test(model, others, scores, k=10, draws=2)
print(check)

# %%
plots.causal(check)

# %%
for outcome in check.outcomes:
    print(f"{outcome.condition.name:18s} {outcome.replies[0]!r}")
print("expected:", others[0].meta["answer"])

# %% [markdown]
# What this cannot show: how the heads do it, or that other heads could not take over after training. Zero ablation
# also moves what later layers read away from what they know; the random heads are there to show how much of the
# damage is of that kind. And a needle can be answered by copying: this says nothing about questions that take more.

# %%
# the conclusion: the same few heads are found twice, and it is these that the answers hang on
agreed = scores.compare(again, k=10)
gain, low, high = check.gain("top", over="random")
by_layer = check.gain("top", over="random by layer")
print(f"shared top ten: {agreed.overlap}, by chance {agreed.expected_overlap:.1f}")
print(f"top against random: {gain:+.0%} [{low:+.0%}, {high:+.0%}]")
assert agreed.overlap >= 5
assert agreed.p_overlap < 0.01
assert check.group("as loaded")[0] >= 0.75
assert high < -0.3
assert by_layer[2] < 0
