"""Cost of an analysis before it runs: forward passes, tokens, arithmetic, and memory of the results.

A declaration names one of the cost models below, each a function `(model, prompts, batch_size, settings) -> Cost`.
`prompts` is a pair of Prompts where the analysis takes pairs. `settings` holds the settings that differ from the
defaults of the analysis. The models count the work of the analysis from its prompts alone; nothing runs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from interp.analyses import memory
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import unwrap
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import Capture
from interp.hooks.read.keep import Keep

Pair = tuple[Prompts, ...]
Settings = Mapping[str, Any]
CostModel = Callable[[nn.Module, "Prompts | Pair", int, Settings], "Cost"]
Kept = Keep | Callable[[Prompts, Settings], tuple[Keep, ...]]
"""a keep of `capture`, or a function of a batch and the settings that gives several"""
BYTES = 4
"""bytes of a number on the host, which is float32"""
BACKWARD = 2
"""arithmetic of a backward pass, in forward passes: gradients of activations, and the layers computed again"""


@dataclass(frozen=True)
class Cost:
    """Cost of an analysis on one model and set of prompts."""

    forward_passes: float = 0.0
    """forward passes of one prompt; a decoding step is one, and a pass that begins at a later layer counts by the
    share of the layers that run"""
    tokens: float = 0.0
    """positions that the model computes in these passes, padding included"""
    teraflops: float = 0.0
    """floating-point operations in units of 10^12: 2 for each parameter and token, and those of attention"""
    held_megabytes: float = 0.0
    """results and activations that are held at once"""
    activation_megabytes: float = 0.0
    """activations on the device of the model at once, in addition to its weights, where they are more than those of one
    forward pass: what a backward pass needs, and the hidden states of a sweep; see `analyses.memory`"""

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other: work adds up, and the larger memory counts."""
        return Cost(
            self.forward_passes + other.forward_passes,
            self.tokens + other.tokens,
            self.teraflops + other.teraflops,
            max(self.held_megabytes, other.held_megabytes),
            max(self.activation_megabytes, other.activation_megabytes),
        )


def total(costs: Iterator[Cost]) -> Cost:
    """The sum of costs, such as those of the batches of a run."""
    return sum(costs, Cost())


@dataclass(frozen=True)
class WithActivations:
    """A cost model that includes the memory of activations."""

    work: CostModel
    activations: memory.MemoryModel
    """bytes of a batch"""
    sizes: Callable[[Prompts, int], Iterator[memory.Batch]] = memory.batches
    """sizes of the batches of prompts"""

    def __call__(self, model: nn.Module, prompts: "Prompts | Pair", batch_size: int, settings: Settings) -> Cost:
        sizes = self.sizes(_sides(prompts)[0], settings.get("batch_size", batch_size))
        most = memory.largest(self.activations, memory.Shape.of(model), sizes, settings)
        return self.work(model, prompts, batch_size, settings) + Cost(activation_megabytes=most / 1e6)


@dataclass(frozen=True)
class Passes:
    """The arithmetic of one model."""

    parameters: int
    layout: HeadLayout

    @classmethod
    def of(cls, model: nn.Module) -> "Passes":
        """Count the parameters of a model."""
        model = unwrap(model)
        return cls(sum(p.numel() for p in model.parameters()), HeadLayout.of(model))

    def cost(self, rows: float, queries: float, keys: float, share: float = 1.0, backward: bool = False) -> Cost:
        """Passes of `rows` prompts, whose `queries` attend to `keys` keys on average, through a share of the layers."""
        tokens = rows * queries * share
        size = self.layout.layers * self.layout.heads * self.layout.head_dim
        operations = 2 * self.parameters * tokens + 4 * size * tokens * keys
        return Cost(rows * share, tokens, operations * (1 + BACKWARD * backward) / 1e12)

    def prompts(self, rows: float, length: int, share: float = 1.0, backward: bool = False) -> Cost:
        """Passes of whole prompts: a query attends to half of the keys on average."""
        return self.cost(rows, length, length / 2, share, backward)

    def from_each_layer(self, rows: float, length: int) -> Cost:
        """Passes that begin at each layer in turn, `rows` prompts for each layer."""
        layers = self.layout.layers
        return self.prompts(rows * layers, length, share=(layers + 1) / (2 * layers))

    @property
    def width(self) -> int:
        """Numbers of z of all layers, at one position."""
        return self.layout.layers * self.layout.heads * self.layout.head_dim


def reading(*keep: Kept, queries: int | None = None, sides: tuple[int, ...] | None = None) -> CostModel:
    """One forward pass for each prompt, in which a capture keeps something of attention.

    Args:
        keep: Keeps of the capture, or functions of a batch and the settings that give them.
        queries: Number of query positions that are kept of each prompt; None for all.
        sides: Which prompts of a pair are read, 0 for the prompts and 1 for their partners; None for all.

    Returns:
        CostModel: The cost of reading the prompts in batches.
    """

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        for number, side in enumerate(_sides(prompts)):
            if sides is not None and number not in sides:
                continue
            for batch in side.batches(settings.get("batch_size", batch_size)):
                longest = max(batch.lengths)
                size = _held(model, keep, batch, settings, longest, queries)
                found += passes.prompts(len(batch), longest) + Cost(held_megabytes=size)
        return found

    return cost


