"""The section of a steering run: the edit, the choice of heads and settings, the test, and the profile of heads."""

from interp import plots
from interp.analyses import registry
from interp.analyses.results.trial import BASELINE
from interp.analyses.steer.describe import describe
from interp.analyses.steer.result import SteeringResult
from interp.report.page import Page, Section
from interp.report.sections.dispatch import section
from interp.report.sections.trials import trials_body
from interp.report.trials_words import trials_words


@section.register(SteeringResult)
def _(result: SteeringResult, name: str, page: Page) -> Section:
    entry = registry.find(result.method, "edit")
    method = result.method if entry is None else entry.title
    words = [f"{describe(result.edits)} on {result.task}."]
    if result.tried and result.tried[0].name == BASELINE:
        words.append("On the dev split, no setting was better than the unmodified model.")
    body = page.render(
        "sections/steering.html.j2",
        words=words,
        chosen=result.chosen,
        trials=trials_body(result.trials, page),
        tried=result.tried,
        map=None if result.profile is None else page.figure(plots.gains(result.profile)),
    )
    digest = page.render("sections/words.html.j2", words=[*words, *trials_words(result.trials)[:3]])
    return Section(f"Steering: {method} on {result.task}", body, digest)
