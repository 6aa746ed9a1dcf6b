"""Tables of docs/safety.md from the folders of safety runs.

interp safety MODEL -o runs/safety-zero --ablations zero
python -m benchmarks.safety runs/safety-zero [--json docs/safety.json]
"""

import argparse
import json
from pathlib import Path

from interp.analyses.measures.refusals import RefusalResult
from interp.analyses.results.trial import BASELINE, RANDOM, RANDOM_BY_LAYER
from interp.analyses.results.trials import Trials
from interp.runs.results import RunResults, read_results

MEASURES = ("refused", "harmless refused", "easy right", "neutral loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of safety runs")
    parser.add_argument("--json", type=Path, help="file for all numbers of the runs")
    arguments = parser.parse_args()
    runs = [read_results(folder) for folder in arguments.folders]
    for run in runs:
        print("\n".join(run.missing.values()) + "\n" if run.missing else "")
        for name, result in run.results.items():
            if isinstance(result, RefusalResult):
                print(f"{name}: {result.summary()}\n")
                print(tables(run, result))
    if arguments.json:
        arguments.json.write_text(json.dumps([numbers(run) for run in runs]) + "\n")


def numbers(run: RunResults) -> dict:
    """Return the numbers of a run as JSON can hold them."""
    found = [result for result in run.results.values() if isinstance(result, RefusalResult)]
    return {
        "provenance": run.provenance.to_dict(),
        "plan": run.settings,
        "refused": {name: sum(replies.refused) for each in found for name, replies in each.replies.items()},
        "top": {name: {str(head): scores[head] for head in scores.top(20)} for name, scores in run.scores.items()},
        "groups": {ablation: trials.rows() for each in found for ablation, trials in each.groups.items()},
        "curves": {ablation: trials.rows() for each in found for ablation, trials in each.curves.items()},
    }


def tables(run: RunResults, result: RefusalResult) -> str:
    """Return the agreement of the scores, the curves and the groups as Markdown."""
    lines = []
    names = list(run.scores)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            agreed = run.scores[one].compare(run.scores[other], 10)
            lines.append(f"{one}, {other}: Spearman {agreed.spearman:.2f}, {agreed.overlap} of the top 10 shared")
    for ablation, curve in result.curves.items():
        lines += ["", f"| {ablation} ablation: heads | " + " | ".join(MEASURES) + " |"]
        lines += ["|---" * (1 + len(MEASURES)) + "|"]
        for condition in curve.conditions:
            for size in curve.sizes(condition):
                cells = [curve.show(measure, *curve.mean(condition, measure, size=size)) for measure in MEASURES]
                label = condition if condition == BASELINE else f"{size:g} {condition}"
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for ablation, groups in result.groups.items():
        lines += ["", f"| {ablation} ablation: group | degrees | random | random by layer |", "|---|---|---|---|"]
        lines += group_rows(groups)
    return "\n".join(lines)


def group_rows(groups: Trials) -> list[str]:
    """Return the row of each group: its angle, and the mean and the range of random groups."""
    (tested,) = groups.tested
    rows = []
    for size in groups.sizes(tested):
        heads = groups.select(tested, size)[0].heads
        cells = [f"{groups.mean(tested, 'degrees', size=size).mean:.3f}"]
        for control in (RANDOM, RANDOM_BY_LAYER):
            found = size in groups.sizes(control)
            mean, low, high = groups.mean(control, "degrees", size=size) if found else (0.0, 0.0, 0.0)
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})" if found else "")
        rows.append(f"| {heads} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    main()
