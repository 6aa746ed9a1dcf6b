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
# # Beside TransformerLens
#
# `interp.bridge(model)` is a TransformerLens bridge over the model as it is loaded, whose attention runs on the
# model's own fast path. TransformerLens' tools run on it unchanged. Here its activation patching and its direct logit
# attribution give the same numbers as on its plain bridge over a second copy of the weights, and then both are timed
# as prompts get longer.

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
from interp.analyses.identify._prompt_pairs import logit_difference

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL, dtype="float32")
open_bridges = ExitStack()
ours = open_bridges.enter_context(interp.bridge(model, tokenizer))

copy, _ = interp.load(MODEL, dtype="float32")
plain = TransformerBridge.boot_transformers(MODEL, hf_model=copy, tokenizer=tokenizer)

# %% [markdown]
# ## A task
#
# Pairs of sentences that differ in one name, so that the right answer becomes the wrong one. The metric is the logit
# of the right name less that of the wrong one. TransformerLens takes batches of one length.

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
    print(f"clean {float(difference(ours(tokens))):+.2f}, corrupt {float(difference(ours(corrupt_tokens))):+.2f}")
    apart = float((ours(tokens) - plain(tokens)).abs().max())
print(f"largest difference of a logit between the two bridges: {apart:.1e}")

# %% [markdown]
# ## Activation patching
#
# First all heads at once by `interp.identify`, where each forward begins at the layer that is patched. Then
# TransformerLens' own function on both bridges, for the three layers with the best heads.

# %%
scores = interp.identify.activation_patching(ours, clean, corrupt, normalize=False)
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


effects = {"ours": patched(ours), "plain": patched(plain)}
effects["identify"] = torch.tensor([scores[layer, head] for layer, head in heads.to_numpy().tolist()])
patching_apart = {name: float((value - effects["plain"]).abs().max()) for name, value in effects.items()}
print("layers", layers, "largest effect", round(float(effects["plain"].abs().max()), 3))
print("furthest from the plain bridge:", {name: f"{value:.1e}" for name, value in patching_apart.items()})

# %% [markdown]
# The control beside "these heads carry the answer": the first five heads patched together, from the corrupt run into
# the clean one, beside five random ones of the same layers.

# %%
five = scores.heads(top=5)
drawn = [scores.random_like(five, seed, "layer") for seed in range(6)]
swept = sweep_sets(
    ours,
    clean,
    [interp.HeadSet(), five, *drawn],
    interp.Intervention("patch", reference=corrupt),
    lambda logits, batch: logit_difference(logits, batch.prompts),
)
as_loaded, with_five, *with_random = swept.values.mean(0).tolist()
print(f"as loaded {as_loaded:+.2f}; {five} patched {with_five:+.2f}")
print("random ones patched", ", ".join(f"{value:+.2f}" for value in with_random))

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


direct = {"ours": attributed(ours), "plain": attributed(plain)}
table = interp.identify.logit_attribution(ours, clean)
direct["identify"] = table.values.flatten()
direct_apart = {name: float((value - direct["plain"]).abs().max()) for name, value in direct.items()}
print("largest", round(float(direct["plain"].abs().max()), 3), {name: f"{v:.1e}" for name, v in direct_apart.items()})
plots.scatter(scores, table)

# %% [markdown]
# ## Patterns
#
# A pattern is made where it is asked for, and is the same.

# %%
with torch.no_grad():
    name = f"blocks.{layers[0]}.attn.hook_pattern"
    (_, mine), (_, theirs) = (bridge.run_with_cache(tokens, names_filter=name) for bridge in (ours, plain))
pattern_apart = float((mine[name] - theirs[name]).abs().max())
print(tuple(mine[name].shape), f"{pattern_apart:.1e}")

# %% [markdown]
# ## At length
#
# TransformerLens' own attention makes every pattern, n x n. On the fast path a pattern is made only where something
# hooks it. The same call on both: run, and keep what every head writes. On a CPU its own seconds are counted, so that
# other programs on the machine weigh little.


# %%
def seconds(bridge, n):
    ids = interp.tasks.passages(tokenizer, n=1, length=n).tensors(model.device)["input_ids"]
    clock = time.perf_counter if ids.is_cuda else time.process_time
    started = clock()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_z"), return_type=None)
        # a GPU is waited for
        float(next(iter(cache.values())).sum())
    return clock() - started


for bridge in (ours, plain):
    # first calls take longer
    seconds(bridge, 64)
lengths = (512, 2048)
took = {name: [seconds(bridge, n) for n in lengths] for name, bridge in (("ours", ours), ("plain", plain))}
for i, n in enumerate(lengths):
    ratio = took["plain"][i] / took["ours"][i]
    print(f"{n:6,} tokens: ours {took['ours'][i]:5.2f} s, plain {took['plain'][i]:5.2f} s, {ratio:.1f} times")

# %% [markdown]
# At 4,096 tokens, with statistics of all patterns, the plain bridge took 5.5 times a plain forward and 2.6 GB more
# ([docs/reading.md](../docs/reading.md)). What this cannot show: that heads do the task. A patched head may act
# through any later one, and attribution leaves out all that later layers make of what a head writes, which is why the
# two tables agree only in part.

# %%
# closing the bridge leaves the model as it was
open_bridges.close()
with torch.no_grad():
    again = float((model(tokens).logits - plain(tokens)).abs().max())

# %%
# the conclusion: the same numbers from TransformerLens' tools on both bridges and from interp.identify, in less time
assert max(apart, again) < 1e-3
assert float(effects["plain"].abs().max()) > 0.5
assert max(patching_apart.values()) < 1e-3
assert float(direct["plain"].abs().max()) > 0.5
assert max(direct_apart.values()) < 1e-3
assert pattern_apart < 1e-4
assert with_five < as_loaded - 1
assert as_loaded - with_five > 2 * max(as_loaded - value for value in with_random)
assert took["plain"][-1] > 1.3 * took["ours"][-1]
