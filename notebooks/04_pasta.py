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
# # PASTA: point the model at what counts
#
# A user marks a part of the prompt, and some heads attend less to everything else (Zhang et al. 2311.02262). All
# heads at once is usually too much: which ones to steer is found by steering each alone. The task is one where this
# helps this model: the prompt says that a well-known fact has changed, and the reply should follow the prompt.

# %%
import interp
from interp import plots, steer

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL)
task = interp.tasks.get("counterfact")
find, dev, test = (task.prompts(tokenizer, split, n) for split, n in (("profile", 6), ("dev", 12), ("test", 24)))

# %% [markdown]
# The marked span is the new fact. The three splits share no items: heads are found on the first, their number is
# chosen on the second, and replies are judged on the third.

# %%
one = test[0]
start, stop = one.spans["mark"][0]
print(one.text)
print("\nmarked:", tokenizer.decode(one.ids[start:stop]))
print("right: ", one.meta["right"], " wrong:", one.meta["wrong"])

# %% [markdown]
# ## Which heads
#
# `steer.profile` steers each head alone and measures what the right answer gains over the wrong one, in rounds: after
# a round the better half stays and meets more prompts. A prompt is read once for all heads, from the first layer that
# changes.

# %%
pasta = steer.Pasta("mark", alpha=0.01)
profile = steer.profile(model, find, pasta, start=1, keep=40)
print(profile.scores.settings["rounds"], "heads and prompts of the rounds")
print({what: round(count) for what, count in profile.cost.items()})
plots.gains(profile.scores)

# %% [markdown]
# ## How many
#
# The same prompts under sets of growing size, and under all heads. The score is a margin: how much more probable the
# right answer is than the wrong one, in nats per token. Margins are cheap, but what counts is the reply, so the best
# of them still has to stand the test below.

# %%
sizes = {f"top {k}": steer.Pasta("mark", alpha=0.01, heads=profile.heads(k)) for k in (10, 25, 50)}
ranked = steer.choose(model, dev, sizes | {"all heads": pasta})
for choice in ranked:
    print(f"{choice.name:10s} {choice.score:+.2f} [{choice.low:+.2f}, {choice.high:+.2f}]")
best = next(choice for choice in ranked if choice.name in sizes)

# %% [markdown]
# ## Does it help
#
# Greedy replies to items that neither heads nor settings were chosen on: as loaded, steered, and with the same edit
# in as many random heads.

# %%
check = steer.steer_check(
    model, test, best.edit, judge=task.judge, max_new_tokens=6, stop=task.stop, draws=1, batch_size=24
)
print(best.name)
print(check)
plots.causal(check)

# %%
for outcome in check.outcomes:
    print(f"{outcome.condition.group:16s} {[reply.strip() for reply in outcome.replies[:4]]}")
print("expected         ", [prompt.meta["answer"] for prompt in test[:4]])

# %% [markdown]
# Heads drawn from the whole model do not help, and other heads of the same layers do harm: to point a head that does
# something else at the new fact breaks what it does. So which heads are steered decides, not that some are.
#
# What this cannot show: that PASTA helps elsewhere. On this model it does not help to write JSON
# ([docs/steering.md](../docs/steering.md)). A judge sees the reply alone, and two dozen items leave wide intervals;
# the heads are those of six prompts and would not all be found again on six others.

# %%
# the conclusion: replies follow the marked fact, and they do so in profiled heads, not in any
for over in ("as loaded", "random", "random by layer"):
    gain, low, high = check.gain("steered", over=over)
    print(f"steered against {over:15s} {gain:+.0%} [{low:+.0%}, {high:+.0%}]")
    assert low > 0
assert check.group("steered")[0] >= 0.75
