"""Every key selector with settings for small prompts, what it does to a continuation, and the same literally."""

from typing import Any

import torch

from interp.analyses.kv.compress_kv import CompressKV
from interp.analyses.kv.duo_attention import DuoAttention
from interp.analyses.kv.head_kv import HeadKV
from interp.analyses.kv.random_keys import RandomKeys
from interp.analyses.kv.razor_attention import RazorAttention
from interp.analyses.kv.selecting import selecting
from interp.analyses.kv.selector import KeySelector
from interp.analyses.kv.snapkv import SnapKV
from interp.analyses.kv.streaming import Streaming
from interp.analyses.kv.task_kv import TaskKV
from interp.analyses.results.head_scores import HeadScores
from interp.hooks.edit.evicting_cache import EvictingCache
from interp.hooks.model.heads import HeadLayout
from interp.hooks.prompts.prompts import Prompts

LENGTHS, MORE = (41, 33), 6


def scores(model: Any) -> HeadScores:
    layout = HeadLayout.of(model)
    values = torch.rand(3, layout.layers, layout.heads, generator=torch.Generator().manual_seed(4))
    return HeadScores("made", values, kv_heads=layout.kv_heads)


# each selector of its share, with the few tokens of these prompts
SELECTORS: dict[str, Any] = {
    "streaming": lambda table: Streaming(0.4, n_sink=2, n_recent=3),
    "random": lambda table: RandomKeys(0.4, n_sink=2, n_recent=3, seed=5),
    "snapkv": lambda table: SnapKV(0.4, n_sink=2, n_recent=3, window=4, kernel_size=3),
    "compresskv": lambda table: CompressKV.from_scores(table, 0.4, n_voters=2, n_sink=2, n_recent=3, window=4),
    "headkv": lambda table: HeadKV.from_scores(table, 0.4, n_sink=2, n_recent=3, window=4),
    "taskkv": lambda table: TaskKV(0.6, part=0.5, top=9, n_sink=2, n_recent=3, window=4),
    "taskkv of a table": lambda table: TaskKV.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3, window=4),
    "duo": lambda table: DuoAttention.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3),
    "razor": lambda table: RazorAttention.from_scores(table, 0.6, part=0.5, n_sink=2, n_recent=3),
}


def prompts(rows: int = 2) -> Prompts:
    draw = torch.Generator().manual_seed(1)
    return Prompts.from_ids([torch.randint(5, 60, (n,), generator=draw).tolist() for n in LENGTHS[:rows]])


def continuation() -> torch.Tensor:
    return torch.randint(5, 60, (2, MORE), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def continued(model: Any, selector: KeySelector, asked: Prompts, later: torch.Tensor, cache: Any) -> tuple[Any, Any]:
    """Logits of a continuation read after the prompts, and what was noted, by layer."""
    inputs = asked.tensors()
    mask = inputs["attention_mask"]
    with selecting(model, selector, asked, cache if isinstance(cache, EvictingCache) else None) as state:
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        kept = model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).past_key_values
        whole = torch.cat([mask, torch.ones_like(later)], 1)
        place = torch.tensor(asked.lengths)[:, None] + torch.arange(later.shape[1])
        logits = model(input_ids=later, attention_mask=whole, position_ids=place, past_key_values=kept).logits
    return logits, {layer: noted for (_, layer), noted in state.memory.items()}


@torch.no_grad()
def literal(
    model: Any, selector: KeySelector, asked: Prompts, row: int, later: torch.Tensor, noted: Any
) -> torch.Tensor:
    """The same for one row by an eager model, token after token, with each layer's own mask of four axes."""
    ids = torch.tensor([[*asked[row].ids, *later[row].tolist()]])
    n, total = len(asked[row]), ids.shape[1]
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
    handles = []
    for layer, module in enumerate(block.self_attn for block in model.model.layers):

        def swap(module: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
            return args, {**kwargs, "attention_mask": masks[layer]}

        handles.append(module.register_forward_pre_hook(swap, with_kwargs=True))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(ids).logits[:, n:]
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
