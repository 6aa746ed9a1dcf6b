"""DuoAttention: some kv heads keep everything, the others the first keys and the last."""

from dataclasses import dataclass
from typing import Any

from interp.analyses.kv.full_cache_heads import full_cache_heads
from interp.analyses.kv.streaming import Streaming
from interp.analyses.registry import selector
from interp.analyses.results.head_scores import HeadScores


@selector(name="duo_attention", title="DuoAttention", order=6, needs=("duo_gates",))
@dataclass(frozen=True)
class DuoAttention(Streaming):
    """The kv heads with the highest gates keep everything, the others the first keys and the last.

    `DuoAttention.from_scores(identify.duo_gates(...), keep_ratio)` gives retrieval heads `part` of the budget and
    streaming heads the rest.

    Args:
        keep_ratio: Share of the prompt's keys that the model keeps.
        n_sink: Number of first keys that streaming heads keep, which are part of `keep_ratio`.
        n_recent: Least number of last keys that streaming heads keep.
        full_cache_heads: Heads whose kv heads keep everything.

    Examples:
        >>> from interp.analyses.kv import DuoAttention
        >>> DuoAttention.from_scores(scores, 0.8, part=0.7).full_cache_heads.count("L")
        4

    Source:
        Xiao et al. 2410.10819.

    Differs:
        The share of keys is given and `part` says how it is divided, where the paper fixes the share of full heads. The
        prompt is read with all keys in all heads.

    Limits:
        Does not show for which tasks the gates were not trained.
    """

    @classmethod
    def from_scores(
        cls, scores: HeadScores, keep_ratio: float, *, part: float = 0.7, **settings: Any
    ) -> "DuoAttention":
        """Heads with a full cache by a score table: the highest ones.

        Args:
            scores: Scores, such as those of `identify.duo_gates`.
            keep_ratio: Share of the prompt's keys that the model keeps.
            part: Part of this budget for heads with a full cache.
            settings: Further fields.

        Returns:
            DuoAttention: the selector.
        """
        heads = str(full_cache_heads(scores, keep_ratio, part))
        return cls(**{"keep_ratio": keep_ratio, "full_cache_heads": heads, **settings})
