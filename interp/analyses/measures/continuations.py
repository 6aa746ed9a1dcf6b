"""Teacher-forced scores: the log-probability of given continuations of a prompt, under many head sets at once.

One forward pass takes the place of a generation. The prompt is read once for all of its continuations, many head sets
are rows of one batch, and a forward pass begins at the first layer that a set changes.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from interp.errors import PromptError
from interp.hooks.edit.edit import Edit, Edits, steering
from interp.hooks.edit.partial_forward import fill_cache, holds_all_keys, record_hidden_states, resume_from_layer
from interp.hooks.edit.per_row_steering import repeat_notes, steering_rows
from interp.hooks.model.finite import check_logits
from interp.hooks.model.heads import HeadSet
from interp.hooks.model.layers import attention_layers, unwrap
from interp.hooks.prompts.batch_spans import BatchSpans
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read.capture import model_inputs


@dataclass
class Cost:
    """Forward passes that scoring took."""

    prompts: int = 0
    """number of prompts read, each counted once for each head set"""
    layers: float = 0.0
    """the same in whole forward passes: a pass that begins at the middle layer counts half"""
    continuations: int = 0
    """number of continuations read after a prompt"""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.prompts + other.prompts, self.layers + other.layers, self.continuations + other.continuations)


@dataclass(frozen=True)
class Options:
    """The continuations of each prompt of a batch as token ids, right ones first."""

    ids: tuple[tuple[tuple[int, ...], ...], ...]
    right: tuple[int, ...]
    """number of right continuations of each prompt"""

    @classmethod
    def of(cls, prompts: Prompts) -> "Options":
        """Read the continuations from the meta of the prompts.

        Args:
            prompts: Prompts with "right" and "wrong" in their meta: lists of texts that may follow, or of their ids.

        Raises:
            PromptError: If a prompt has no such lists, or has texts and no tokenizer.
        """
        rows = [[_ids(prompts, number, key) for key in ("right", "wrong")] for number in range(len(prompts))]
        return cls(tuple(right + wrong for right, wrong in rows), tuple(len(right) for right, _ in rows))

    @property
    def most(self) -> int:
        """Largest number of continuations of a prompt."""
        return max(map(len, self.ids))


def _ids(prompts: Prompts, number: int, key: str) -> tuple[tuple[int, ...], ...]:
    given = prompts[number].meta.get(key)
    if not isinstance(given, list | tuple) or not given or not all(given):
        raise PromptError(f'prompt {number} has no "{key}" continuations in its meta; give a list of texts.')
    if all(isinstance(ids, list | tuple) and all(type(token) is int for token in ids) for ids in given):
        return tuple(tuple(ids) for ids in given)
    if not all(isinstance(text, str) for text in given):
        raise PromptError(f'prompt {number} has "{key}" continuations that are neither texts nor ids; give texts.')
    if prompts.tokenizer is None:
        raise PromptError(f'prompt {number} has "{key}" continuations as texts and no tokenizer; encode it with one.')
    tokenizer, before = prompts.tokenizer, prompts[number].text

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found, start = [], encode(before) if before else []
    for text in given:
        # some tokenizers put a space before a text on its own
        both = encode(before + text)
        found.append(tuple(both[len(start) :] if both[: len(start)] == start else encode(text)))
    return tuple(found)


@dataclass(eq=False)
class ContinuationScorer:
    """Scores of the continuations of one batch of prompts under head sets.

    Everything that does not depend on the head sets is computed once, when the scorer is made.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        prompts: Prompts with continuations in their meta, see `Options.of`.
        edits: The edit that is applied in the heads of a set.
        cost: Forward passes so far, to which those of this scorer are added.

    Raises:
        PromptError: If a prompt has no continuations.
    """

    model: Any
    prompts: Prompts
    edits: Edit | Edits
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.model = unwrap(self.model)
        self.options = Options.of(self.prompts)
        longest = max(len(ids) for row in self.options.ids for ids in row)
        self._inputs = model_inputs(self.model, self.prompts, more=longest)
        with record_hidden_states(self.model) as self._hidden:
            self._last, self._cache = self._read(self._inputs)
        self.layers = len(self._hidden)
        self._dtype = self._hidden[0].dtype
        self._resumes = holds_all_keys(self._cache)
        self._start = self._untouched() if self._resumes else 0
        # reading continuations extends the cache, so they get a copy
        with record_hidden_states(self.model) as self._after:
            self.base = self._continued(self._last, _repeated(self._cache, self.options.most), 1)[:, 0]

    def under(self, sets: Sequence[HeadSet], rows: int = 32) -> Tensor:
        """Score each continuation under each head set.

        Args:
            sets: The head sets; an empty one leaves the model unmodified.
            rows: Number of sequences per forward pass that reads the prompts, where each sequence is one prompt under
                one head set.

        Returns:
            Tensor: `[p i o]` log-probability per token, -inf where a prompt has fewer continuations.
        """
        found = torch.empty(len(self.prompts), len(sets), self.options.most)
        order = sorted(range(len(sets)), key=lambda i: _first(sets[i]))
        for first, group in groupby(order, key=lambda i: _first(sets[i])):
            members = list(group)
            if first < 0:
                # an empty set changes nothing
                found[:, members] = self.base[:, None]
                continue
            # the continuations of a row are rows of their own
            step = max(1, min(rows, 4 * rows // self.options.most) // len(self.prompts))
            for start in range(0, len(members), step):
                chosen = members[start : start + step]
                found[:, chosen] = self._compared([sets[i] for i in chosen], first if self._resumes else 0)
        return found

    def together(self, edits: Edit | Edits) -> Tensor:
        """Score each continuation with edits in the heads that they name themselves.

        Args:
            edits: The edits, applied together.

        Returns:
            Tensor: `[p 1 o]` log-probability per token.
        """
        with steering(self.model, edits, self.prompts) as context:
            last, cache = self._read(self._inputs)
            repeat_notes(context, self.options.most)
            cache.batch_repeat_interleave(self.options.most)
            self.cost += Cost(len(self.prompts), len(self.prompts))
            return self._continued(last, cache, 1)

    def _compared(self, sets: list[HeadSet], first: int) -> Tensor:
        """Scores of head sets.

        In 16 bits they are shifted by the difference between this attention and the model's own without an edit.
        """
        if self._dtype == torch.float32:
            return self._steered(sets, first)
        scores = self._steered([*sets, HeadSet(())], first)
        moved = scores[:, :-1] - scores[:, -1:] + self.base[:, None]
        return torch.where(self.base[:, None] > -torch.inf, moved, -torch.inf)

    def _steered(self, sets: list[HeadSet], first: int) -> Tensor:
        each, start = len(sets), self._start
        inputs = {name: x.repeat_interleave(each, 0) for name, x in self._inputs.items()}
        inputs |= {name: inputs[name][:, start:] for name in ("input_ids", "position_ids")}
        cache = fill_cache(self._empty(), self._cache, range(self.layers if start else 0), slice(0, start), each)
        with steering_rows(self.model, self.edits, self.prompts, sets) as context:
            with resume_from_layer(self.model, first, self._hidden[first][:, start:].repeat_interleave(each, 0)):
                last, cache = self._read(inputs, cache)
            fill_cache(cache, self._cache, range(first), slice(start, None), each)
            context.repeat(self.options.most)
            cache.batch_repeat_interleave(self.options.most)
            whole = len(self.prompts) * each
            share = (1 - first / self.layers) * (1 - start / self._inputs["input_ids"].shape[1])
            self.cost += Cost(whole, whole * share)
            return self._continued(last, cache, each, first)

    def _untouched(self) -> int:
        """Number of columns at the left that no edit changes: those before the first key of any span."""
        edits = list(Edits(()) + self.edits)
        sinks = any(getattr(layer, "sinks", None) is not None for layer in attention_layers(self.model).values())
        if not edits or sinks or not all(edit.leaves_prefix_unchanged for edit in edits):
            return 0
        bound, width = BatchSpans(self.prompts), max(self.prompts.lengths)
        marked = [bound.mask(where, len(self.prompts), width) for edit in edits for where in getattr(edit, "spans", ())]
        ahead = torch.stack(marked).any(0).int().argmax(1) + (width - torch.tensor(self.prompts.lengths))
        return min(int(ahead.min()), width - 1)

    def _empty(self) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config())

    def _read(self, inputs: dict[str, Tensor], cache: Any = None) -> tuple[Tensor, Any]:
        cache = self._empty() if cache is None else cache
        with torch.no_grad():
            out: Any = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last = check_logits(self.model, out.logits[:, -1], inputs)
        return last.float().log_softmax(-1), out.past_key_values

    def _continued(self, last: Tensor, cache: Any, each: int, first: int = 0) -> Tensor:
        """[p i o] from the log-probabilities after the prompts, [p*i v], and the cache, whose rows are p, i, o."""
        most = self.options.most
        rows = [(*row, *[()] * (most - len(row))) for row in self.options.ids]
        sizes = torch.tensor([[len(ids) for ids in row] for row in rows])
        width = int(sizes.max())
        ids = torch.tensor([[[*option, *[0] * (width - len(option))] for option in row] for row in rows])
        ids = ids[:, None].expand(-1, each, -1, -1).reshape(-1, width).to(last.device)
        scores = last.repeat_interleave(most, 0).gather(1, ids[:, :1])
        if width > 1:
            mask = self._inputs["attention_mask"].repeat_interleave(each * most, 0)
            position = mask.sum(1, keepdim=True) + torch.arange(width - 1, device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(mask), width - 1)], 1)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if first:
                    rows_of = self._after[first].unflatten(0, (-1, 1, most)).expand(-1, each, -1, -1, -1)
                    stack.enter_context(resume_from_layer(self.model, first, rows_of.flatten(0, 2)))
                out: Any = self.model(
                    input_ids=ids[:, :-1],
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                )
            check_logits(self.model, out.logits.flatten(0, 1), self._inputs)
            logits = out.logits.float()
            after = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            scores = torch.cat([scores, after], 1)
            self.cost += Cost(continuations=int((sizes > 0).sum()) * each)
        scores = scores.view(len(self.prompts), each, most, width).cpu()
        inside = torch.arange(width) < sizes[:, None, :, None]
        mean = torch.where(inside, scores, 0.0).sum(-1) / sizes[:, None].clamp(min=1)
        return torch.where(sizes[:, None] > 0, mean, -torch.inf)


def margins(scores: Tensor, options: Options) -> Tensor:
    """Score of the best right continuation minus that of the best wrong one, in nats per token.

    Above 0 the model prefers a right continuation.

    Args:
        scores: Scores `[p i o]` of `ContinuationScorer.under`.
        options: The continuations.

    Returns:
        Tensor: `[p i]`.

    Limits:
        Does not show that the model would generate either continuation.
    """
    right = torch.arange(scores.shape[-1]) < torch.tensor(options.right)[:, None, None]
    best = scores.masked_fill(~right, -torch.inf).amax(-1)
    return best - scores.masked_fill(right, -torch.inf).amax(-1)


def entropies(scores: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the continuations of a prompt. It needs no labels.

    Args:
        scores: Scores `[p i o]` of `ContinuationScorer.under`.

    Returns:
        Tensor: `[p i]`.
    """
    return torch.special.entr(scores.softmax(-1)).sum(-1)


def _first(heads: HeadSet) -> int:
    """The first layer that a head set names, -1 for an empty one."""
    return min((head.layer for head in heads), default=-1)


def _repeated(cache: Any, times: int) -> Any:
    """A copy of a cache with each row several times."""
    made = copy.deepcopy(cache)
    made.batch_repeat_interleave(times)
    return made
