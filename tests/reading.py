"""What the capture tests share: prompts of random tokens, keeps of every kind, and eager patterns to compare with."""

import torch
from families import VOCAB

from interp.hooks import keep
from interp.hooks.capture import placed
from interp.hooks.prompts import Prompts

ROWS = [keep.mass("mark", 0), keep.entropy(), keep.lse(), keep.top_keys(2), keep.at(-1, 0), keep.mass(0, by_value=True)]
KEYS = [keep.columns("mean"), keep.columns("max"), keep.columns("sum", by_value=True)]
STREAMS = [keep.z(), keep.q(), keep.k(), keep.v()]


def prompts(lengths=(70, 90), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
    return Prompts.from_ids(ids, spans=[{"mark": (5, 9)} for _ in lengths])


def eager_patterns(model, batch):
    """[b l h q k] in columns, made by the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**placed(model, batch), output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return torch.stack(out.attentions, 1)
