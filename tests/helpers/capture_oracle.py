"""Prompts of random tokens, reductions of every kind, and oracles for tests of reading.

The oracles are patterns, replies, queries and keys computed by the model's own code alone.
"""

import contextlib

import torch

from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep
from interp.hooks.read.capture import model_inputs
from interp.testing.families import VOCAB

ROWS = [keep.mass("mark", 0), keep.entropy(), keep.lse(), keep.top_keys(2), keep.at(-1, 0), keep.mass(0, by_value=True)]
KEYS = [keep.columns("mean"), keep.columns("max"), keep.columns("sum", by_value=True)]
STREAMS = [keep.z(), keep.q(), keep.k(), keep.v()]


def prompts(lengths=(70, 90), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
    return Prompts.from_ids(ids, spans=[{"mark": (5, 9)} for _ in lengths])


def eager_patterns(model, batch):
    """Patterns [b l h q k] in columns, from the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(**model_inputs(model, batch), output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return torch.stack(out.attentions, 1)


def greedy(model, prompt, limit=32, tokenizer=None):
    """Ids that the model generates up to its end token or a newline, by plain forward passes without a cache."""
    ids = list(prompt.ids)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
        if token == model.generation_config.eos_token_id:
            break
        if tokenizer is not None and "\n" in tokenizer.decode([*ids[len(prompt) :], token]):
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


def content(model, prompt):
    """Queries and keys [l h q d] before any rotation, from the model's own projections or the norms after them.

    Keys are repeated for each query head that uses them. Module names are those of Llama, Qwen3 (norms) and GPT-2.
    """
    heads = model.config.num_attention_heads
    dims = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    names = [path.rpartition(".")[2] for path, _ in model.named_modules()]
    ends = ("q_norm", "k_norm") if "q_norm" in names else ("q_proj", "k_proj")
    sites = {ends[0]: "q", ends[1]: "k", "c_attn": "qkv"}
    found = {part: [] for part in "qkv"}

    def storing(parts):
        def store(module, args, out):
            for part, x in zip(parts, out.chunk(len(parts), -1), strict=True):
                heads_of = x.reshape(len(prompt), -1, dims).transpose(0, 1)
                found[part].append(heads_of.repeat_interleave(heads // len(heads_of), 0))

        return store

    with contextlib.ExitStack() as stack:
        for name, (_, module) in zip(names, model.named_modules(), strict=True):
            if name in sites:
                stack.callback(module.register_forward_hook(storing(sites[name])).remove)
        with torch.no_grad():
            model(torch.tensor([prompt.ids]), use_cache=False)
    return torch.stack(found["q"]), torch.stack(found["k"])
