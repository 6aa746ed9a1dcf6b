"""Which keys the queries of a model can see, from masks and windows alone, without attention itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.hooks.seam import AttentionTap, ReadRequest, Site
from interp.kernels.contract import Call

KeysOf = Callable[[Tensor], Tensor]
"""positions of queries [b r] -> positions of their keys [b r n], -1 for none"""


def visible_at(call: Call, rows: Int[Tensor, "r"], columns: Int[Tensor, "b r n"]) -> Bool[Tensor, "b h r n"]:
    """Whether queries can attend to chosen keys, by causality, window, padding and mask; biases are ignored.

    Args:
        call: The attention call.
        rows: Indices of the queries within the call.
        columns: Columns of the keys of each query, -1 for none.

    Returns:
        Tensor: Bool [b h r n]; h is 1 where all heads see the same keys.
    """
    local = columns - call.k_start
    row = call.rows[rows][:, None]
    seen = (columns >= 0) & (local >= 0) & (local < call.k.shape[2])
    if call.causal:
        seen = seen & (columns <= row)
    if call.window is not None:
        seen = seen & (columns > row - call.window)
    local = local.clamp(0, max(0, call.k.shape[2] - 1))
    if call.live is not None:
        seen = seen & call.live.gather(1, local.flatten(1)).view_as(local)
    if call.row_live is not None:
        seen = seen & call.row_live[:, rows, None]
    seen = seen[:, None]
    if call.mask is not None:
        part = call.mask[:, :, rows]
        part = part.expand(len(columns), *part.shape[1:]).gather(-1, local[:, None].expand(-1, part.shape[1], -1, -1))
        seen = seen & (part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min)
    return seen


@dataclass(eq=False)
class Visibility(AttentionTap):
    """A tap that stores which of chosen keys any query of a batch can see, by layer and head.

    A detector uses it where a score of 0 would mean that a head looks elsewhere, while the window of its layer hides
    the target. `start` begins a batch.
    """

    keys: KeysOf | None = None
    _found: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def start(self, keys: KeysOf) -> None:
        """Begin a batch: forget what was found, and look at other keys."""
        self.keys, self._found = keys, {}

    @property
    def seen(self) -> Bool[Tensor, "b l h n"]:
        """Whether a query could see the key, for each key of the batch."""
        return torch.stack([self._found[layer] for layer in sorted(self._found)], 1)

    def want(self, site: Site) -> ReadRequest | None:
        if self.keys is None:
            return None
        call = site.call
        keys = self.keys(site.row_position.cpu())
        # most queries of a prompt have no key that counts
        rows = (keys >= 0).any(-1).any(0).nonzero()[:, 0]
        keys, rows = keys[:, rows].to(call.q.device), rows.to(call.q.device)
        columns = site.text.columns(keys)
        found = visible_at(call, rows, columns).any(2).expand(-1, call.q.shape[1], -1).cpu()
        before = self._found.get(site.layer)
        self._found[site.layer] = found if before is None else before | found
        return None


def keys_by_query(keys: Int[Tensor, "b q n"]) -> KeysOf:
    """The keys of each query from a table; a query beyond the table has none.

    Args:
        keys: Positions, -1 for none.
    """
    wide = torch.nn.functional.pad(keys, (0, 0, 0, 1), value=-1)

    def find(position: Tensor) -> Tensor:
        place = torch.where((position >= 0) & (position < keys.shape[1]), position, keys.shape[1])
        return wide.gather(1, place[..., None].expand(-1, -1, keys.shape[2]))

    return find


def keys_from(starts: Sequence[int], keys: Sequence[Sequence[int]]) -> KeysOf:
    """The same keys for every query from a position on.

    Args:
        starts: Position of the first query of each prompt.
        keys: Positions of the keys of each prompt.
    """
    most = max(1, *map(len, keys))
    padded = torch.tensor([[*row, *[-1] * (most - len(row))] for row in keys])
    begin = torch.tensor(list(starts))

    def find(position: Tensor) -> Tensor:
        later = position >= begin[:, None]
        return torch.where(later[..., None], padded[:, None], -1)

    return find
