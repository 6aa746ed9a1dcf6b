"""Forward passes under many head interventions: many head sets are rows of one batch, and nothing is computed twice.

A forward pass begins at the first layer that a set changes. Prompts with a common prefix share it under each set. Only
the last token of a prompt is unembedded.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from interp.analyses import memory
from interp.analyses.causal.batch_size import halved, rows_that_fit
from interp.errors import ModelError, PromptError
from interp.hooks.edit.ablation import Intervention, ReferenceOutputs, intervene
from interp.hooks.edit.partial_forward import fill_cache, holds_all_keys, record_hidden_states, resume_from_layer
from interp.hooks.model.finite import check_logits
from interp.hooks.model.heads import HeadSet
from interp.hooks.model.layers import check_eval, unwrap
from interp.hooks.model.scope import ModuleHook, module_hooks
from interp.hooks.model.weights import input_device
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import check_context

MIN_SHARED_TOKENS = 4
"""length from which on a common prefix is read separately"""


@dataclass(frozen=True, eq=False)
class Seen:
    """Logits and hidden states of prompts under some head sets, at the last token of each prompt."""

    sets: list[int]
    """numbers of the sets"""
    logits: Tensor
    """float32 [p i v]"""
    hidden: Tensor
    """[p i m] after the final norm"""


@dataclass(eq=False)
class BatchedInterventions:
    """Prompts and their baseline forward pass, from which forward passes under interventions begin.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: The prompts.
        intervention: The intervention on the heads of a set.
        bank: Outputs of heads on the reference prompts, for an intervention that takes values from them.
        source: Number of the reference prompt of each prompt, see `Intervention.source`.

    Raises:
        PromptError: If there are no prompts, or a prompt is empty or longer than the context.
        ModelError: If the model has no output embeddings or is in training mode.
        CostError: If the hidden states of the prompts do not fit into the free memory.
        UsageError: If memory runs out.
    """

    model: Any
    prompts: Prompts
    intervention: Intervention
    bank: ReferenceOutputs | None = None
    source: Tensor | None = None
    """Int [p], as `Intervention.source` has it"""
    forwards: float = field(default=0.0, init=False)
    """forward passes of one prompt so far; a pass through half of the layers counts half"""

    def __post_init__(self) -> None:
        self.model = unwrap(self.model)
        if not len(self.prompts) or not all(self.prompts.lengths):
            raise PromptError("a prompt is empty, or there are no prompts; give prompts of at least one token.")
        check_context(self.model, self.prompts, 0)
        check_eval(self.model)
        memory.check("a sweep", memory.reading, self.model, [(len(self.prompts), max(self.prompts.lengths))], {})
        halved(self._read_base, False)

    def _read_base(self) -> None:
        self._head = self.model.get_output_embeddings()
        if self._head is None:
            raise ModelError(
                f"{type(self.model).__name__} has no output embeddings, whose input is read; give a language model."
            )
        device = input_device(self.model)
        width = max(self.prompts.lengths)
        # padded on the right: causality hides the padding, so no mask is needed and columns are positions
        rows = [[*prompt.ids, *[self.prompts.pad_id] * (width - len(prompt))] for prompt in self.prompts]
        self._ids = torch.tensor(rows, device=device)
        self._last = torch.tensor(self.prompts.lengths, device=device) - 1
        self.shared = self._common()
        self._before: dict[int, Tensor] = {}
        cache = None
        if self.shared:
            with record_hidden_states(self.model) as self._before:
                _, _, cache = self._forward(self._ids[:1, : self.shared], self._last[:1], self._empty())
            self.shared = self.shared if holds_all_keys(cache) else 0
        self._cache = cache if self.shared else None
        inner = None if self._cache is None else self._tiled(self._filled(len(self._before), 1))
        with record_hidden_states(self.model) as self._hidden:
            self.logits, self.hidden, _ = self._forward(self._ids[:, self.shared :], self._last - self.shared, inner)
        self.layers = len(self._hidden)
        self.forwards += len(self.prompts)

    def under(self, sets: Sequence[HeadSet], rows: int | None = None) -> Iterator[Seen]:
        """Run the prompts under each of the head sets, some sets at a time, in the order of their first layers.

        Args:
            sets: The head sets; an empty one leaves the model unmodified.
            rows: Number of sequences per forward pass, where each sequence is one prompt under one head set; by default
                as many as fit into free memory, halved where it runs out.

        Yields:
            Logits and hidden states of some of the sets.

        Raises:
            UsageError: If memory runs out with one set.
        """
        order = sorted(range(len(sets)), key=lambda i: _first(sets[i]))
        for first, group in groupby(order, key=lambda i: _first(sets[i])):
            left = list(group)
            if first < 0:
                # an empty set changes nothing
                same = (x[:, None].expand(-1, len(left), -1) for x in (self.logits, self.hidden))
                yield Seen(left, *same)
                continue
            tokens = self._ids.shape[1] - self.shared
            fit = rows_that_fit(self.model, tokens, self.logits.shape[-1]) if rows is None else rows
            each = max(1, fit // len(self.prompts))
            while left:
                chosen = left[:each]
                seen = halved(partial(self._read, [sets[i] for i in chosen], first), len(chosen) > 1)
                if seen is None:
                    each = max(1, len(chosen) // 2)
                    warnings.warn(f"memory ran out; continuing with {each} head sets at a time.", stacklevel=2)
                    continue
                yield Seen(chosen, *seen)
                left = left[len(chosen) :]

    def _read(self, sets: list[HeadSet], first: int) -> tuple[Tensor, Tensor]:
        """Logits [p i v] and hidden [p i m] under sets whose first changed layer is `first`."""
        each, p = len(sets), len(self.prompts)
        share = 1 - first / self.layers
        width = self._ids.shape[1]
        cache = None
        if self.shared:
            begin = self._before[first].expand(each, -1, -1)
            with self._acting(sets, None), resume_from_layer(self.model, first, begin):
                ids = self._ids[:1, : self.shared].expand(each, -1)
                _, _, cache = self._forward(ids, self._last[:1].expand(each), self._empty())
            cache = self._tiled(fill_cache(cache, self._cache, range(first), slice(None), each))
            self.forwards += each * share * self.shared / width
        with (
            self._acting(sets, self.source),
            resume_from_layer(self.model, first, self._hidden[first].repeat_interleave(each, 0)),
        ):
            ids = self._ids[:, self.shared :].repeat_interleave(each, 0)
            logits, hidden, _ = self._forward(ids, (self._last - self.shared).repeat_interleave(each), cache)
        self.forwards += each * p * share * (width - self.shared) / width
        return logits.unflatten(0, (p, each)), hidden.unflatten(0, (p, each))

    def _acting(self, sets: list[HeadSet], source: Tensor | None) -> contextlib.AbstractContextManager[None]:
        return intervene(self.model, self.intervention, sets, self.bank, source)

    def _forward(self, ids: Tensor, last: Tensor, cache: Any = None) -> tuple[Tensor, Tensor, Any]:
        """float32 logits [b v] and input of the output embeddings [b m], at the columns `last` of `ids`."""
        held: list[Tensor] = []

        def pick(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            index = last.to(args[0].device).clamp(max=args[0].shape[1] - 1)
            row = args[0][torch.arange(len(index), device=index.device), index]
            held.append(row)
            return (row[:, None], *args[1:])

        start = 0 if cache is None else cache.get_seq_length()
        width = start + ids.shape[1]
        position = torch.arange(start, width, device=ids.device)[None].expand(len(ids), -1)
        # padding follows the last token of a row, and causality hides it
        mask = torch.ones(len(ids), width, dtype=torch.int64, device=ids.device)
        with module_hooks([ModuleHook(self._head, pick)]), torch.no_grad():
            out: Any = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        last = check_logits(self.model, out.logits[:, -1], {"input_ids": self._ids})
        return last.float(), held[0], out.past_key_values

    def _common(self) -> int:
        """Length of the common prefix of all prompts, 0 where sharing it saves nothing or would change the numbers."""
        if len(self.prompts) < 2 or not self.intervention.shared:
            return 0
        # the last token is always read with its own prompt
        limit = min(self.prompts.lengths) - 1
        same = (self._ids[:, :limit] == self._ids[:1, :limit]).all(0)
        common = int(same.int().cumprod(0).sum())
        return common if common >= MIN_SHARED_TOKENS else 0

    def _empty(self) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config())

    def _filled(self, layers: int, each: int) -> Any:
        return fill_cache(self._empty(), self._cache, range(layers), slice(None), each)

    def _tiled(self, cache: Any) -> Any:
        """A cache whose rows are head sets, for rows that are prompts times head sets."""
        rows = torch.arange(len(cache.layers[0].keys), device=self._ids.device)
        cache.batch_select_indices(rows.repeat(len(self.prompts)))
        return cache


def _first(heads: HeadSet) -> int:
    """The first layer that a head set names, -1 for an empty one."""
    return min((head.layer for head in heads), default=-1)
