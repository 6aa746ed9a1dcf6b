"""Offsets: a fixed vector added to what a head writes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.errors import HeadError, UsageError
from interp.hooks.edit.edit import Edit, GateInput
from interp.hooks.model.heads import Head, HeadLayout, HeadSet

Vectors = tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True, repr=False)
class Offset(Edit):
    """A vector of its own added to each head's output: z'[b h q d] = z + scale v[h d], before the output projection.

    vectors: head name -> numbers, [d] each, or the path of a .safetensors file of such tensors, which is read once: the
    edit holds the numbers. heads: those of them that are taken, all by default.
    at "last": the last token of the prompt and every token after it, which is the last position of each forward of
    cached generation (ITI); at "all": every position (LoFiT, a bias of the output projection). scale 1, 0 changes
    nothing.
    Source: Li et al. 2306.03341, vectors made by `iti`; Yin et al. 2406.01563, step 2, whose vectors are trained.
    Differs: in a full recompute the tokens written so far keep their offsets, as they do in a cache.
    Cannot show: that the vector means what it was made from; compare with a random one of its length.
    """

    vectors: Any
    at: str = "last"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at not in ("last", "all"):
            raise UsageError(f"at={self.at!r} is none: take 'last' or 'all'.")
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise UsageError(f"scale={self.scale!r} is not a number: give one; 0 changes nothing.")
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
            raise UsageError("no attention call told the positions of these rows: run the model itself.")
        # the row that makes the first new token is the last of the prompt
        start = torch.tensor(output.steering.bound.lengths(z.shape[0]), device=z.device)[:, None] - 1
        return torch.where((output.row_position.to(z.device) >= start)[:, :, None, None], z + moves, z)

    def _moves(self, output: GateInput) -> Tensor:
        """Float [n d] what is added for the heads of one layer, made once in a context."""
        key = output.number, output.layer
        if key not in output.steering.constants:
            held = {Head.parse(name): vector for name, vector in self.vectors}
            mine = [held[Head(output.layer, head)] for head in output.heads]
            for head, vector in zip(output.heads, mine, strict=True):
                if len(vector) != output.z.shape[-1]:
                    raise UsageError(
                        f"the vector of {Head(output.layer, head)} has {len(vector)} numbers and this model's heads "
                        f"write {output.z.shape[-1]}: give vectors made on this model."
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
            raise UsageError(f"{given} holds no vectors ({error}): give a .safetensors file.") from None
    try:
        pairs = list(given.items()) if isinstance(given, Mapping) else [(name, vector) for name, vector in given]
        found = {Head.parse(name): torch.as_tensor(vector, dtype=torch.float32).cpu() for name, vector in pairs}
    except HeadError:
        raise
    except (TypeError, ValueError):
        raise UsageError(
            "vectors is no table of numbers by head: give {'L5H3': [...]}, or a .safetensors file."
        ) from None
    if not found or any(x.dim() != 1 or not len(x) or not bool(x.isfinite().all()) for x in found.values()):
        raise UsageError("vectors holds none, or one that is no list of finite numbers: give one [d] for each head.")
    return tuple(
        (str(head), tuple(vector.tolist())) for head, vector in sorted(found.items(), key=lambda item: item[0])
    )
