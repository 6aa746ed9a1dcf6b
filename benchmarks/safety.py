"""Tables of docs/safety.md from the folders of safety runs.

interp safety MODEL -o runs/safety-zero --kinds zero
python -m benchmarks.safety runs/safety-zero [--json docs/safety.json]
"""

import argparse
import json
from pathlib import Path

from interp.findings import Findings
from interp.report.refusals import groups, safety_words
from interp.safety import safety_findings

MEASURES = ("refused", "harmless refused", "easy right", "neutral loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    every = [safety_findings(folder) for folder in arguments.folders]
    for found in every:
        print("\n".join(safety_words(found.safety[0])) + "\n")
        print(tables(found))
    if arguments.json:
        kept = [
            {
                "provenance": found.provenance.to_dict(),
                "plan": found.settings,
                "refused": {name: sum(asked["refused"]) for name, asked in found.safety[0].asked.items()},
                "top": {name: {str(h): scores[h] for h in scores.top(20)} for name, scores in found.scores.items()},
                "groups": found.safety[0].groups,
                "curves": {kind: curve.to_dict() for kind, curve in found.safety[0].curves.items()},
            }
            for found in every
        ]
        arguments.json.write_text(json.dumps(kept) + "\n")


def tables(found: Findings) -> str:
    """Return the agreement of the scores, the curves and the groups as Markdown."""
    lines = []
    names = list(found.scores)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            agreed = found.scores[one].compare(found.scores[other], 10)
            lines.append(f"{one}, {other}: Spearman {agreed.spearman:.2f}, {agreed.overlap} of the top 10 shared")
    for kind, curve in found.safety[0].curves.items():
        lines += ["", f"| {kind}: heads | " + " | ".join(MEASURES) + " |", "|---" * (1 + len(MEASURES)) + "|"]
        for ranking in curve.rankings:
            for size in curve.sizes(ranking):
                cells = []
                for measure in MEASURES:
                    mean, low, high = curve.at(ranking, size, measure)
                    percent = measure != "neutral loss"
                    form = "{:.0%} [{:.0%}, {:.0%}]" if percent else "{:.2f} [{:.2f}, {:.2f}]"
                    cells.append(form.format(mean, low, high))
                label = ranking if ranking == "as loaded" else f"{size} {ranking}"
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines += ["", f"| {kind}: group | degrees | random | by layer |", "|---|---|---|---|"]
        for row in groups(found.safety[0].groups[kind]):
            lines.append(f"| {row['heads']} | {row['degrees']:.3f} | {row['random']} | {row['by_layer']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
