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
# # Which heads refusals hang on
#
# Some heads of a chat model may carry its refusals (Zhou et al., ICLR 2025). This notebook asks first whether a model
# refuses at all. The demo model hardly does, so there is nothing to attribute and the notebook says so. To show what
# the methods do where there *is* something, it then builds a tiny model with one head that refuses by construction,
# and asks whether they find that head. With a model that refuses in the `MODEL` line, all that follows runs on that
# model, on the same lines; a GPU is then of use.

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from interp import plots
from interp.analyses.measures.refusals import ask, check_contrast, first_token_loss, losses, refusals

# %%
MODEL = "demo"

# %% [markdown]
# ## Does it refuse?
#
# Requests in matched pairs, harmful and harmless ones of the same form. A reply counts as a refusal by rules on its
# beginning, which err now and then: the table says how often on labelled replies.

# %%
model, tokenizer = interp.load(MODEL, dtype="float32")
refusal = interp.tasks.refusal
harmful, harmless = (
    ask(model, refusal.requests(tokenizer, kind, 24), max_new_tokens=16, batch_size=24)
    for kind in ("harmful", "harmless")
)
print(f"refused: {sum(harmful.verdicts)} of 24 harmful, {sum(harmless.verdicts)} of 24 harmless requests")
for name, rate in refusal.judge_error()["test"].items():
    low, high = rate.interval()
    print(f"judge, {name}: {rate.errors} of {rate.of} [{low:.0%}, {high:.0%}]")

# %% [markdown]
# ## A model in which one head refuses
#
# Three layers of four heads, mostly noise. A word is a direction of its own. The planted head looks for the word
# HARM, wherever it stands, and writes the word NO. A decoy looks for HARM just as hard and writes nothing: where a
# head looks is not what it does. `size=0` is the control, the same model with nothing written.

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
    # what all words have in common, for a query that is the same everywhere
    words[:, 0] = 1
    made.model.embed_tokens.weight.copy_(words)
    for head, writes in ((planted, size), (decoy, 0.0)):
        attention, first = made.model.layers[head.layer].self_attn, 32 * head.head
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[first : first + 32] = 0
        attention.o_proj.weight[:, first : first + 32] = 0
        # dimension 15 turns slowest with position
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
# ## What is looked at from here on
#
# Heads are scored on some requests and taken out on others.

# %%
planted = decoy = None
try:
    check_contrast(harmful, harmless)
    subject, loss = model, first_token_loss(harmful)
    refused = tuple(prompt for prompt, verdict in zip(harmful.prompts, harmful.verdicts, strict=True) if verdict)
    found_on, tried_on = (interp.Prompts(refused[i::2], tokenizer, harmful.prompts.pad_id) for i in (0, 1))
    measures = {
        "refused": refusals(tried_on),
        "harmless refused": refusals(harmless.prompts),
        "neutral loss": losses(refusal.neutral_texts(tokenizer, 8)),
    }
except interp.InterpError as none:
    print("As loaded:", none)
    subject, planted, decoy = plant(seed=0)
    found_on, loss = requests(1, harm=True), no_loss
    measures = {"refused": says_no(requests(2, harm=True)), "harmless refused": says_no(requests(3, harm=False))}
    print("planted:", planted, " decoy:", decoy)
for name, measure in measures.items():
    print(f"{name}: {float(measure(subject).mean()):.2f}")

# %% [markdown]
# ## Scores
#
# Ships: how far the next token moves when a head is out, by flat attention or by no output. Sahara: the head whose
# absence turns all requests' last states furthest, beside random heads. And the slope of the first token's loss with
# a gate on the head.

# %%
ships = {kind: interp.identify.ships(subject, found_on, ablation=kind) for kind in ("uniform", "zero")}
slope = interp.identify.gradient_importance(subject, found_on, loss=loss, normalize=None)
sahara = interp.identify.sahara(subject, found_on, size=2, ablation="zero", draws=4)
for name, table in {**ships, "slope": slope}.items():
    print(f"{name:8s}", ", ".join(f"{head} {table[head]:.3f}" for head in table.top(4)))
print("sahara  ", sahara.ranking)
plots.head_map(ships["zero"])

# %%
for size in (1, 2):
    grown, (mean, _, largest) = sahara.at("sahara", size)[0], sahara.at("random", size)
    print(f"{size} heads turn the requests by {grown:.2f} degrees; random ones by {mean:.2f}, at most {largest:.2f}")

# %% [markdown]
# ## Taken out
#
# The first heads of each ranking are taken out, beside random ones. What else breaks is measured too: a model that
# writes nonsense does not refuse either.

# %%
curve = interp.causal_curve(
    subject, {"ships": ships["zero"], "slope": slope}, measures, sizes=(1, 3), kind="zero", draws=5
)
print(curve)
plots.curve(curve, "refused")

# %% [markdown]
# ## The control
#
# The same tiny model whose planted head writes nothing: it never refuses, and no head stands out.

# %%
empty, same, _ = plant(seed=0, size=0.0)
nothing = interp.identify.ships(empty, requests(1, harm=True), ablation="zero")
print(nothing, "planted place:", same, round(nothing[same], 3))

# %% [markdown]
# A planted head shows that the methods work, not that models are built this way. In a model of 1.5B that refuses 85
# of 100 harmful requests, no few heads hold the refusals: they fall to half only where the model itself breaks
# ([docs/safety.md](../docs/safety.md)). `interp safety MODEL -o DIR` does all of this with more requests, more sizes
# and easy questions as a further control.

# %%
# the conclusion: without refusals nothing is attributed; with a planted head all four find it, and it alone is needed
assert float(says_no(requests(2, harm=True))(empty).mean()) == 0
assert nothing.values.max() < 0.5
if planted is None:
    print("first by ships:", ships["zero"].top(3), "refused without them:", curve.at("ships", 3, "refused"))
else:
    assert sum(harmful.verdicts) < 8
    for table in (*ships.values(), slope):
        assert table.top(1) == [planted]
        assert table[planted] > 3 * table[table.top(2)[1]]
        assert table[decoy] < 0.1 * table[planted]
    assert sahara.ranking[0] == planted
    assert curve.at("as loaded", 0, "refused")[0] > 0.9
    assert curve.at("ships", 1, "refused")[0] < 0.1
    assert curve.at("random", 3, "refused")[0] > 0.9
    assert curve.at("random by layer", 3, "refused")[0] > 0.9
    for seed in range(1, 5):
        other, place, _ = plant(seed)
        assert interp.identify.ships(other, requests(1, harm=True)).top(1) == [place]
