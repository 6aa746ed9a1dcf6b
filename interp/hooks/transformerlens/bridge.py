"""TransformerLens on the user's model, its attention through our seam; with lens.py all that knows its private parts.

TransformerLens wraps the modules of a model in place and computes attention itself, n x n. Here its attention component
runs the model's own module instead, which calls the seam; its hook points inside of attention are called from there.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

from torch import nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.layers import attention_layers, unwrap, wrapped_module
from interp.hooks.model.snapshot import ModuleSnapshot
from interp.hooks.seam import AttentionTap, tapping
from interp.hooks.transformerlens.components import AttentionPoints, DelegatingAttention, rewire


@contextlib.contextmanager
def bridge(model: nn.Module, tokenizer: Any = None) -> Iterator[Any]:
    """A TransformerLens TransformerBridge over `model` whose attention runs through our seam.

        with interp.bridge(model, tokenizer) as tl:
            logits, cache = tl.run_with_cache(tokens)
            with interp.capture(tl, entropy()) as cap: ...

    TransformerLens' tools work on it as on its own bridge (patching, attribution, detect_head, logit lens), and `tl` is
    accepted everywhere a model is. An n x n pattern is made only in layers where somebody listens to hook_pattern,
    hook_attn_scores, hook_rot_q or hook_rot_k: at length, cache with names_filter=. Edits there act and gradients flow;
    hook_attn_scores has -inf where a query may not look, and a `capture` reads the pattern after the hooks. A change at
    hook_rot_k raises UsageError, since the cache has the key already: edit hook_k.
    FusedProjection projections (GPT-2, NeoX, Phi-3) run as q, k and v apart, as in TransformerLens: equal up to rounding.

    On leaving, the module snapshot, parameters (folded weights too), buffers, attributes and the attention implementation
    of the model are as before; `tl` then refuses to run. Weights that were changed in place, by an optimizer, stay so.
    In a notebook, open it over cells with `contextlib.ExitStack().enter_context(interp.bridge(model))`.
    Raises ModelError where transformer-lens is missing or has no adapter for the model, or a bridge is open already.
    """
    model = unwrap(model)
    layers = attention_layers(model)
    if any(wrapped_module(module) is not None for module in model.modules()):
        raise ModelError("the modules of this model are in a TransformerBridge already: use that bridge, or load anew.")
    snapshot = ModuleSnapshot(model)
    with contextlib.ExitStack() as stack:
        stack.callback(snapshot.restore)
        try:
            built = _build(model, tokenizer)
        finally:
            # some adapters ask for eager attention
            snapshot.restore_configs()
        points: dict[nn.Module, AttentionPoints] = {}
        attentions: list[Any] = [m for m in model.modules() if isinstance(m, DelegatingAttention)]
        for attn in attentions:
            rewire(attn)
            points[attn.original_component] = AttentionPoints(attn)
        if missing := set(layers.values()) - set(points):
            raise ModelError(
                f"transformer-lens leaves {len(missing)} of {len(layers)} attention layers outside of its bridge: use "
                "the model without it."
            )
        seam = stack.enter_context(tapping(model, IdleTap()))
        seam.points.update(points)
        stack.callback(seam.points.clear)
        stack.callback(object.__setattr__, built, "forward", _refuse_to_run)
        yield built


def _build(model: nn.Module, tokenizer: Any) -> Any:
    if importlib.util.find_spec("transformer_lens") is None:
        raise ModelError("transformer-lens is not installed: pip install 'transformer-lens>=4.3,<5'.")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    name = type(model).__name__
    try:
        # it sets up the tokenizer that it is given, padding included
        return build_bridge_from_module(
            model,
            name,
            hf_config=model.config,
            tokenizer=copy.deepcopy(tokenizer),
            post_adapter_hook=_delegate,
        )
    except ValueError as error:
        raise ModelError(f"transformer-lens cannot bridge {name} ({error}): use the model without it.") from error


def _delegate(adapter: Any) -> None:
    """Let the module of transformers compute attention; called before the component is copied for each block."""
    blocks = (adapter.component_mapping or {}).get("blocks")
    attn = None if blocks is None else blocks.submodules.get("attn")
    if attn is None:
        raise ModelError("transformer-lens knows no attention in the blocks of this model: use the model without it.")
    attn.__class__ = type(type(attn).__name__, (DelegatingAttention, type(attn)), {})


def _refuse_to_run(*_: Any, **__: Any) -> None:
    raise UsageError("this TransformerBridge was closed when its context ended: run inside of interp.bridge(model).")


class IdleTap(AttentionTap):
    """A tap that keeps the seam open."""

    def at(self, layer: int) -> bool:
        return False
