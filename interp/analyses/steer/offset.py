"""Offset: a fixed vector is added to the output of each head."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.analyses.registry import edit
from interp.errors import HeadError, UsageError
from interp.hooks.edit.edit import Edit, GateInput
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.prompts.prompts import Prompts

Vectors = tuple[tuple[str, tuple[float, ...]], ...]


def _fit(
    model: Any,
    prompts: Prompts,
    *,
    span: Any = "",
    heads: str = "all",
    k: int = 48,
    alpha: float = 15.0,
    direction: str = "mass-mean",
    folds: int = 5,
    **fields: Any,
) -> "Offset":
    """An Offset by `iti`, from prompts with right and wrong continuations.

    Every second prompt gets its first right continuation and is true, the others their first wrong one.

    Args:
        k: Heads with the most accurate probes that are edited, where no heads are named.
        alpha: Length of the offsets, in deviations along the direction.
        direction: "mass-mean" or "probe".
        folds: Folds in which probes are tested.
    """
    from interp.analyses.measures.continuations import Options
    from interp.analyses.steer.iti import iti

    options = Options.of(prompts)
    labels = [number % 2 == 0 for number in range(len(prompts))]
    chosen = [0 if label else right for label, right in zip(labels, options.right, strict=True)]
    rows = [(*prompt.ids, *options.ids[number][chosen[number]]) for number, prompt in enumerate(prompts)]
    answered = Prompts.from_ids(rows, pad_id=prompts.pad_id, tokenizer=prompts.tokenizer)
    size = HeadLayout.of(model).size
    # named heads need a vector each
    found = iti(
        model,
        answered,
        labels,
        k=min(k, size) if heads == "all" else size,
        alpha=alpha,
        direction=direction,
        folds=max(2, min(folds, len(prompts) // 2)),
    )
    return replace(found.edit, heads=heads, **fields)


@edit(title="Offset", group="outputs", order=12, fitted=_fit)
@dataclass(frozen=True, repr=False)
class Offset(Edit):
    """A vector is added to the output of each head: `z'[b h q d] = z + scale v[h d]`, before the output projection.

    In a steering run without `vectors`, they are estimated by `iti` from the prompts of the profile split.

    Args:
        vectors: Head name -> numbers `[d]`, or the path of a .safetensors file of such tensors. The file is read once,
            and the edit holds the numbers.
        at: "last" for the last token of the prompt and every token after it, which is the last position of each forward
            pass of cached generation (ITI). "all" for every position, which is a bias of the output projection (LoFiT).
        scale: Factor of the vectors; 0 changes nothing.
        heads: Heads of `vectors` to edit, by default all of them.

    Raises:
        UsageError: If the vectors cannot be read, or a setting is out of range.
        HeadError: If a name is not that of a head.

    Examples:
        >>> edit = interp.steer.Offset({"L1H2": [0.5] * model.config.head_dim})
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Li et al. 2306.03341; Yin et al. 2406.01563, step 2, whose vectors are trained. `interp.steer.iti` computes the
        vectors of Li et al.

    Differs:
        In a full recompute the generated tokens keep their offsets, as they do in a cache.

    Limits:
        Does not show that the vector has the meaning of the data it was made from. Compare with a random vector of the
        same length.
    """

    vectors: Any
    at: str = "last"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at not in ("last", "all"):
            raise UsageError(f"unknown position at={self.at!r}; choose from 'last', 'all'.")
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise UsageError(f"scale={self.scale!r} is not a finite number; give one, such as 1.0.")
        object.__setattr__(self, "vectors", _vectors(self.vectors))

    def __repr__(self) -> str:
        names = [name for name, _ in self.vectors]
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, ..., {names[-1]}; {len(names)} heads"
        return f"Offset(heads={self.heads!r}, vectors=<{shown}>, at={self.at!r}, scale={self.scale})"

    @property
    def is_noop(self) -> bool:
        return self.scale == 0

    @property
    def transferable(self) -> bool:
        return False

    @property
    def needs_positions(self) -> bool:
        return self.at == "last"

    def chosen(self, layout: HeadLayout) -> HeadSet:
        return HeadSet.parse([name for name, _ in self.vectors], layout) & super().chosen(layout)

    @property
    def gate(self) -> Callable[[GateInput], Tensor]:
        return self._moved

    def _moved(self, output: GateInput) -> Tensor:
        z = output.z
        moves = self._moves(output).to(z)
        if not self.needs_positions:
            return z + moves
        if output.row_position is None:
            raise UsageError(
                "the positions of these rows are unknown; run the whole model, not its output projection alone."
            )
        # the row that makes the first new token is the last of the prompt
        start = torch.tensor(output.steering.bound.lengths(z.shape[0]), device=z.device)[:, None] - 1
        return torch.where((output.row_position.to(z.device) >= start)[:, :, None, None], z + moves, z)

    def _moves(self, output: GateInput) -> Tensor:
        """Float `[n d]`: the vectors of the heads of one layer, made once in a context."""
        key = output.number, output.layer
        if key not in output.steering.constants:
            held = {Head.parse(name): vector for name, vector in self.vectors}
            mine = [held[Head(output.layer, head)] for head in output.heads]
            for head, vector in zip(output.heads, mine, strict=True):
                if len(vector) != output.z.shape[-1]:
                    raise UsageError(
                        f"the vector of {Head(output.layer, head)} has {len(vector)} numbers, expected "
                        f"{output.z.shape[-1]}; give vectors that were made on this model."
                    )
            output.steering.constants[key] = torch.tensor(mine, device=output.z.device) * self.scale
        return output.steering.constants[key]


def _vectors(given: Any) -> Vectors:
    """Vectors by head name, sorted and each once, in float32. Raises UsageError, HeadError."""
    if isinstance(given, str | Path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            given = load_file(given)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{given} holds no vectors ({error}); give a .safetensors file.") from None
    try:
        pairs = list(given.items()) if isinstance(given, Mapping) else [(name, vector) for name, vector in given]
        found = {Head.parse(name): torch.as_tensor(vector, dtype=torch.float32, device="cpu") for name, vector in pairs}
    except HeadError:
        raise
    except (TypeError, ValueError):
        raise UsageError(
            "vectors is not a table of numbers by head; give {'L5H3': [...]}, or the path of a .safetensors file."
        ) from None
    if not found or any(x.dim() != 1 or not len(x) or not bool(x.isfinite().all()) for x in found.values()):
        raise UsageError(
            "vectors is empty, or holds other things than lists of finite numbers; give one [d] for each head."
        )
    return tuple(
        (str(head), tuple(vector.tolist())) for head, vector in sorted(found.items(), key=lambda item: item[0])
    )
