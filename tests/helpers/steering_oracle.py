"""The literal rules of the steering papers, on probabilities, in an eager attention of the tests' own; their batch."""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs
from interp.testing.families import VOCAB

NAME = "literal"


@contextlib.contextmanager
def literal(model, rule=None, keys=None, outputs=None):
    """Run the model with rule(layer, pattern [b h q k]) -> pattern in place of its attention probabilities, and with
    keys(layer, key [b h k d]) or outputs(layer, z [b h q d]) in place of its keys or of what heads write.

    A learned sink is one more key, the last, for the rule to see.
    """

    def same(layer, x):
        return x

    rule, keys, outputs = rule or same, keys or same, outputs or same

    def attend(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
        each = query.shape[1] // key.shape[1]
        key, value = keys(module.layer_idx, key.repeat_interleave(each, 1)), value.repeat_interleave(each, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        score = query @ key.transpose(-1, -2) * scale
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if mask is not None:
            score = score + mask[..., : key.shape[2]]
        if s_aux is not None:
            score = torch.cat([score, s_aux[None, :, None, None].expand(*score.shape[:3], 1)], -1)
        pattern = rule(module.layer_idx, score.softmax(-1))[..., : key.shape[2]]
        return outputs(module.layer_idx, pattern @ value).transpose(1, 2), None

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


def sinks(pattern, rows, inside, first, limit):
    """Sinks [b h k] by column means over the rows that see them, and these means."""
    q, k = pattern.shape[2:]
    causal = (torch.arange(k)[None] <= torch.arange(q)[:, None] + k - q)[None] & rows[:, :, None] & inside[:, None]
    received = (pattern * rows[:, None, :, None]).sum(2) / causal.sum(1).clamp(min=1)[:, None]
    return (received > limit[:, None, None]) & (inside & ~first)[:, None], received


def act(pattern, rows, inside, first, limit, beta):
    """Mass taken from the sinks and spread over the rest of the row."""
    found, received = sinks(pattern, rows, inside, first, limit)
    on = found[:, :, None].to(pattern.dtype)
    s, rest = (pattern * on).sum(-1, keepdim=True), (pattern * (1 - on)).sum(-1, keepdim=True)
    spread = pattern * on * beta + pattern * (1 - on) * (1 + (1 - beta) * s / rest.clamp(min=1e-9))
    return torch.where(rest < 1e-6, pattern, spread), found, received


def key_scale(key, first, factor):
    """The first token's key [b h k d] times the factor."""
    return torch.where(first[:, None, :, None], key * factor, key)


def redistribute(pattern, drained, span, rows, keep, least, share):
    """VAR: sinks keep a part, what they lose goes to the span's other keys in proportion, where a head looks at the
    span. Also how far the nearest row is from both limits, and the share of rows that were changed."""
    on, to = drained[:, :, None], span[:, None, None] & ~drained[:, :, None]
    s, v = (pattern * on).sum(-1, keepdim=True), (pattern * to).sum(-1, keepdim=True)
    m = (pattern * span[:, None, None]).sum(-1, keepdim=True)
    budget = (1 - keep) * s
    moved = pattern * on * keep + pattern * to + torch.where(to, budget * pattern / v, 0.0) + pattern * ~on * ~to
    late = rows[:, None, :, None].expand_as(m)
    chosen = (m >= least) & (v / m >= share) & late
    near = torch.minimum((m - least).abs(), (v - share * m).abs())[late].min()
    return torch.where(chosen, moved, pattern), near, chosen[late].float().mean()


def middle(pattern, documents, rows, bias, temperature, clip):
    """Documents [b s k] get the softmax of their mean attention less the bias of their slot; the total is kept."""
    n = documents.sum(-1)[:, None, None]
    m = torch.einsum("bhqk,bsk->bhqs", pattern, documents.to(pattern.dtype))
    a = ((m / n - bias) / temperature).softmax(-1)
    wanted = a * n * m.sum(-1, keepdim=True) / (a * n).sum(-1, keepdim=True)
    factor = (wanted / m).clamp(torch.tensor(-clip).exp(), torch.tensor(clip).exp())
    weight = torch.einsum("bhqs,bsk->bhqk", factor - 1, documents.to(pattern.dtype)) + 1
    return torch.where(rows[:, None, :, None], weighed(pattern, weight), pattern)


def batch(lengths=(17, 23), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
    spans = [{"mark": (4 + i, 8 + i), "other": (10, 12)} for i in range(len(lengths))]
    return Prompts.from_ids(ids, spans=spans)


def logits(model, prompts):
    with torch.no_grad():
        return model(**model_inputs(model, prompts), use_cache=False).logits


def real(x, prompts):
    """The last rows of each prompt, padding left out."""
    return torch.cat([row[-n:] for row, n in zip(x, prompts.lengths, strict=True)])
