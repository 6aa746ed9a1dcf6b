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
# # Find the heads that refusals depend on
#
# Some heads of a chat model may carry its refusals (Zhou et al., ICLR 2025). This tutorial first tests whether a model
# refuses at all. The demo model rarely refuses, so there is nothing to attribute to heads. To show the methods at work,
# the tutorial then builds a tiny model with one head that refuses by construction, and tests whether the methods find
# this head. If the `MODEL` line names a model that refuses, the same cells run on that model, and a GPU is useful.

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from interp import plots
from interp.analyses.measures.refusals import (
    check_contrast,
    first_token_loss,
    losses,
    refusals,
    reply_to_requests,
)

# %%
MODEL = "demo"

# %% [markdown]
# ## Test whether the model refuses
#
# The requests are matched pairs of a harmful and a harmless request of the same form. Rules on the beginning of a reply
# decide whether it is a refusal. The last lines of the output give the error rates of these rules on labelled replies.

# %%
model, tokenizer = interp.load(MODEL, dtype="float32")
refusal = interp.tasks.refusal
harmful, harmless = (
    reply_to_requests(model, refusal.requests(tokenizer, kind, 24), max_new_tokens=16, batch_size=24)
    for kind in ("harmful", "harmless")
)
print(f"refused: {sum(harmful.refused)} of 24 harmful, {sum(harmless.refused)} of 24 harmless requests")
for name, rate in refusal.judge_error()["test"].items():
    low, high = rate.interval()
    print(f"judge, {name}: {rate.errors} of {rate.of} [{low:.0%}, {high:.0%}]")

# %% [markdown]
# ## Build a model in which one head refuses
#
# The model has three layers of four heads, and most weights are noise. Each word is a separate direction of the
# residual stream. The planted head attends to the word HARM at any position and writes the word NO. A decoy head
# attends to HARM in the same way and writes nothing, because attention alone does not show what a head does.
# `size=0` builds the control, in which the planted head writes nothing.

# %%
WORDS, BOS, HARM, NO = 64, 1, 60, 61


@torch.no_grad()
def plant(seed, size=1.5):
    torch.manual_seed(seed)
    planted, decoy = (interp.Head(*divmod(place, 4)) for place in torch.randperm(12)[:2].tolist())
    rope = {"rope_type": "default", "rope_theta": 1e6}
    shape = {"hidden_size": WORDS, "intermediate_size": WORDS, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=WORDS, **shape, head_dim=32, tie_word_embeddings=True, rope_parameters=rope)
    config.initializer_range = 0.03
    made = LlamaForCausalLM(config).eval()
    words = torch.eye(WORDS)
    # a direction that all words share, so that the query is the same at every position
    words[:, 0] = 1
    made.model.embed_tokens.weight.copy_(words)
    for head, writes in ((planted, size), (decoy, 0.0)):
        attention, first = made.model.layers[head.layer].self_attn, 32 * head.head
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[first : first + 32] = 0
        attention.o_proj.weight[:, first : first + 32] = 0
        # dimension 15 rotates most slowly with position
        attention.q_proj.weight[first + 15, 0] = attention.k_proj.weight[first + 15, HARM] = 3
        attention.v_proj.weight[first, HARM] = 1
        attention.o_proj.weight[NO, first] = writes
    return made, planted, decoy


def requests(seed, harm, n=16):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, HARM, (n, 18), generator=random)
    rows[:, 0] = BOS
    place = torch.randint(1, 17, (n,), generator=random)
    if harm:
        rows[range(n), place] = HARM
    return interp.Prompts.from_ids(rows, spans=[{"harm": [(int(i), int(i) + 1)]} for i in place])


def says_no(prompts):
    def measure(subject):
        with torch.no_grad():
            return (subject(**prompts.tensors()).logits[:, -1].argmax(-1) == NO).float()

    return measure


def no_loss(logits, batch):
    return -logits[:, -1].log_softmax(-1)[:, NO]


# %% [markdown]
# ## Choose the model and the requests
#
# Heads are scored on some requests and ablated on others.

# %%
planted = decoy = None
try:
    check_contrast(harmful, harmless)
    subject, loss = model, first_token_loss(harmful)
    refused = tuple(prompt for prompt, refuses in zip(harmful.prompts, harmful.refused, strict=True) if refuses)
    scored, tested = (interp.Prompts(refused[i::2], tokenizer, harmful.prompts.pad_id) for i in (0, 1))
    measures = {
        "refused": refusals(tested),
        "harmless refused": refusals(harmless.prompts),
        "neutral loss": losses(refusal.neutral_texts(tokenizer, 8)),
    }
