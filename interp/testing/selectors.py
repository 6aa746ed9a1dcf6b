"""The contract of key selectors."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selector import KeySelector
from interp.hooks.edit.evicting_cache import EvictingCache
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.scope import ModuleHook, module_hooks
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families as models
from interp.testing.contract_error import modules_with_hooks, require

LENGTHS, N_LATER = (41, 33), 6
N_SINK, N_RECENT = 2, 3
KEEP_RATIO = 0.4
TOLERANCE = 1e-4


def check_selector(
    make: Callable[..., KeySelector],
    *,
    keep_ratio: float = KEEP_RATIO,
    family: str = "llama",
    tolerance: float = TOLERANCE,
    literal: bool = True,
    **settings: Any,
) -> None:
    """Check what must hold of any key selector, on a tiny model.

    - As many keys are kept as `keep_ratio` asks, up to a whole key for each kv head, the first and the last among them.
    - Tokens after the prompt see the kept keys and no others: their logits equal those of eager attention under the
      literal mask.
    - Rows of a padded batch are what they are alone.
    - A cache that evicts keys gives the logits of a cache that holds all.
    - A ratio of 1 changes nothing, to the bit.
    - Layers with a window of their own are left alone.

    Args:
        make: The class, or a function `make(keep_ratio=, n_sink=, n_recent=, **settings)`. A function that has a
            parameter `model` gets the model too, so that it can use scores of it.
        keep_ratio: Share of the keys that is kept.
        family: Family of the model with full attention.
        tolerance: Largest difference of a logit where two ways must agree.
        literal: Compare with the literal mask; False for a selector that changes keys as well.
        settings: Settings of the selector.

    Raises:
        ContractError: With what does not hold.

    Examples:
        >>> interp.testing.check_selector(interp.kv.Streaming)
    """
    model: Any = models.make(family)
    selector = _made(make, model, keep_ratio, settings)
    batch, later = _prompts(), _later()
    logits, noted = continued(model, selector, batch, later)
    _ratio(selector, noted, batch)
    for row in range(len(batch)):
        alone, _ = continued(model, selector, batch[row : row + 1], later[row : row + 1])
        _close(alone, logits[row : row + 1], tolerance, "a row of a padded batch is not what it is alone")
        if literal:
            expected = literal_logits(model, selector, batch, row, later, noted)
            _close(logits[row : row + 1], expected, tolerance, "later tokens see other keys than the kept ones")
    evicted, _ = continued(model, selector, batch[:1], later[:1], EvictingCache(model))
    kept, _ = continued(model, selector, batch[:1], later[:1])
    _close(evicted, kept, tolerance, "a cache that evicts keys gives other logits")
    whole = _made(make, model, 1.0, settings)
    require(whole.is_noop, "a ratio of 1 does not say that it changes nothing; define `is_noop`.")
    unselected, _ = continued(model, None, batch, later)
    require(torch.equal(continued(model, whole, batch, later)[0], unselected), "a ratio of 1 changes logits.")
    require(not modules_with_hooks(model), f"hooks are left on {', '.join(modules_with_hooks(model))}.")
    windowed: Any = models.make("gemma2")
    slides = [kind == "sliding_attention" for kind in windowed.config.layer_types]
    _, noted = continued(windowed, _made(make, windowed, keep_ratio, settings), batch[:1], later[:1])
    wanted = [layer for layer, slid in enumerate(slides) if not slid]
    require(sorted(noted) == wanted, f"it chose in layers {sorted(noted)}, expected those without a window, {wanted}.")


def _made(make: Callable[..., KeySelector], model: Any, keep_ratio: float, settings: dict[str, Any]) -> KeySelector:
    """The selector; a function that takes `model` gets it, since scores belong to one model."""
    given = {"model": model} if "model" in signature(make).parameters else {}
    return make(keep_ratio=keep_ratio, n_sink=N_SINK, n_recent=N_RECENT, **given, **settings)


def _ratio(selector: KeySelector, noted: dict[int, Any], batch: Prompts) -> None:
    for row, n in enumerate(batch.lengths):
        kept = torch.stack([chosen.kept[row, :, :n] for chosen in noted.values()])
        require(bool(kept[..., : selector.n_sink].all()), f"a key among the first {selector.n_sink} is dropped.")
        require(bool(kept[..., -1].all()), "the last key of the prompt is dropped.")
        mean = float(kept.float().mean())
        require(
            abs(mean - selector.keep_ratio) < 1 / n,
            f"{mean:.3f} of the keys of a prompt are kept, expected {selector.keep_ratio}.",
        )


def _prompts() -> Prompts:
    draw = torch.Generator().manual_seed(1)
    return Prompts.from_ids([torch.randint(5, 60, (n,), generator=draw).tolist() for n in LENGTHS])


def _later() -> Tensor:
    return torch.randint(5, 60, (len(LENGTHS), N_LATER), generator=torch.Generator().manual_seed(2))


def _close(one: Tensor, other: Tensor, tolerance: float, message: str) -> None:
    worst = float((one - other).abs().max())
    require(worst <= tolerance, f"{message}, by {worst:.1e}.")


@torch.no_grad()
def continued(
    model: Any, selector: KeySelector | None, batch: Prompts, later: Tensor, cache: Any = None
) -> tuple[Tensor, dict[int, Any]]:
    """Logits of a continuation read after the prompts, and which keys were kept, by layer.

    Args:
        model: The model.
        selector: The selector, None for the unmodified model.
        batch: Prompts that are read first.
        later: Tokens `[b q]` that follow them.
        cache: An EvictingCache, or any other cache; by default one that holds all keys.
    """
    from transformers import DynamicCache

    inputs = batch.tensors()
    mask = inputs["attention_mask"]
    used = DynamicCache(config=model.config) if cache is None else cache
    evicting = cache if isinstance(cache, EvictingCache) else None
    context = nullcontext() if selector is None else selecting(model, selector, batch, evicting)
    with context as state:
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        kept = model(
            input_ids=inputs["input_ids"], attention_mask=mask, position_ids=position, past_key_values=used,
            use_cache=True,
        ).past_key_values  # fmt: skip
        whole = torch.cat([mask, torch.ones_like(later)], 1)
        place = torch.tensor(batch.lengths)[:, None] + torch.arange(later.shape[1])
        logits = model(input_ids=later, attention_mask=whole, position_ids=place, past_key_values=kept).logits
    return logits, {} if state is None else {layer: noted for (_, layer), noted in state.memory.items()}


@torch.no_grad()
def literal_logits(
    model: Any, selector: KeySelector, batch: Prompts, row: int, later: Tensor, noted: dict[int, Any]
) -> Tensor:
    """The continuation of one row by eager attention, under each layer's own mask of four axes."""
    ids = torch.tensor([[*batch[row].ids, *later[row].tolist()]])
    n, total = len(batch[row]), ids.shape[1]
    layout = HeadLayout.of(model)
    each = layout.heads // layout.kv_heads
    masks = {}
    for layer, chosen in noted.items():
        seen = torch.ones(total, total).tril().bool().expand(1, layout.heads, -1, -1).clone()
        kept = chosen.kept[row, :, :n].repeat_interleave(each, 0)
        seen[0, :, n:, :n] &= kept[:, None]
        if chosen.window is not None:
            for head, window in enumerate(chosen.window[row].repeat_interleave(each).tolist()):
                for p in range(n, total):
                    seen[0, head, p, selector.n_sink : max(selector.n_sink, p - window)] = False
        masks[layer] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    hooks = []
    for layer, module in enumerate(block.self_attn for block in model.model.layers):

        def swap(module: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
            return args, {**kwargs, "attention_mask": masks[layer]}

        hooks.append(ModuleHook(module, swap, with_kwargs=True))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with module_hooks(hooks):
            return model(ids).logits[:, n:]
    finally:
        model.set_attn_implementation(before)


__all__: Sequence[str] = ["check_selector", "continued", "literal_logits"]
