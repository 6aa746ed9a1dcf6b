"""`figure`: the plotly figure of any result, chosen by its type."""

from functools import singledispatch
from typing import TYPE_CHECKING, Any

from interp.analyses.results.result import Result
from interp.errors import UsageError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@singledispatch
def figure(result: Any) -> "Figure":
    """Draw a result as a plotly figure.

    Each type of result has one figure: a map of all heads for `HeadScores`, lines or points with intervals for
    `Trials`, and so on. Another package adds its own with `@interp.plots.figure.register`.

    Args:
        result: A result, such as `HeadScores` or `Trials`.

    Returns:
        Figure: A plotly figure.

    Raises:
        UsageError: For a type of result that has no figure.

    Examples:
        >>> interp.plots.figure(scores).layout.title.text
        'Induction: score of each head'
    """
    kind = type(result).__name__
    if isinstance(result, Result):
        raise UsageError(f"results of type {kind} have no figure; register one with interp.plots.figure.register.")
    raise UsageError(f"objects of type {kind} are no results; give HeadScores, Trials or another result.")