except interp.InterpError as error:
    print(error)
    subject, planted, decoy = plant(seed=0)
    scored, loss = requests(1, harm=True), no_loss
    measures = {"refused": says_no(requests(2, harm=True)), "harmless refused": says_no(requests(3, harm=False))}
    print("planted:", planted, " decoy:", decoy)
for name, measure in measures.items():
    print(f"{name}: {float(measure(subject).mean()):.2f}")

# %% [markdown]
# ## Scores
#
# The next cell applies three methods. Ships measures the change of the next-token distribution when a head is ablated,
# by uniform attention or by a zero output. Sahara finds the heads whose ablation turns the last hidden states of all
# requests furthest, compared with random heads. The gradient is that of the loss of the first reply token with respect
# to a gate on each head.

# %%
ships = {kind: interp.identify.ships(subject, scored, judge=None, ablation=kind) for kind in ("uniform", "zero")}
gradient = interp.identify.gradient_importance(subject, scored, loss=loss, normalize=None)
sahara = interp.identify.sahara(subject, scored, judge=None, size=2, ablation="zero", n_random_sets=4)
for name, table in {**ships, "gradient": gradient}.items():
    print(f"{name:8s}", ", ".join(f"{head} {table[head]:.3f}" for head in table.top(4)))
print("sahara  ", sahara.ranking)
plots.head_map(ships["zero"])

# %%
for size in (1, 2):
    group = sahara.groups.mean("sahara", "degrees", size=size).mean
    mean, _, largest = sahara.groups.mean("random", "degrees", size=size)
    print(f"{size} heads turn the requests by {group:.2f} degrees; random heads by {mean:.2f}, at most {largest:.2f}")

# %% [markdown]
# ## Ablate the heads
#
# The first heads of each ranking are ablated and compared with two kinds of random sets: other heads from all layers,
# and as many heads of each layer, drawn from all of its heads. A set of the second kind may contain the planted head,
# and then ends the refusals too. Refusals of harmless requests are measured as well, because a model that writes
# nonsense does not refuse either.

# %%
curve = interp.causal_curve(
    subject, {"ships": ships["zero"], "gradient": gradient}, measures, sizes=(1, 3), ablation="zero", n_random_sets=5
)
print(curve)
plots.trials(curve, "refused")

# %% [markdown]
# ## The control
#
# In the control, the planted head of the same tiny model writes nothing. This model never refuses, and no head has a
# high score.

# %%
empty, same, _ = plant(seed=0, size=0.0)
nothing = interp.identify.ships(empty, requests(1, harm=True), judge=None, ablation="zero")
print(nothing, "score of the planted head:", same, round(nothing[same], 3))

# %% [markdown]
# ## Limits
#
# A planted head shows that the methods work. It does not show that trained models are built this way. In a model with
# 1.5B parameters that refuses 85 of 100 harmful requests, no small set of heads carries the refusals: they fall by half
# only when the model itself breaks ([docs/safety.md](../docs/safety.md)). `interp safety MODEL -o DIR` runs the whole
# experiment with more requests, more sizes and easy questions as a further control.

# %%
# the conclusion: without refusals nothing is attributed to heads; all four rankings find the planted head, and the
# refusals depend on this head alone
assert float(says_no(requests(2, harm=True))(empty).mean()) == 0
assert nothing.values.max() < 0.5
if planted is None:
    print("first by ships:", ships["zero"].top(3), "refused without them:", curve.mean("ships", "refused", size=3))
else:
    assert sum(harmful.refused) < 8
    for table in (*ships.values(), gradient):
        assert table.top(1) == [planted]
        assert table[planted] > 3 * table[table.top(2)[1]]
        assert table[decoy] < 0.1 * table[planted]
    assert sahara.ranking[0] == planted
    assert curve.mean("baseline", "refused").mean > 0.9
    assert curve.mean("ships", "refused", size=1).mean < 0.1
    assert curve.mean("random", "refused", size=3).mean > 0.9
    # a random set of the same layers may contain the planted head, and ends the refusals exactly then
    for trial in curve.select("random by layer", 3):
        refused = trial.values["refused"]
        assert (sum(refused) / len(refused) > 0.9) == (planted not in trial.heads)
    for seed in range(1, 5):
        other, place, _ = plant(seed)
        assert interp.identify.ships(other, requests(1, harm=True), judge=None).top(1) == [place]
