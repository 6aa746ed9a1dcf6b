"""Cards of single heads: what each scored, its best prompts, and what it writes where it looks."""

from typing import Any

from interp import plots
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.views.head_roles import HeadRoles, cut_of
from interp.findings import Findings
from interp.hooks.model.heads import Head
from interp.report.words import cut
from interp.results import shown_heads

PROMPTS, LONG, READ = 2, 110, 3


def table(found: HeadRoles) -> list[dict[str, Any]]:
    """The heads of each function, strongest first."""
    rows = []
    for place, name in enumerate(found.names):
        scores, has, sure = found.scores[place], found.has[place], found.has[place] & found.sure[place]
        order = scores.flatten().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        heads = [Head(*divmod(i, scores.shape[1])) for i in order[: int(has.sum())]]
        rows.append(
            {
                "title": plots.title_of(name),
                "colour": plots.colour_of(name, place),
                "cut": found.cuts[place],
                "sure": int(sure.sum()),
                "likely": int(has.sum()) - int(sure.sum()),
                "heads": [str(head) for head in heads[:12]],
                "more": max(0, len(heads) - 12),
            }
        )
    return rows


def cards(findings: Findings, found: HeadRoles | None) -> list[dict[str, Any]]:
    """One card for each of the heads that stand first in some analysis."""
    explored = {str(head) for head in findings.explored.heads} if findings.explored is not None else set()
    return [
        {
            "head": str(head),
            "functions": [plots.title_of(name).lower() for name in found.of(head)] if found is not None else [],
            "scores": [_score(name, scores, head) for name, scores in findings.scores.items()],
            "prompts": _best(findings, head),
            "explored": str(head) in explored,
            "written": _written(findings, head),
        }
        for head in shown_heads(findings.scores)
    ]


def _score(name: str, scores: HeadScores, head: Head) -> dict[str, Any]:
    value, low, high = (float(t[head]) for t in (scores.values, scores.low, scores.high))
    rank = 1 + int((scores.values > scores.values[head]).sum()) if value == value else None
    most = max([1.0, *(end for end in (value, high) if end == end)])
    return {
        "title": plots.title_of(name), "value": value, "low": low, "high": high, "rank": rank, "scale": most,
        "threshold": cut_of(name, scores), "of": len(scores),
    }  # fmt: skip


def _best(findings: Findings, head: Head) -> list[dict[str, Any]]:
    """The prompts of the head's best analysis on which it scores highest."""
    ranked = [
        (int((scores.values > scores.values[head]).sum()), name)
        for name, scores in findings.scores.items()
        if float(scores.values[head]) == float(scores.values[head])
    ]
    if not ranked:
        return []
    name = min(ranked)[1]
    scores, texts = findings.scores[name], findings.texts.get(name, ())
    column = scores.per_prompt[:, head.layer, head.head]
    order = column.nan_to_num(nan=float("-inf")).argsort(descending=True, stable=True).tolist()
    return [
        {
            "analysis": plots.title_of(name).lower(),
            "value": float(column[i]),
            "text": cut(texts[i], LONG) if i < len(texts) else f"prompt {i + 1}",
        }
        for i in order[:PROMPTS]
        if float(column[i]) == float(column[i])
    ]


def _written(findings: Findings, head: Head) -> list[dict[str, Any]]:
    """The most attended of the tokens that were read, and what the head would write for each."""
    told = findings.written
    if told is None or str(head) not in told.heads:
        return []
    most = sorted(told.of(head), key=lambda reading: -reading.attention)[:READ]
    return [
        {
            "read": reading.token.text,
            "attention": reading.attention,
            "tokens": [token.text for token in reading.writes],
        }
        for reading in most
    ]
