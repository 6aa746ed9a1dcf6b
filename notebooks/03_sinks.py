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
# # Sinks, and two ways to steer them
#
# Many heads rest on the first token whatever it says: it is a sink. Which heads do, what the token gives them, and
# whether a model does better when attention is taken from sinks: ACT (Yu et al. 2406.15765) and ZeroTuning (Han et
# al. 2505.11739), each beside the model as loaded and beside the same edit in other heads.

# %%
import interp
from interp import plots, steer

# %%
MODEL = "demo"

# %%
model, tokenizer = interp.load(MODEL)

# %% [markdown]
# ## Sink heads
#
# The mean attention that the first token receives, from all later queries. Flat attention would give it the mean of
# 1/1, 1/2, ... 1/n, which is the control.

# %%
texts = interp.tasks.passages(tokenizer, n=4, length=256, seed=0)
scores = interp.identify.sinks(model, texts)
flat = sum(1 / n for n in range(1, 257)) / 256
print(scores)
print(f"{len(scores.heads())} of {len(scores)} heads above {scores.threshold}; flat attention would give {flat:.3f}")
plots.head_map(scores)

# %%
plots.positions(scores)

# %% [markdown]
# `by_value=True` weighs each key by the norm of its value: a head may look at the first token and take little from
# it. That holds on average and for about half of the sink heads, but not for those that rest on it most.

# %%
written = interp.identify.sinks(model, texts, by_value=True)
sink_heads = scores.heads()
looked, taken = (sum(table[head] for head in sink_heads) / len(sink_heads) for table in (scores, written))
little = [head for head in sink_heads if written[head] < scores[head] / 2]
print(f"mean over the sink heads: {looked:.2f} of the attention, {taken:.2f} of what is taken")
print(f"less than half of it is taken in {len(little)} of {len(sink_heads)}")
for head in scores.top(3):
    print(head, f"{scores[head]:.2f} of the attention, {written[head]:.2f} of what is taken")

# %% [markdown]
# ## ACT: less for sinks other than the first token
#
# ACT lowers keys that receive much attention without being the first token. Which heads to do this in is found by
# steering each head alone on a few prompts of the task's profile split; candidates are heads that had such sinks
# above, three of them or more. The replies are then judged on the test split, beside ten random heads, drawn freely
# and from the same layers.

# %%
task = interp.tasks.get("topic")
candidates = interp.HeadSet.from_mask(scores.extras["columns"].mean(0) >= 4)
profile = steer.profile(
    model, task.prompts(tokenizer, "profile", 4), steer.Act(beta=0.4), heads=candidates, start=1, keep=30
)
chosen = profile.heads(10)
print(len(candidates), "candidates;", chosen)
plots.gains(profile.scores)

# %%
test = task.prompts(tokenizer, "test", 24)
settings = {"judge": task.judge, "max_new_tokens": 4, "stop": task.stop, "draws": 1, "batch_size": 24}
act = steer.steer_check(model, test, steer.Act(beta=0.4, heads=chosen), **settings)
print(act)
plots.causal(act)

# %% [markdown]
# ## ZeroTuning: more or less for the first token
#
# The same for the first token itself, in all heads that the map above calls sinks, a stronger or a weaker one; the
# better of two strengths is chosen on the dev split by the probability of the right topic. Its control is the same
# edit in as many heads that are no sinks.

# %%
strengths = {f"gamma {gamma}": steer.ZeroTuning(gamma, heads=sink_heads) for gamma in (0.2, 5.0)}
ranked = steer.choose(model, task.prompts(tokenizer, "dev", 12), strengths)
for choice in ranked:
    print(f"{choice.name:10s} {choice.score:+.2f} [{choice.low:+.2f}, {choice.high:+.2f}] nats per token")
best = next(choice for choice in ranked if choice.name in strengths)

# %%
zero = steer.steer_check(model, test, best.edit, **settings)
print(best.name)
print(zero)

# %% [markdown]
# ## What came of it


# %%
def told(check, over):
    gain, low, high = check.gain("steered", over=over)
    verdict = "gains" if low > 0 else "loses" if high < 0 else "not told apart"
    return f"{gain:+.0%} [{low:+.0%}, {high:+.0%}] {verdict}"


for name, check in (("ACT", act), ("ZeroTuning", zero)):
    for over in check.groups:
        if over != "steered":
            print(f"{name:10s} against {over:15s} {told(check, over)}")

# %% [markdown]
# Two dozen items, one draw of random heads and one wording of one task: where an interval holds zero, nothing was
# shown. [docs/steering.md](../docs/steering.md) has more items and a second model. A score says where heads look; it
# does not say that a sink is useless, since a head may rest on the first token and still write.

# %%
# the conclusion: sinks are no effect of averaging, less is taken from them than they are looked at, and steering ten
# profiled heads, or the sink heads, does other things than steering as many others
assert scores[scores.top(1)[0]] > 0.8 > 10 * flat
assert len(sink_heads) > 0.25 * len(scores)
assert taken < 0.8 * looked
assert act.gain("steered", over="as loaded")[0] >= 0.1
assert act.gain("steered", over="random")[0] > 0
assert act.gain("steered", over="random by layer")[0] > 0
assert zero.gain("steered", over="random")[0] > 0