def decoding(*keep: Kept, max_new_tokens: int, forced: str | None = None) -> CostModel:
    """A greedy reply to each prompt, in which a capture keeps something of the queries that give its tokens.

    The cost is that of replies of `max_new_tokens` tokens; replies that end earlier cost less.

    Args:
        keep: Keeps of the capture, or functions of a batch and the settings that give them.
        max_new_tokens: Default of the setting of that name.
        forced: Span whose tokens are appended to the prompt and read in one pass where the setting `form` is "forced".

    Returns:
        CostModel: The cost of the replies.
    """

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        new = int(settings.get("max_new_tokens", max_new_tokens))
        for batch in _sides(prompts)[0].batches(settings.get("batch_size", batch_size)):
            longest, rows = max(batch.lengths), len(batch)
            if forced is not None and settings.get("form") == "forced":
                steps = [_span_size(prompt, forced) for prompt in batch]
                whole = max(len(prompt) + size - 1 for prompt, size in zip(batch, steps, strict=True))
                size = _held(model, keep, batch, settings, whole, max(steps))
                found += passes.prompts(rows, whole) + Cost(held_megabytes=size)
                continue
            size = _held(model, keep, batch, settings, longest + new, new)
            later = passes.cost(rows * (new - 1), 1, longest + new / 2)
            found += passes.prompts(rows, longest) + later + Cost(held_megabytes=size)
        return found

    return cost


def decoding_and_reading(*keep: Kept, max_new_tokens: int) -> CostModel:
    """A greedy reply to each prompt, then one forward pass over prompt and reply that keeps the rows of the reply.

    Args:
        keep: Keeps of the capture in the second pass.
        max_new_tokens: Default of the setting of that name.

    Returns:
        CostModel: The cost of both; of the second alone where the setting `replies` gives the replies.
    """
    reply = decoding(max_new_tokens=max_new_tokens)

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, (side, *_) = Passes.of(model), _sides(prompts)
        given = settings.get("replies")
        found = Cost() if given is not None else reply(model, side, batch_size, settings)
        new = int(settings.get("max_new_tokens", max_new_tokens))
        if given is not None:
            new = max((len(each.ids) for each in given), default=0)
        for batch in side.batches(settings.get("batch_size", batch_size)):
            whole = max(batch.lengths) + max(0, new - 1)
            size = _held(model, keep, batch, settings, whole, max(0, new - 1))
            found += passes.prompts(len(batch), whole) + Cost(held_megabytes=size)
        return found

    return cost


