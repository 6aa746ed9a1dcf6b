"""Memory of activations on the device of a model, counted from sizes before anything runs.

Each estimate is a function `(shape, rows, length, settings) -> bytes` of one batch. It counts the activations that are
held at once in addition to the weights: what a backward pass needs, or the hidden states that later passes begin from.
Tests compare every estimate with the largest memory of a real run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from interp.analyses.measures.losses import MAX_HELD_LOGITS
from interp.errors import CostError
from interp.hooks.edit.streaming_mix import MAX_LOGITS
from interp.hooks.model.config_values import largest_of_layers
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.model.weights import compute_dtype
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture_cost import format_bytes
from interp.kernels.streaming import MIN_BLOCK_QUERIES

Settings = Mapping[str, Any]
Batch = tuple[int, int]
"""number of rows of a batch, and their length in tokens"""
FLOAT = 4
"""bytes of a float32 number"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that the memory of its activations depends on."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    """width of the residual stream"""
    inner: int
    """width inside an MLP"""
    vocabulary: int
    number: int
    """bytes of a number in the dtype of the model"""
    quadratic: bool = False
    """whether attention stores its n x n weights"""

    @classmethod
    def of(cls, model: nn.Module) -> "Shape":
        """The shape of a model."""
        network = unwrap(model)
        layout = HeadLayout.of(network)
        config: Any = network.config.get_text_config()
        inner = largest_of_layers(config, "intermediate_size") or 4 * config.hidden_size
        experts = largest_of_layers(config, "num_experts_per_tok") or 1
        return cls(
            layout.layers, layout.heads, layout.kv_heads, layout.head_dim, config.hidden_size, inner * experts,
            config.vocab_size, compute_dtype(network).itemsize, config._attn_implementation == "eager",
        )  # fmt: skip

    def residual(self, tokens: float) -> float:
        """Bytes of the residual stream at one layer."""
        return tokens * self.hidden * self.number

    def outputs(self, tokens: float) -> float:
        """Bytes of the outputs of the heads of one layer."""
        return tokens * self.heads * self.head_dim * self.number

    def weights(self, rows: int, length: int) -> float:
        """Number of n x n attention weights of one layer, 0 where attention does not store them."""
        return rows * self.heads * length**2 if self.quadratic else 0

    def passing(self, rows: int, length: int) -> float:
        """Bytes of the n x n weights that a forward pass through one layer holds at once."""
        return self.weights(rows, length) * (2 * FLOAT + self.number)

    def attention(self, rows: int, length: int) -> float:
        """Bytes that a backward pass through the attention of one layer needs: a norm, q, k, v and the output."""
        each = FLOAT * self.hidden + (3 * self.heads + 2 * self.kv_heads) * self.head_dim * self.number
        return rows * length * each + self.weights(rows, length) * (FLOAT + self.number)

    def mlp(self, tokens: float) -> float:
        """Bytes that a backward pass through the MLP of one layer needs: a norm, a gate, its activation, a product."""
        return tokens * (FLOAT * self.hidden + 3 * self.inner * self.number)

    def slopes(self, rows: int, length: int) -> float:
        """Bytes of the gradients that a backward pass through one layer holds at once."""
        each = 2 * FLOAT * self.hidden + 2 * self.inner * self.number
        return rows * length * each + self.weights(rows, length) * FLOAT


REFERENCE = Shape(32, 32, 8, 128, 4096, 14336, 128256, 2)
"""the shape of Llama 3.1 8B in bfloat16, for figures where no model is given"""
REFERENCE_LENGTH = 32768
MemoryModel = Callable[[Shape, int, int, Settings], float]


