"""Cards of single heads: scores, best prompts, and the tokens that a head would write."""

from typing import Any

from interp import plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.leading import leading_heads
from interp.analyses.views.explore import Explored
from interp.analyses.views.head_roles import HeadRoles, threshold_of
from interp.analyses.views.ov_tokens import OvTokens
from interp.hooks.model.heads import Head
from interp.report.read_tokens import query_words, repeated_texts, span_words
from interp.report.words import cut
from interp.runs.results import RunResults

N_EACH, MAX_CARDS = 3, 12
"""top heads of each analysis that get a card, and cards at most"""
N_PROMPTS, MAX_CHARACTERS, N_READ = 2, 110, 3
"""best prompts of a card, characters of each, and attended tokens"""


def cards(results: RunResults, roles: HeadRoles | None) -> list[dict[str, Any]]:
    """One card for each of the leading heads.

    Args:
        results: The results of a run.
        roles: Roles of the heads, where any were measured.
    """
    found = list(results.values())
    explored = {str(head) for each in found if isinstance(each, Explored) for head in each.heads}
    written = next((each for each in found if isinstance(each, OvTokens)), None)
    return [
        {
            "head": str(head),
            "roles": [plots.title_of(name).lower() for name in roles.of(head)] if roles is not None else [],
            "scores": [_score(name, scores, head) for name, scores in results.scores.items()],
            "prompts": _best(results, head),
            "explored": str(head) in explored,
            "written": [] if written is None else _written(written, head),
            "read": "" if written is None else span_words(written),
            "query": "" if written is None else query_words(written),
        }
        for head in leading_heads(results.scores, N_EACH, MAX_CARDS)
    ]


def _score(name: str, scores: HeadScores, head: Head) -> dict[str, Any]:
    value, low, high = (float(t[head]) for t in (scores.values, scores.low, scores.high))
    # a head at the floor of a table has no rank
    rank = 1 + int((scores.values > scores.values[head]).sum()) if value > scores.floor else None
    scale = max([1.0, *(end for end in (value, high) if end == end)])
    return {
        "title": plots.title_of(name), "value": value, "low": low, "high": high, "rank": rank, "scale": scale,
        "threshold": threshold_of(name, scores), "of": scores.n_scored,
    }  # fmt: skip


def _best(results: RunResults, head: Head) -> list[dict[str, Any]]:
    """The prompts with the highest scores of a head, in the analysis in which it ranks highest."""
    ranked = [
        (int((scores.values > scores.values[head]).sum()), name)
        for name, scores in results.scores.items()
        if float(scores.values[head]) > scores.floor
    ]
    if not ranked:
        return []
    name = min(ranked)[1]
    scores, texts = results.scores[name], results.texts.get(name, ())
    column = scores.per_prompt[:, head.layer, head.head]
    order = column.nan_to_num(nan=float("-inf")).argsort(descending=True, stable=True).tolist()
    return [
        {
            "analysis": plots.title_of(name),
            "value": float(column[i]),
            "text": cut(texts[i], MAX_CHARACTERS) if i < len(texts) else f"prompt {i + 1}",
        }
        for i in order[:N_PROMPTS]
        if float(column[i]) == float(column[i])
    ]


def _written(view: OvTokens, head: Head) -> list[dict[str, Any]]:
    """The most attended of the read tokens, and the tokens that the head would write for each."""
    if str(head) not in view.heads:
        return []
    most = sorted(view.of(head), key=lambda reading: -reading.attention)[:N_READ]
    repeated = repeated_texts(most)
    return [
        {
            "read": reading.token.text,
            "position": f"{reading.token.position:,}" if reading.token.text in repeated else "",
            "attention": reading.attention,
            "tokens": [token.text for token in reading.writes],
        }
        for reading in most
    ]
