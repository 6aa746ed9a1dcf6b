"""Roles of heads as rows of a table."""

from typing import Any

from interp import plots
from interp.analyses.views.head_roles import HeadRoles
from interp.hooks.model.heads import Head

N_LISTED = 12
"""heads of a role that are listed"""


def rows_of(found: HeadRoles) -> list[dict[str, Any]]:
    """The heads of each role, strongest first.

    Args:
        found: The roles.
    """
    rows = []
    for place, name in enumerate(found.names):
        scores, has = found.scores[place], found.has[place]
        confident = found.confident[place]
        order = scores.flatten().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        heads = [Head(*divmod(i, scores.shape[1])) for i in order[: int(has.sum())]]
        rows.append(
            {
                "title": plots.title_of(name),
                "colour": plots.colour_of(name, place),
                "threshold": found.thresholds[place],
                "confident": int(confident.sum()),
                "tentative": int(has.sum()) - int(confident.sum()),
                "heads": [str(head) for head in heads[:N_LISTED]],
                "more": max(0, len(heads) - N_LISTED),
            }
        )
    return rows
