"""Score tables as text and as HTML."""

import math
from html import escape
from typing import TYPE_CHECKING, Any

from interp.analyses.results.reply_limit import sentence_of_scores
from interp.hooks.model.heads import Head

if TYPE_CHECKING:
    from interp.analyses.results.head_scores import HeadScores


def frame(scores: "HeadScores") -> Any:
    """See `HeadScores.to_frame`.

    Args:
        scores: The table.

    Returns:
        The DataFrame.
    """
    import pandas as pd

    heads = list(scores)
    columns = {"value": scores.values, "low": scores.low, "high": scores.high, "frequency": scores.frequency}
    return pd.DataFrame(
        {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "name": [str(head) for head in heads],
            **{name: table.flatten().numpy() for name, table in columns.items()},
        }
    )


def summary(scores: "HeadScores", top: int) -> str:
    """See `HeadScores.summary`.

    Args:
        scores: The table.
        top: Number of heads.

    Returns:
        The text.
    """
    first = f"{scores.name}: {scores.unit}, {scores.counted} prompts counted"
    if scores.threshold is not None:
        above, confident = len(scores.heads()), len(scores.confident())
        first += f", {above} heads above {scores.threshold:g}"
        first += f" ({confident} confident)" if scores.threshold > 0 else ""
    lines = [first]
    if not scores.counted:
        lines += [f"  no head has a score, since none of the {len(scores.per_prompt)} prompts counts."]
    lines += [f"  {text}" for text in (sentence_of_scores(scores.extras, scores.settings),) if text]
    if not math.isnan(scores.split_half):
        lines.append(f"  rank correlation between halves of the prompts: {scores.split_half:.2f}")
    leading = scores.leading(top)
    for found in leading:
        interval = "" if math.isnan(found.low) else f"  [{found.low:.3f}, {found.high:.3f}]"
        held_out = "" if math.isnan(found.held_out) else f"  held out {found.held_out:.3f}"
        share = "" if math.isnan(found.top_share) else f"  top {top} in {found.top_share:.0%}"
        lines.append(f"  {found.head!s:8s} {found.value:.3f}{interval}{held_out}{share}")
    if len(leading) < top and scores.n_unranked:
        lines.append(f"  {unranked(scores)}")
    return "\n".join(lines)


def unranked(scores: "HeadScores") -> str:
    """A sentence on the heads at or below the floor of a table, "" where all heads have a rank.

    Args:
        scores: The table.

    Returns:
        The sentence.
    """
    if not scores.n_unranked:
        return ""
    number, floor = scores.n_unranked, f"{scores.floor:.3g}"
    if (scores.values < scores.floor).any():
        return f"{number} heads score {floor} or less and are not ranked."
    return f"{number} {'head scores' if number == 1 else 'heads score'} {floor} and {_is(number)} not ranked."


def described(scores: "HeadScores", head: Head) -> str:
    """A head with its score and interval, such as "L1H2 0.51 [0.40, 0.60]".

    Args:
        scores: The table.
        head: A head of it.

    Returns:
        The text.
    """
    low, high = float(scores.low[head]), float(scores.high[head])
    interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{head} {scores[head]:.2f}{interval}"


def html(scores: "HeadScores", top: int = 10) -> str:
    """The first heads of a table as HTML.

    Args:
        scores: The table.
        top: Number of heads.

    Returns:
        The HTML.
    """
    rows = "".join(
        f"<tr><td>{found.head}</td><td>{found.value:.3f}</td><td>{found.low:.3f}</td><td>{found.high:.3f}</td>"
        f"<td>{found.held_out:.3f}</td><td>{found.top_share:.0%}</td>"
        f"<td>{float(scores.frequency[found.head]):.2f}</td></tr>"
        if not math.isnan(found.top_share)
        else f"<tr><td>{found.head}</td><td>{found.value:.3f}</td><td></td><td></td><td></td><td></td>"
        f"<td>{float(scores.frequency[found.head]):.2f}</td></tr>"
        for found in scores.leading(top)
    )
    unit = f" ({escape(scores.unit)})" if scores.unit else ""
    halves = "" if math.isnan(scores.split_half) else f", rank correlation between halves {scores.split_half:.2f}"
    names = ("head", "value", "low", "high", "held out", f"in the top {top} in", "frequency")
    return (
        f"<table><caption>{escape(scores.name)}{unit}, {scores.layers}x{scores.n_heads} heads, "
        f"n={scores.counted}{halves}</caption><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"
    )


def _is(number: int) -> str:
    return "is" if number == 1 else "are"