def gradients(shape: Shape, rows: int, length: int, settings: Settings) -> float:
    """A forward and a backward pass to the outputs of the heads, see `gate_gradient`."""
    tokens = rows * length
    if settings.get("loss") is None:
        at_once = min(tokens, max(rows, MAX_HELD_LOGITS // shape.vocabulary))
    else:
        at_once = tokens
    # the logits in float32, their logarithms of probabilities and the gradient; 16 bits are copied
    logits = at_once * shape.vocabulary * (3 * FLOAT + shape.number % FLOAT)
    return _stored(shape, rows, length, settings) + max(shape.slopes(rows, length), logits)


def training(shape: Shape, rows: int, length: int, settings: Settings, *, sink: int = 16, recent: int = 64) -> float:
    """A step of distillation: the teacher's outputs, and the forward and backward pass of the student."""
    tokens, passing, teacher = rows * length, shape.passing(rows, length), 0.0
    if settings.get("full", "teacher") == "teacher":
        # nothing depends on the student's own attention to all keys
        teacher, shape = shape.layers * shape.outputs(tokens), replace(shape, quadratic=False)
    block = max(MIN_BLOCK_QUERIES, min(settings.get("recent", recent), length))
    logits = rows * shape.heads * (settings.get("sink", sink) + 2 * block)
    # of some queries: logits, weights and vectors of the stream; of all: the mixture of both branches
    queries = min(length, max(MAX_LOGITS // logits, block))
    width = rows * shape.heads * shape.head_dim
    stream = FLOAT * queries * (3 * logits + 4 * width) + 5 * FLOAT * length * width
    # the MLP has passed its gradient on and is gone when attention takes it
    needed = max(shape.slopes(rows, length), stream - shape.mlp(tokens), passing)
    return teacher + _stored(shape, rows, length, settings) + needed


def first_order(shape: Shape, rows: int, length: int, settings: Settings) -> float:
    """Outputs of the heads of two runs, and a backward pass of one of them."""
    tokens = rows * length
    # of both runs, once more in the graph of the second, and its gradient
    outputs = 4 * shape.layers * shape.outputs(tokens)
    return outputs + _stored(shape, rows, length, settings) + shape.slopes(rows, length)


def reading(shape: Shape, rows: int, length: int, settings: Settings) -> float:
    """Hidden states at the input of each layer, from which the passes of a sweep begin, and one such pass."""
    tokens = rows * length
    single = tokens * (8 * shape.hidden + 3 * shape.inner) * shape.number
    single += shape.passing(rows, length)
    return shape.layers * shape.residual(tokens) + single + 2 * rows * shape.vocabulary * FLOAT


def _stored(shape: Shape, rows: int, length: int, settings: Settings) -> float:
    """Bytes that a forward pass stores for the backward pass, and those of a layer that is computed again there."""
    tokens = rows * length
    internals, inputs = shape.attention(rows, length) + shape.mlp(tokens), (shape.layers + 1) * shape.residual(tokens)
    return inputs + internals * (1 if settings.get("checkpoint", True) else shape.layers)


def batches(prompts: Prompts, batch_size: int) -> Iterator[Batch]:
    """Sizes of the batches of prompts in their order."""
    for batch in prompts.batches(batch_size):
        yield len(batch), max(batch.lengths)


def sorted_batches(prompts: Prompts, batch_size: int) -> Iterator[Batch]:
    """Sizes of the batches of prompts that are sorted by length."""
    lengths, size = sorted(prompts.lengths), max(1, batch_size)
    for start in range(0, len(lengths), size):
        part = lengths[start : start + size]
        yield len(part), part[-1]


def largest(memory: MemoryModel, shape: Shape, sizes: Iterable[Batch], settings: Settings) -> float:
    """Bytes of the batch that takes most, 0 where there is no batch."""
    return max((memory(shape, rows, length, settings) for rows, length in sizes), default=0.0)


def check(name: str, memory: MemoryModel, model: nn.Module, sizes: Iterable[Batch], settings: Settings) -> None:
    """Check that the activations of an analysis fit into the free memory of the model's devices.

    Args:
        name: Name of the analysis, for the message.
        memory: Its estimate.
        model: The model.
        sizes: Sizes of its batches.
        settings: Its settings.

    Raises:
        CostError: If they do not fit.
    """
    shape, sizes, free = Shape.of(model), list(sizes), free_memory(model)
    needed = largest(memory, shape, sizes, settings)
    if needed <= free:
        return
    rows, length = max(sizes, key=lambda size: memory(shape, *size, settings))
    fits = [size for size in range(1, rows) if memory(shape, size, length, settings) <= free]
    if fits:
        remedy = f"give batch_size={fits[-1]}"
    elif not settings.get("checkpoint", True) and memory(shape, 1, length, {**settings, "checkpoint": True}) <= free:
        remedy = "give checkpoint=True" + (" and batch_size=1" if rows > 1 else "")
    else:
        remedy = "give shorter prompts, or a device with more memory"
    raise CostError(
        f"{name} needs {format_bytes(needed)} for the activations of {rows} x {length:,} tokens and "
        f"{format_bytes(free)} is free: {remedy}."
    )


def free_memory(where: nn.Module | torch.device) -> int:
    """Number of bytes that are free on a device, or on all devices of a model together.

    Memory that torch keeps for later tensors counts as free.
    """
    if isinstance(where, nn.Module):
        return sum(map(free_memory, {parameter.device for parameter in unwrap(where).parameters()}))
    if where.type == "cuda":
        kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return torch.cuda.mem_get_info(where)[0] + kept
    import psutil

    return psutil.virtual_memory().available
