"""The literal rules of the steering papers, on probabilities, in an eager attention of the tests' own."""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "literal"


@contextlib.contextmanager
def literal(model, rule):
    """Run the model with rule(layer, pattern [b h q k]) -> pattern in place of its attention probabilities."""

    def attend(module, query, key, value, mask, scaling=None, softcap=None, **_):
        each = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        score = query @ key.transpose(-1, -2) * scale
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if mask is not None:
            score = score + mask[..., : key.shape[2]]
        pattern = rule(module.layer_idx, score.softmax(-1))
        return (pattern @ value).transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def weighed(pattern, weight):
    """Multiply by weight, broadcast to [b h q k], and renormalise."""
    changed = pattern * weight
    return changed / changed.sum(-1, keepdim=True)


def pasta(pattern, marked, prompt, alpha):
    """Equation 2: alpha off the span, over prompt keys."""
    return weighed(pattern, torch.where(prompt & ~marked, alpha, 1.0)[:, None, None])


def zero(pattern, first, gamma):
    return weighed(pattern, torch.where(first, gamma, 1.0)[:, None, None])


def spotlight(pattern, marked, target):
    """Rows that give the span less than target give it target, the rest keeps its proportions."""
    span = (pattern * marked[:, None, None]).sum(-1, keepdim=True)
    raised = torch.where(marked[:, None, None], pattern * target / span, pattern * (1 - target) / (1 - span))
    return torch.where((span > 1e-30) & (span < target), raised, pattern)


def act(pattern, rows, inside, first, limit, beta):
    """Sinks by column means over the rows that see them; mass taken from them and spread over the rest of the row."""
    q, k = pattern.shape[2:]
    causal = (torch.arange(k)[None] <= torch.arange(q)[:, None] + k - q)[None] & rows[:, :, None] & inside[:, None]
    seen = causal.sum(1)
    received = (pattern * rows[:, None, :, None]).sum(2) / seen.clamp(min=1)[:, None]
    sinks = (received > limit[:, None, None]) & (inside & ~first)[:, None]
    on = sinks[:, :, None].to(pattern.dtype)
    s, rest = (pattern * on).sum(-1, keepdim=True), (pattern * (1 - on)).sum(-1, keepdim=True)
    spread = pattern * on * beta + pattern * (1 - on) * (1 + (1 - beta) * s / rest.clamp(min=1e-9))
    return torch.where(rest < 1e-6, pattern, spread), sinks, received
