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
# # Use the tools of TransformerLens on the model that you run
#
# `interp.bridge(model)` is a TransformerLens bridge over a loaded model. Its attention runs on the fast path of the
# model, and the tools of TransformerLens run on it unchanged. In this tutorial, activation patching and direct logit
# attribution give the same numbers on this bridge as on the plain bridge of TransformerLens over a second copy of the
# weights. Then both bridges are timed on prompts of growing length.

# %%
import time
from contextlib import ExitStack

import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

import interp
from interp import plots
from interp.analyses.causal.sweep import sweep_sets
from interp.analyses.measures.answer_logits import logit_difference

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL, dtype="float32")
open_bridges = ExitStack()
fast = open_bridges.enter_context(interp.bridge(model, tokenizer))

copy, _ = interp.load(MODEL, dtype="float32")
plain = TransformerBridge.boot_transformers(MODEL, hf_model=copy, tokenizer=tokenizer)

# %% [markdown]
# ## A task
#
# The prompts are pairs of sentences that differ in one name, so that the right answer for one is the wrong answer for
# the other. The metric is the logit of the right name minus that of the wrong one. TransformerLens takes batches of
# prompts of one length.

# %%
clean, corrupt = interp.tasks.ioi(tokenizer, n=12, seed=0)
length = max(set(clean.lengths), key=clean.lengths.count)
same = [i for i, n in enumerate(clean.lengths) if n == length][:3]
clean, corrupt = (interp.Prompts(tuple(side[i] for i in same), tokenizer, side.pad_id) for side in (clean, corrupt))
print(clean[0].text, "|", clean[0].meta["right"][0])
print(corrupt[0].text, "|", corrupt[0].meta["right"][0])
right, wrong = (
    torch.tensor([tokenizer(prompt.meta[side][0], add_special_tokens=False)["input_ids"][0] for prompt in clean])
    for side in ("right", "wrong")
)


def difference(logits):
    last = logits[:, -1].cpu()
    return (last.gather(1, right[:, None]) - last.gather(1, wrong[:, None])).mean()


tokens, corrupt_tokens = (side.tensors(model.device)["input_ids"] for side in (clean, corrupt))
with torch.no_grad():
    print(f"clean {float(difference(fast(tokens))):+.2f}, corrupt {float(difference(fast(corrupt_tokens))):+.2f}")
    logit_error = float((fast(tokens) - plain(tokens)).abs().max())
print(f"largest difference of a logit between the two bridges: {logit_error:.1e}")

# %% [markdown]
# ## Activation patching
#
# `interp.identify` patches every head, and each forward pass begins at the patched layer. The function of
# TransformerLens then patches the heads of three layers with high scores, on both bridges.

# %%
scores = interp.identify.activation_patching(fast, clean, corrupt, normalize=False)
print(scores)
plots.head_map(scores)

# %%
layers = sorted({head.layer for head in scores.top(6)})[:3]
heads = pd.DataFrame([(layer, head) for layer in layers for head in range(scores.n_heads)], columns=["layer", "head"])


def patched(bridge):
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))
        values = patching.generic_activation_patch(
            bridge, corrupt_tokens, cache, difference, patching.layer_head_vector_patch_setter, "z", index_df=heads
        )
        return values.cpu() - difference(bridge(corrupt_tokens))


effects = {"fast": patched(fast), "plain": patched(plain)}
effects["identify"] = torch.tensor([scores[layer, head] for layer, head in heads.to_numpy().tolist()])
patching_errors = {name: float((value - effects["plain"]).abs().max()) for name, value in effects.items()}
print("layers", layers, "largest effect", round(float(effects["plain"].abs().max()), 3))
print("largest difference from the plain bridge:", {name: f"{value:.1e}" for name, value in patching_errors.items()})

# %% [markdown]
# The effects of single heads do not show that the best heads carry the answer together. The next cell patches the five
# best heads at once, from the corrupt run into the clean one. The controls are five random heads of the same layers.

