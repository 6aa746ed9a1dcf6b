"""A TransformerLens bridge over the user's model whose attention runs through the seam.

TransformerLens wraps the modules of a model in place and computes attention itself, n x n. Here its attention component
runs the module of the model instead, which calls the seam; the hook points inside attention are called from there.
Only this module and `components` depend on private parts of TransformerLens.
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
from interp.hooks.transformerlens.components import AttentionPoints, DelegatingAttention, Unembedding, mix_in, rewire


@contextlib.contextmanager
def bridge(model: nn.Module, tokenizer: Any = None) -> Iterator[Any]:
    """Open a TransformerLens `TransformerBridge` over a model, with attention computed by the model and read by interp.

    The tools of TransformerLens (patching, attribution, detect_head, logit lens) work on it as on the bridges that
    TransformerLens makes, and every function of interp that takes a model takes the bridge as well.

    An n x n pattern is computed only in layers with a hook at hook_pattern, hook_attn_scores, hook_rot_q or hook_rot_k;
    on long prompts, cache with `names_filter=`. Edits at these points take effect, and gradients flow through them.
    hook_attn_scores holds -inf where a query cannot attend. A `capture` reads the pattern after the hooks. A change at
    hook_rot_k raises UsageError, because the key is already in the cache; edit hook_k instead. Fused projections
    (GPT-2, NeoX, Phi-3) run as separate projections to q, k and v, as in TransformerLens, equal up to rounding.

    When the context closes, the module tree, parameters (including folded weights), buffers, attributes and attention
    implementation of the model are restored, and the bridge refuses to run. Weights that were changed in place, for
    example by an optimizer, keep their new values. To keep a bridge open over several cells of a notebook, use
    `contextlib.ExitStack().enter_context(interp.bridge(model))`.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer, for the text methods of the bridge. The bridge uses a copy.

    Yields:
        TransformerBridge: the bridge over `model`.

    Raises:
        ModelError: If transformer-lens is not installed or has no adapter for the model, or a bridge over the model is
            open already.

    Examples:
        >>> with interp.bridge(model) as tl:
        ...     logits, cache = tl.run_with_cache(prompts.tensors()["input_ids"])
        >>> cache["blocks.1.attn.hook_pattern"].shape
        torch.Size([2, 4, 17, 17])
    """
    model = unwrap(model)
    layers = attention_layers(model)
    if any(wrapped_module(module) is not None for module in model.modules()):
        raise ModelError(
            "the modules of this model are already in a TransformerBridge; use that bridge, or load the model again."
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError(
            "accelerate keeps weights of this model outside of its modules, where transformer-lens cannot use them; "
            "load the whole model into memory, or use it without a bridge."
        )
    snapshot = ModuleSnapshot(model)
    with contextlib.ExitStack() as stack:
        stack.callback(snapshot.restore)
        try:
            built = _build(model, tokenizer)
        finally:
            # some adapters set eager attention
            snapshot.restore_configs()
        mix_in(built.unembed, Unembedding)
        points: dict[nn.Module, AttentionPoints] = {}
        attentions: list[Any] = [m for m in model.modules() if isinstance(m, DelegatingAttention)]
        for attn in attentions:
            rewire(attn)
            points[attn.original_component] = AttentionPoints(attn)
        if missing := set(layers.values()) - set(points):
            raise ModelError(
                f"the bridge of transformer-lens does not cover {len(missing)} of {len(layers)} attention layers; use "
                "the model without a bridge."
            )
        seam = stack.enter_context(tapping(model, IdleTap()))
        seam.points.update(points)
        stack.callback(seam.points.clear)
        stack.callback(object.__setattr__, built, "forward", _refuse_to_run)
        try:
            yield built
        except NotImplementedError as error:
            raise ModelError(
                f"{type(model).__name__} has weights of a form that transformer-lens or their library cannot use here "
                f"({str(error).splitlines()[0]}); load the model without quantisation, or use it without a bridge."
            ) from error


def _build(model: nn.Module, tokenizer: Any) -> Any:
    """Build the bridge of TransformerLens over a model."""
    if importlib.util.find_spec("transformer_lens") is None:
        raise ModelError("transformer-lens is not installed; run pip install 'transformer-lens>=4.3,<5'.")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    name = type(model).__name__
    try:
        # the bridge changes the tokenizer it receives, including its padding
        return build_bridge_from_module(
            model,
            name,
            hf_config=model.config,
            tokenizer=copy.deepcopy(tokenizer),
            post_adapter_hook=_delegate,
        )
    except ValueError as error:
        raise ModelError(f"transformer-lens cannot bridge {name} ({error}); use the model without a bridge.") from error


def _delegate(adapter: Any) -> None:
    """Make the module of transformers compute attention; called before the component is copied for each block."""
    blocks = (adapter.component_mapping or {}).get("blocks")
    attn = None if blocks is None else blocks.submodules.get("attn")
    if attn is None:
        raise ModelError(
            "transformer-lens has no attention component for the blocks of this model; use the model without a bridge."
        )
    attn.__class__ = type(type(attn).__name__, (DelegatingAttention, type(attn)), {})


def _refuse_to_run(*_: Any, **__: Any) -> None:
    """The forward of a closed bridge."""
    raise UsageError(
        "this TransformerBridge was closed when its context ended; run it inside `with interp.bridge(model)`."
    )


class IdleTap(AttentionTap):
    """A tap that reads nothing and keeps the seam open."""

    def at(self, layer: int) -> bool:
        return False
