"""Table of the effects of steering, with one row per finished run of `interp steer`.

interp steer demo --method pasta --task json --out runs/pasta-json
python -m benchmarks.steered runs/*
"""

import argparse
from pathlib import Path

from interp.steerings import finished, steering_findings

GROUPS = ("as loaded", "steered", "random", "random by layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    rows = [row(folder) for folder in parser.parse_args().folders if finished(folder)]
    print("| edit | task | heads | as loaded | steered | random heads | random, by layer | min |")
    print("|---" * 8 + "|")
    print("\n".join(rows))


def row(folder: Path) -> str:
    """Return the row of one run."""
    found = steering_findings(folder)
    (told,) = found.steering
    cells = [told.check.kind, told.task, f"{told.chosen} ({told.check.k})"]
    for name in GROUPS:
        if name in told.check.groups:
            mean, low, high = told.check.group(name)
            cells.append(f"{mean:.0%} [{low:.0%}, {high:.0%}]")
        else:
            cells.append("")
    return "| " + " | ".join([*cells, f"{found.seconds / 60:.0f}"]) + " |"


if __name__ == "__main__":
    main()