def gated(cost: CostModel, *, side: int = 0) -> CostModel:
    """Another cost, and a forward pass that finds the prompts on which the model shows the behaviour.

    Args:
        cost: Cost of the analysis on all prompts.
        side: Which prompts of a pair are read first, as for `reading`.

    Returns:
        CostModel: The cost of both; that of the analysis alone where the setting `right_only` is False.
    """
    gate = reading(sides=(side,))

    def both(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        found = cost(model, prompts, batch_size, settings)
        return found + gate(model, prompts, batch_size, settings) if settings.get("right_only", True) else found

    vars(both).update(vars(cost))
    return both


def patching(*, frozen: Callable[[Settings], bool] | None = None) -> CostModel:
    """Both prompts of each pair, and one pass for each head, which begins at the layer of the head.

    Args:
        frozen: Settings -> whether the outputs of the MLPs are held in place.

    Returns:
        CostModel: The cost of patching all heads. The batch size is the number of rows of a pass, which holds as many
            heads of each pair as fit.
    """

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        heads, layers = passes.layout.heads, passes.layout.layers
        rows = settings.get("batch_size", batch_size)
        for size, length in _groups(_sides(prompts)[0], rows):
            each = -(-heads // -(-heads // max(1, rows // size)))
            calls = -(-heads // each)
            found += passes.prompts(2 * size, length) + passes.from_each_layer(calls * each * size, length)
            # z of the other run, the residual stream at each layer, and what is frozen
            streams = 1 + bool(frozen and frozen(settings))
            numbers = passes.width * (1 + (frozen is not None)) + layers * _hidden(model) * streams
            found += Cost(held_megabytes=BYTES * size * length * numbers / 1e6)
        return found

    return cost


def first_order() -> CostModel:
    """Both prompts of each pair, and one backward pass: a gradient stands for the passes of `patching`."""

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        for size, length in _groups(_sides(prompts)[0], settings.get("batch_size", batch_size)):
            found += passes.prompts(size, length) + passes.prompts(size, length, backward=True)
            # z of both runs, and its gradient
            found += Cost(held_megabytes=3 * BYTES * size * length * passes.width / 1e6)
        return found

    return WithActivations(cost, memory.first_order, memory.sorted_batches)


def writing() -> CostModel:
    """One forward pass for each prompt, after which what every head writes at the last position is held."""

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        numbers = passes.layout.size * _hidden(model)
        for size, length in _groups(_sides(prompts)[0], settings.get("batch_size", batch_size)):
            found += passes.prompts(size, length) + Cost(held_megabytes=BYTES * size * numbers / 1e6)
        return found

    return cost


def patching_means() -> CostModel:
    """One pass over the partners for the mean output of each head, then each prompt with each head set to its mean."""

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, (side, partners) = Passes.of(model), _sides(prompts)
        heads, found = passes.layout.heads, Cost()
        size = settings.get("batch_size", batch_size)
        for batch in partners.batches(size):
            found += passes.prompts(len(batch), max(batch.lengths))
            found += Cost(held_megabytes=BYTES * len(batch) * passes.width / 1e6)
        for batch in side.batches(size):
            longest, rows = max(batch.lengths), len(batch)
            # z of every head of each prompt, read prompt by prompt, then the unmodified pass and those of the heads
            found += total(passes.prompts(1, length) for length in batch.lengths)
            found += passes.prompts(rows, longest) + passes.from_each_layer(rows * heads, longest)
            found += Cost(held_megabytes=BYTES * rows * longest * passes.width / 1e6)
        return found

    return WithActivations(cost, memory.reading)


def sweeping() -> CostModel:
    """Each prompt unmodified and with each head ablated alone, in a pass that begins at the layer of the head.

    A beginning that all prompts share is counted as often as prompts have it, which is more than a sweep computes.
    """

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        side = _sides(prompts)[0]
        ordered = sorted(side.lengths)
        size = settings.get("batch_size", batch_size)
        for start in range(0, len(ordered), size):
            rows = len(ordered[start : start + size])
            longest = ordered[start : start + size][-1]
            found += passes.prompts(rows, longest) + passes.from_each_layer(rows * passes.layout.heads, longest)
        return found

    return WithActivations(cost, memory.reading, memory.sorted_batches)


def gradients() -> CostModel:
    """One forward and one backward pass for each prompt."""

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, found = Passes.of(model), Cost()
        for batch in _sides(prompts)[0].batches(settings.get("batch_size", batch_size)):
            found += passes.prompts(len(batch), max(batch.lengths), backward=True)
        return found

    return WithActivations(cost, memory.gradients)


def training(*, steps: int) -> CostModel:
    """Steps of distillation: the teacher's forward pass, and the student's forward and backward pass on a batch.

    Args:
        steps: Default of the setting of that name; the setting `runs` repeats all steps.

    Returns:
        CostModel: The cost of all steps on prompts of average length.
    """

    def cost(model: nn.Module, prompts: Prompts | Pair, batch_size: int, settings: Settings) -> Cost:
        passes, (side, *_) = Passes.of(model), _sides(prompts)
        mean = sum(side.lengths) / len(side)
        rows = settings.get("batch_size", batch_size) * settings.get("steps", steps) * settings.get("runs", 1)
        teacher, student = (passes.cost(rows, mean, mean / 2, backward=learns) for learns in (False, True))
        held = BYTES * settings.get("batch_size", batch_size) * max(side.lengths) * passes.layout.layers
        return teacher + student + Cost(held_megabytes=held * _hidden(model) / 1e6)

    def longest(prompts: Prompts, batch_size: int) -> Iterator[memory.Batch]:
        yield batch_size, max(prompts.lengths)

    return WithActivations(cost, memory.training, longest)


def _sides(prompts: Prompts | Pair) -> tuple[Prompts, ...]:
    return (prompts,) if isinstance(prompts, Prompts) else prompts


def _held(
    model: nn.Module, keep: tuple[Kept, ...], batch: Prompts, settings: Settings, length: int, queries: int | None
) -> float:
    """Megabytes of what a capture holds of one batch."""
    keeps = tuple(kept for each in keep for kept in ((each,) if isinstance(each, Keep) else each(batch, settings)))
    if not keeps:
        return 0.0
    # a capture counts its results twice, since joining them copies them
    return Capture(model, keeps).cost(len(batch), length, queries).total / 2e6


def _groups(prompts: Prompts, batch_size: int) -> Iterator[tuple[int, int]]:
    """Number and length of the prompts of each batch, where batches hold prompts of one length."""
    lengths = prompts.lengths
    for length in sorted(set(lengths)):
        count = lengths.count(length)
        for start in range(0, count, batch_size):
            yield min(batch_size, count - start), length


def _hidden(model: nn.Module) -> int:
    """Width of the residual stream."""
    config: Any = unwrap(model).config
    return int(config.get_text_config().hidden_size)


def _span_size(prompt: Any, span: str) -> int:
    return sum(stop - start for start, stop in prompt.spans.get(span, ())) or 1