# %%
five = scores.heads(top=5)
drawn = [scores.random_like(five, seed, "layer") for seed in range(6)]
swept = sweep_sets(
    fast,
    clean,
    [interp.HeadSet(), five, *drawn],
    interp.Intervention("patch", reference=corrupt),
    lambda logits, batch: logit_difference(logits, batch.prompts),
)
baseline, with_five, *with_random = swept.values.mean(0).tolist()
print(f"baseline {baseline:+.2f}; {five} patched {with_five:+.2f}")
print("random heads patched", ", ".join(f"{value:+.2f}" for value in with_random))

# %% [markdown]
# ## Direct logit attribution


# %%
def attributed(bridge):
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        written = cache.stack_head_results(layer=-1, pos_slice=-1)
        written = cache.apply_ln_to_stack(written, layer=-1, pos_slice=-1) * bridge.ln_final.weight
        toward = bridge.W_U[:, right] - bridge.W_U[:, wrong]
        return torch.einsum("cbm,mb->c", written, toward).cpu() / len(right)


direct = {"fast": attributed(fast), "plain": attributed(plain)}
table = interp.identify.logit_attribution(fast, clean)
direct["identify"] = table.values.flatten()
direct_errors = {name: float((value - direct["plain"]).abs().max()) for name, value in direct.items()}
print("largest", round(float(direct["plain"].abs().max()), 3), {name: f"{v:.1e}" for name, v in direct_errors.items()})
plots.scatter(scores, table)

# %% [markdown]
# ## Patterns
#
# The fast bridge computes a pattern only where a hook reads it. The pattern is the same.

# %%
with torch.no_grad():
    name = f"blocks.{layers[0]}.attn.hook_pattern"
    (_, of_fast), (_, of_plain) = (bridge.run_with_cache(tokens, names_filter=name) for bridge in (fast, plain))
pattern_error = float((of_fast[name] - of_plain[name]).abs().max())
print(tuple(of_fast[name].shape), f"largest difference {pattern_error:.1e}")

# %% [markdown]
# ## Time on long prompts
#
# The attention of TransformerLens computes every n x n pattern. The fast path computes a pattern only where a hook
# reads it. The next cell times the same call on both bridges: a forward pass that keeps the output of every head. On a
# CPU, process time is measured, so that other programs on the machine have little influence.


# %%
def seconds(bridge, n):
    ids = interp.tasks.passages(tokenizer, n=1, length=n).tensors(model.device)["input_ids"]
    clock = time.perf_counter if ids.is_cuda else time.process_time
    started = clock()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_z"), return_type=None)
        # wait for the GPU
        float(next(iter(cache.values())).sum())
    return clock() - started


for bridge in (fast, plain):
    # first calls take longer
    seconds(bridge, 64)
lengths = (512, 2048)
took = {name: [seconds(bridge, n) for n in lengths] for name, bridge in (("fast", fast), ("plain", plain))}
for i, n in enumerate(lengths):
    ratio = took["plain"][i] / took["fast"][i]
    print(f"{n:6,} tokens: fast {took['fast'][i]:5.2f} s, plain {took['plain'][i]:5.2f} s, ratio {ratio:.1f}")

# %% [markdown]
# At 4,096 tokens, with statistics of all patterns, the plain bridge took 5.5 times as long as a forward pass of
# transformers and 2.6 GB more memory ([docs/reading.md](../docs/reading.md)).
#
# ## Limits
#
# The numbers do not show that these heads do the task alone. A patched head may act through any later head, and direct
# attribution ignores how later layers use the output of a head. The two tables therefore agree only in part.

# %%
# closing the bridge leaves the model as it was
open_bridges.close()
with torch.no_grad():
    again = float((model(tokens).logits - plain(tokens)).abs().max())

# %%
# the conclusion: the tools of TransformerLens give the same numbers on both bridges and in interp.identify, and they
# take less time on the fast bridge
assert max(logit_error, again) < 1e-3
assert float(effects["plain"].abs().max()) > 0.5
assert max(patching_errors.values()) < 1e-3
assert float(direct["plain"].abs().max()) > 0.5
assert max(direct_errors.values()) < 1e-3
assert pattern_error < 1e-4
assert with_five < baseline - 1
assert baseline - with_five > 2 * max(baseline - value for value in with_random)
assert took["plain"][-1] > 1.3 * took["fast"][-1]
