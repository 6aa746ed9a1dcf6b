"""Patching by plain hooks on a model, and the pairs of prompts that it is tried on."""

import contextlib
import itertools
from dataclasses import replace
from typing import Any

import torch

from interp.hooks.model.layers import attention_layers, projection_name
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families

LAYERS, HEADS = 2, 4
RIGHT, WRONG = 5, 9
TWO = ("gpt2", "llama")


def make(name) -> Any:
    """A tiny model whose biases and norms do something."""
    model, rng = families.make(name), torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape, generator=rng)
    return model


def prompts(seed, lengths=(9, 6, 9)):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(10, families.VOCAB, (n,), generator=rng).tolist() for n in lengths]
    return Prompts.from_ids(ids, meta=[{"right": [[RIGHT, 11]], "wrong": [[WRONG]]}] * len(lengths))


CLEAN, CORRUPT = prompts(1), prompts(2)


def metric(logits):
    return logits[0, -1, RIGHT] - logits[0, -1, WRONG]


def log_probability(logits, prompts):
    """Another metric, of a token that the prompts do not name."""
    return logits.log_softmax(-1)[:, 20]


def at(model, prompt):
    """The metric after one prompt."""
    with torch.no_grad():
        return float(metric(model(torch.tensor([prompt.ids])).logits))


def shown(model):
    """(clean, corrupt), sides exchanged where needed, so that every pair shows the behaviour."""
    pairs = [sorted(pair, key=lambda prompt: -at(model, prompt)) for pair in zip(CLEAN, CORRUPT, strict=True)]
    return tuple(replace(CLEAN, items=side) for side in zip(*pairs, strict=True))


def answered(model, prompts=CLEAN, pairs=((RIGHT, WRONG),) * 3):
    """(right, wrong) of each prompt, exchanged where needed, so that the model is right."""
    found = []
    for prompt, pair in zip(prompts, pairs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt.ids])).logits[0, -1]
        found.append(tuple(sorted(pair, key=lambda token: -float(logits[token]))))
    return found


def each_pair(clean=CLEAN, corrupt=CORRUPT):
    for one, other in zip(clean, corrupt, strict=True):
        yield torch.tensor([one.ids]), torch.tensor([other.ids])


def projections(model):
    return [getattr(layer, projection_name(layer) or "") for layer in attention_layers(model).values()]


@contextlib.contextmanager
def hooked(modules, see, output=False):
    """see(number, x) at the input or output of each module; what it returns takes x's place."""

    def before(number, module, args):
        x = see(number, args[0])
        return None if x is None else (x, *args[1:])

    def after(number, module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        x = see(number, first)
        return None if x is None else (x, *out[1:]) if isinstance(out, tuple) else x

    handles = []
    for number, module in enumerate(modules):
        bound = (lambda f, i: lambda *args: f(i, *args))(after if output else before, number)
        handles.append(module.register_forward_hook(bound) if output else module.register_forward_pre_hook(bound))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(model, ids, modules, output=False):
    held = []
    with hooked(modules, lambda _, x: held.append(x), output), torch.no_grad():
        logits = model(ids).logits
    return held, metric(logits)


def mixed(mine, other, head):
    """z [b q h*d] with one head from another run."""
    mine, other = (z.unflatten(-1, (HEADS, -1)) for z in (mine, other))
    return torch.cat([mine[:, :, :head], other[:, :, head : head + 1], mine[:, :, head + 1 :]], 2).flatten(2)


def swept(model, base, source, frozen=None):
    """By plain hooks: [l h] the metric of the base run with each head from the source run; at both runs as they are.

    frozen: modules whose outputs stay as in the base run, as do all other heads.
    """
    theirs, at_source = recorded(model, source, projections(model))
    mine, at_base = recorded(model, base, projections(model))
    outputs = [] if frozen is None else recorded(model, base, frozen, output=True)[0]
    values = torch.empty(LAYERS, HEADS)
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):

        def see(number, z, layer=layer, head=head):
            z = z if frozen is None else mine[number]
            return mixed(z, theirs[number], head) if number == layer else z

        with (
            torch.no_grad(),
            hooked(projections(model), see),
            hooked(frozen or [], lambda i, x: outputs[i], output=True),
        ):
            values[layer, head] = metric(model(base).logits)
    return values, at_base, at_source


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)
