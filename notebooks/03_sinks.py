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
# # Find attention sinks and steer them with ACT and ZeroTuning
#
# Many heads attend mostly to the first token, whatever that token is. Such a token is called an attention sink. This
# tutorial finds the heads that have a sink, and measures how much the sink contributes to their output. It then tests
# two methods that change the attention to sinks: ACT (Yu et al. 2406.15765) and ZeroTuning (Han et al. 2505.11739).
# Each is compared with the unmodified model and with the same edit in other heads.

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
# The score is the mean attention that the first token receives from all later queries. As a control, uniform attention
# would give the first token the mean of 1/1, 1/2, ... 1/n.

# %%
texts = interp.tasks.passages(tokenizer, n=4, length=256, seed=0)
scores = interp.identify.sinks(model, texts)
flat = sum(1 / n for n in range(1, 257)) / 256
print(scores)
print(f"{len(scores.heads())} of {len(scores)} heads above {scores.threshold}; uniform attention would give {flat:.3f}")
plots.head_map(scores)

# %%
plots.positions(scores)

# %% [markdown]
# A head may attend to the first token and still read little from it. `by_value=True` therefore weights each key by the
# norm of its value vector. On average, and for about half of the sink heads, the first token has a smaller share by
# this measure. This does not hold for the heads with the strongest sinks.

# %%
by_value = interp.identify.sinks(model, texts, by_value=True)
sink_heads = scores.heads()
attention, weighted = (sum(table[head] for head in sink_heads) / len(sink_heads) for table in (scores, by_value))
smaller = [head for head in sink_heads if by_value[head] < scores[head] / 2]
print(f"mean over the sink heads: {attention:.2f} of the attention, {weighted:.2f} weighted by value norm")
print(f"the weighted share is less than half of the attention in {len(smaller)} of {len(sink_heads)} sink heads")
for head in scores.top(3):
    print(head, f"{scores[head]:.2f} of the attention, {by_value[head]:.2f} weighted by value norm")

# %% [markdown]
# ## ACT: reduce attention to sinks other than the first token
#
# ACT reduces the attention to keys that receive much attention and are not the first token. To choose the heads, each
# candidate head is steered alone on a few prompts of the task's profile split. Candidates are the heads that had at
# least three such sinks on the texts above. The replies are then judged on the test split. The controls are random sets
# of ten heads: three sets of heads that were not chosen, from the whole model, and up to 39 sets for a test, with as
# many heads in each layer as the chosen set.

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
settings = {"judge": task.judge, "max_new_tokens": 4, "stop": task.stop, "n_random_sets": 39, "batch_size": 24}
act = steer.steer_check(model, test, steer.Act(beta=0.4, heads=chosen), **settings)
print(act)
plots.trials(act)

# %% [markdown]
# ## ZeroTuning: increase or reduce attention to the first token
#
# ZeroTuning scales the attention to the first token itself, here in all heads that were found as sink heads above. The
# better of two strengths is chosen on the dev split, by the probability of the right topic. The controls are the
# same two kinds of random sets. Drawing stops early where further sets cannot change the verdict.

# %%
strengths = {f"gamma {gamma}": steer.ZeroTuning(gamma, heads=sink_heads) for gamma in (0.2, 5.0)}
ranked = steer.choose(model, task.prompts(tokenizer, "dev", 12), strengths)
for setting in ranked:
    print(f"{setting.name:10s} {setting.score:+.2f} [{setting.low:+.2f}, {setting.high:+.2f}] nats per token")
best = next(setting for setting in ranked if setting.name in strengths)

# %%
zero = steer.steer_check(model, test, best.edits, **settings)
print(best.name)
print(zero)

# %% [markdown]
# ## Compare the effects
#
# The unit of the test is the head set, because the random heads were drawn as sets. "Beyond 39 of 39" means that fewer
# replies are right under each of the 39 random sets than under the chosen set. The verdict comes from this test. The
# intervals show how far a difference may move with other items and sets, and may contain zero all the same.

# %%
for name, trials in (("ACT", act), ("ZeroTuning", zero)):
    test_of_set = trials.set_test("steered")
    word = "better than random heads" if test_of_set.is_beyond else "not distinguishable from random heads"
    print(f"{name}: beyond {test_of_set.n_beyond} of {test_of_set.n_sets} sets, p = {test_of_set.p_value:.3f}, {word}")
    for over in ("baseline", "random", "random by layer"):
        gain, low, high = trials.gain("steered", over=over)
        print(f"    compared with {over:15s} {gain:+.0%} [{low:+.0%}, {high:+.0%}]")

# %% [markdown]
# ## Limits
#
# The test uses two dozen items and one wording of one task. [docs/steering.md](../docs/steering.md) reports more items
# and a second model. The heads of ZeroTuning are half of all heads, so the random sets share many heads with them,
# and a difference is hard to find. The result does not show that ZeroTuning has no effect. The score shows where heads
# attend. It does not show that a sink is useless, because a head may attend to the first token and still contribute to
# the output.

# %%
# the conclusion: sink heads attend far more to the first token than uniform attention would, they read less from it
# than they attend to it, and more replies are right when chosen heads are steered with ACT than when random heads are
assert scores[scores.top(1)[0]] > 0.8 > 10 * flat
assert len(sink_heads) > 0.25 * len(scores)
assert weighted < 0.8 * attention
assert act.gain("steered", over="baseline").mean >= 0.1
assert act.set_test("steered").is_beyond
assert zero.gain("steered", over="baseline").mean > 0
