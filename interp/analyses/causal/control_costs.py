"""Costs of controls: conditions of a test, and what the prompts cost under each of them."""

from torch import nn

from interp.analyses.causal.random_sets import N_FREE_SETS
from interp.analyses.costs import Cost, Passes, total
from interp.hooks.prompts.prompts import Prompts


def n_sets(n_random_sets: int) -> int:
    """Number of random head sets of a test: those matched by layer, and up to 3 from all layers.

    Args:
        n_random_sets: Number of random sets that are matched by layer.
    """
    return n_random_sets + min(n_random_sets, N_FREE_SETS)


def n_tested(n_kinds: int) -> int:
    """Number of tested conditions of a size: heads ablated in each way, heads kept, and the first ones by depth.

    Args:
        n_kinds: Number of other ablations.
    """
    return 2 * (1 + n_kinds) + 1


def cost_of(model: nn.Module, prompts: Prompts, batch_size: int, n_conditions: int, new_tokens: int = 0) -> Cost:
    """Cost of all prompts, read once under each condition, with one more forward pass for each new token."""
    passes = Passes.of(model)
    batches = [batch.lengths for batch in prompts.batches(batch_size)]
    once = total(
        passes.prompts(len(lengths), max(lengths))
        + passes.cost(len(lengths) * max(0, new_tokens - 1), 1, max(lengths) + new_tokens / 2)
        for lengths in batches
    )
    return Cost(once.forward_passes * n_conditions, once.tokens * n_conditions, once.teraflops * n_conditions)
