"""Table of the effects of steering, with one row per finished run of `interp steer`.

    interp steer demo --method pasta --task json --out runs/pasta-json
    python -m benchmarks.steered runs/*

"beyond" counts the random sets by layer under which fewer replies are right than under the chosen heads.
"""

import argparse
from pathlib import Path

from interp.analyses.steer.result import SteeringResult
from interp.runs.results import is_finished, read_results

CONDITIONS = ("baseline", "steered", "random", "random by layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    rows = [row(folder) for folder in parser.parse_args().folders if is_finished(folder)]
    print("| edit | task | heads | baseline | steered | random heads | random by layer | beyond | minutes |")
    print("|---" * 9 + "|")
    print("\n".join(rows))


def row(folder: Path) -> str:
    """Return the row of one run."""
    results = read_results(folder)
    (found,) = [result for result in results.results.values() if isinstance(result, SteeringResult)]
    trials = found.trials
    cells = [trials.intervention, found.task, f"{found.chosen} ({trials.sizes('steered')[0]:g})"]
    for condition in CONDITIONS:
        if condition in trials.conditions:
            mean, low, high = trials.mean(condition)
            cells.append(f"{mean:.0%} [{low:.0%}, {high:.0%}]")
        else:
            cells.append("")
    test = trials.set_test("steered")
    cells.append("" if test is None else f"{test.n_beyond} of {test.n_sets}, p = {test.p_value:.2g}")
    return "| " + " | ".join([*cells, f"{results.seconds / 60:.0f}"]) + " |"


if __name__ == "__main__":
    main()
