"""Measures of a model with heads ablated, from shared forward passes, shared reference outputs and stored points."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp.analyses.causal.random_sets import Condition
from interp.analyses.causal.shared_forwards import SharedForwards
from interp.analyses.measures.losses import token_losses
from interp.analyses.prompt_sizes import REPLY_TOKENS
from interp.analyses.results.files import Parts
from interp.analyses.results.trial import Trial
from interp.analyses.tasks.needle import judge, judge_is_final
from interp.analyses.tasks.task import Judge
from interp.errors import UsageError
from interp.hooks.edit.ablation import AblationKind, Intervention, ReferenceOutputs, ablate
from interp.hooks.generate import Reply, generate
from interp.hooks.model.heads import HeadLayout, HeadSet
from interp.hooks.model.layers import attention_layers
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts

Measure = Callable[[nn.Module], Tensor]
"""a function of the model that returns `[p]` numbers, one for each prompt of the measure"""
KINDS: tuple[AblationKind, ...] = ("zero", "mean", "resample")
"""ablations that a check shows by default"""
NATS = "nats per token"
NEUTRAL = "loss on neutral text"
"""name of the measure of plain texts"""
MAX_SHARED_BYTES = 1 << 28
"""memory for outputs of all heads on the reference prompts; where they need more, those of each head set are read"""


class Ablations:
    """Ablations of several head sets of one model, which share the outputs on the reference prompts.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        reference: Prompts that "mean" and "resample" take values from.
        seed: Seed of "resample".
    """

    def __init__(self, model: nn.Module, reference: Prompts | None, seed: int) -> None:
        self.model, self.reference, self.seed = model, reference, seed
        self._outputs: dict[str, ReferenceOutputs | None] = {}

    @contextlib.contextmanager
    def ablate(self, heads: HeadSet, kind: AblationKind) -> Iterator[None]:
        """Ablate heads while the context is open.

        Args:
            heads: The heads; an empty set leaves the model unmodified.
            kind: The ablation, see `ablate`.
        """
        outputs = self.outputs(kind) if len(heads) else None
        reference = self.reference if kind in ("mean", "resample") else None
        with ablate(self.model, heads, kind, reference=reference, seed=self.seed, outputs=outputs):
            yield

    def outputs(self, kind: AblationKind) -> ReferenceOutputs | None:
        """Outputs of all heads on the reference prompts; None where they need none, or too much memory.

        Args:
            kind: The ablation.
        """
        if kind not in ("mean", "resample") or self.reference is None:
            return None
        if kind not in self._outputs:
            layout, layers = HeadLayout.of(self.model), set(attention_layers(self.model))
            every = HeadSet(tuple(head for head in layout.all() if head.layer in layers))
            tokens = 1 if kind == "mean" else len(self.reference) * max(self.reference.lengths)
            small = tokens * len(every) * layout.head_dim * 4 <= MAX_SHARED_BYTES
            intervention = Intervention(kind, reference=self.reference, seed=self.seed)
            self._outputs[kind] = ReferenceOutputs.of(self.model, every, intervention) if small else None
        return self._outputs[kind]


class AblatedMeasures:
    """Measures of one model under many head sets.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        measures: Name -> function of the model that returns one number for each of its prompts.
        tested: Tested head sets, at whose first layers forward passes may begin.
        shown: Measure -> number that an item must exceed on the unmodified model, where it shows the behaviour. Only
            such items are in the trials that follow that of the unmodified model.
        reference: Prompts that "mean" and "resample" take values from.
        seed: Seed of "resample".
        folder: Where finished points are kept; None to keep nothing.
        about: What the measures depend on, as JSON can hold it. Needed with `folder`.
        name: Name of the bar and of the files.
        progress: Show a progress bar.

    Raises:
        UsageError: If there is no measure, `shown` names another one, or `folder` is given without `about`.
    """

    def __init__(
        self,
        model: nn.Module,
        measures: Mapping[str, Measure],
        tested: Collection[HeadSet],
        *,
        shown: Mapping[str, float] | None = None,
        reference: Prompts | None = None,
        seed: int = 0,
        folder: Any = None,
        about: Any = None,
        name: str = "curve",
        progress: bool = False,
    ) -> None:
        from tqdm.auto import tqdm

        if folder is not None and about is None:
            raise UsageError("a folder needs about=; give what the measures depend on, such as their prompts.")
        self.model, self.measures = model, dict(measures)
        self._above, self._masks = dict(shown or {}), dict[str, Tensor]()
        if unknown := [name for name in self._above if name not in self.measures]:
            raise UsageError(f"shown= names the measure {unknown[0]!r}; choose from {', '.join(self.measures)}.")
        self.counted: dict[str, list[int]] = {}
        """measure -> items on which the unmodified model shows the behaviour, and all items"""
        self.provenance = Provenance.of(model, seed=seed)
        self.ablations = Ablations(model, reference, seed)
        self.shared = SharedForwards.of(model, tested)
        self.bar = tqdm(desc=name, unit="head set", disable=not progress, delay=2, leave=False)
        self._folder, self._name = folder, name
        referred = None if reference is None else [reference.fingerprint(), seed]
        self._made_with = [*source_of_numbers(self.provenance), about, referred]

    def trial(self, condition: Condition, kind: AblationKind, names: Sequence[str] = ()) -> Trial:
        """The measures with the heads of a condition ablated.

        Args:
            condition: The condition.
            kind: The ablation.
            names: Measures that are taken, by default all.
        """
        chosen = {name: self.measures[name] for name in names or self.measures}

        def work() -> dict[str, Tensor]:
            passes = self.shared.resume(condition.heads) if len(condition.heads) else self.shared.record()
            with self.ablations.ablate(condition.heads, kind), passes:
                return {str(i): numbers(name, take(self.model)) for i, (name, take) in enumerate(chosen.items())}

        parts = Parts.of(self._folder, self._name.replace(" ", "-"), [*self._made_with, kind, list(chosen)])
        made = parts.get(str(condition.heads), work)
        self.bar.update()
        found = {name: made[str(i)] for i, name in enumerate(chosen)}
        if not len(condition.heads):
            self._count(found)
        values = {
            name: tuple(x[self._masks[name]].tolist() if name in self._masks else x.tolist())
            for name, x in found.items()
        }
        return Trial(condition.name, values, condition.heads, condition.size, condition.draw, facts=condition.facts)

    def _count(self, values: Mapping[str, Tensor]) -> None:
        """Choose the items on which the unmodified model shows the behaviour; all of them where it shows none."""
        for name, least in self._above.items():
            shows = values[name] > least
            self.counted[name] = [int(shows.sum()), len(shows)]
            self._masks[name] = shows if shows.any() else torch.ones_like(shows)

    @property
    def shows_nothing(self) -> bool:
        """Whether the unmodified model shows the behaviour of the first measure on no item."""
        return self.counted.get(next(iter(self.measures)), [1])[0] == 0


def numbers(name: str, values: Any) -> Tensor:
    """The numbers of a measure.

    Args:
        name: Name of the measure.
        values: One number for each prompt.

    Raises:
        UsageError: If they are not finite, or not one for each prompt.
    """
    found = torch.as_tensor(values, dtype=torch.float32)
    if found.ndim != 1 or not len(found) or not bool(found.isfinite().all()):
        raise UsageError(
            f"measure {name!r} returned shape {tuple(found.shape)}, or a number that is not finite; return one finite "
            "number for each prompt."
        )
    return found


def accuracy(
    prompts: Prompts, *, max_new_tokens: int = REPLY_TOKENS, batch_size: int = 8, judge: Judge = judge
) -> Measure:
    """A measure: 1 for each prompt to which the greedy reply is right, otherwise 0.

    Args:
        prompts: Prompts with an answer in their meta, such as `tasks.needle`.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.
        judge: Function of a reply and its prompt that returns whether the reply is right.
    """

    def measure(model: nn.Module) -> Tensor:
        replies = replies_to(model, prompts, max_new_tokens, batch_size, judge)
        return torch.tensor([float(judge(reply.text, prompt)) for reply, prompt in zip(replies, prompts, strict=True)])

    return measure


def replies_to(
    model: nn.Module, prompts: Prompts, max_new_tokens: int, batch_size: int, judged_by: Judge | None = None
) -> list[Reply]:
    """Greedy replies, up to a newline. Replies for `tasks.judge` end once its verdict is certain.

    Args:
        model: The model, on which an ablation may be open.
        prompts: The prompts.
        max_new_tokens: Number of new tokens of a reply.
        batch_size: Number of prompts per forward pass.
        judged_by: Function that judges the replies; None for whole replies.
    """
    ended = judge_is_final if judged_by is judge else None
    replies: list[Reply] = []
    for batch in prompts.batches(batch_size):
        replies += generate(model, batch, max_new_tokens=max_new_tokens, stop="\n", ended=ended)
    return replies


def neutral_loss(prompts: Prompts, batch_size: int = 8) -> Measure:
    """A measure: the mean next-token loss of each plain text, in nats per token.

    Args:
        prompts: Plain texts.
        batch_size: Number of texts per forward pass.
    """
    return lambda model: token_losses(model, prompts, batch_size)


def source_of_numbers(source: Provenance) -> Sequence[Any]:
    """The model and the versions, for keys of stored pieces: without time, command and device."""
    return [source.config_hash, source.weights_hash, source.dtype, source.versions]
