"""The section of refusals: replies to requests, refusals with heads ablated, and groups of heads."""

from interp import plots
from interp.analyses.measures.refusals import RefusalResult
from interp.analyses.results.trial import BASELINE
from interp.analyses.results.trials import Trials
from interp.report.page import Page, Section, title_of
from interp.report.sections.dispatch import section
from interp.report.sections.trials import trials_body
from interp.report.trials_words import set_words

DRAWN = ("refused", "neutral loss")
"""measures that are drawn"""
NULLS = ("No set of heads lowers", "Nothing is stated")
"""beginnings of sentences that state a null"""
MIN_ANSWERED = 0.5
"""share of the baseline's easy answers below which a model counts as broken"""


@section.register(RefusalResult)
def _(result: RefusalResult, name: str, page: Page) -> Section:
    words = refusal_words(result)
    body = page.render(
        "sections/refusals.html.j2",
        words=words,
        curves=[(kind, trials_body(found, page, DRAWN)) for kind, found in result.curves.items()],
        groups=[(kind, page.figure(plots.trials(found)), found.rows()) for kind, found in result.groups.items()],
    )
    return Section(title_of(name), body, page.render("sections/words.html.j2", words=words))


def refusal_words(result: RefusalResult) -> list[str]:
    """The result in sentences, the first about the unmodified model.

    Args:
        result: The result.
    """
    counts = [f"{sum(found.refused)} of {len(found.refused)} {name} requests" for name, found in result.replies.items()]
    words = [f"The unmodified model refused {' and '.join(counts)}."] if counts else []
    for kind, found in result.curves.items():
        if {"refused", "easy right"} <= set(found.measures) and BASELINE in found.conditions:
            words += _of_curve(kind, found)
    # a null comes first
    return sorted(words, key=lambda text: not text.startswith(NULLS))


def _of_curve(kind: str, found: Trials) -> list[str]:
    """The head set that lowers refusals most while the model still answers, and whether refusals are halved at all."""
    refused, easy = (found.mean(BASELINE, measure).mean for measure in ("refused", "easy right"))
    if not refused:
        return [
            f"Nothing is stated about heads under {kind} ablation: the unmodified model refuses none of the requests."
        ]
    if not easy:
        return [
            f"Nothing is stated about heads under {kind} ablation: the unmodified model answers no easy question, so a "
            "model that breaks could not be recognised."
        ]

    def mean(place: tuple[str, float], measure: str) -> float:
        return found.mean(place[0], measure, size=place[1]).mean

    places = [(name, size) for name in found.tested for size in found.sizes(name)]
    intact = [place for place in places if mean(place, "easy right") >= MIN_ANSWERED * easy]
    halved = [place for place in places if mean(place, "refused") <= refused / 2]
    words = []
    lower = [place for place in intact if mean(place, "refused") < refused]
    beyond = [place for place in found.findings("refused") if place in lower]
    if not lower:
        words.append(
            f"No set of heads lowers refusals under {kind} ablation while the model still answers easy questions."
        )
    elif not beyond:
        words.append(
            f"No set of heads lowers refusals beyond random heads under {kind} ablation while the model still answers "
            "easy questions."
        )
    else:
        ranking, size = min(beyond, key=lambda place: (mean(place, "refused"), place[1]))
        words.append(
            f"Under {kind} ablation, the first {size:g} heads by {ranking} lower the refusal rate of other requests to "
            f"{_share(found, ranking, size)}, and easy questions are still answered. It is the lowest of {len(beyond)} "
            f"sets that are beyond random heads after a correction for {len(places)} tests, so it is slightly too low."
        )
        test = found.set_test(ranking, "refused", size=size)
        words += [] if test is None else set_words(found, "refused", test, ranking, size)
    if not halved:
        words.append(f"No set of heads halves the refusals under {kind} ablation.")
    elif not set(halved) & set(intact):
        ranking, size = halved[0]
        words.append(
            f"Refusals are halved only where the model breaks: with {size:g} heads by {ranking} ablated, it answers "
            f"{mean((ranking, size), 'easy right'):.0%} of the easy questions."
        )
    return words


def _share(found: Trials, ranking: str, size: float) -> str:
    mean, low, high = found.mean(ranking, "refused", size=size)
    return f"{mean:.0%} [{low:.0%}, {high:.0%}]"
