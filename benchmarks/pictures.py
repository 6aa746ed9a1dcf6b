"""The picture of the README, drawn from a run folder.

Run `python -m benchmarks.pictures runs/demo` after `interp score basic demo --out runs/demo`.
"""

from pathlib import Path
from typing import Annotated

import typer

from interp import plots
from interp.runs.results import read_results

HERE = Path(__file__).resolve().parents[1] / "docs" / "assets"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = HERE,
) -> None:
    """Draw the atlas of the heads."""
    path = plots.save(plots.atlas(read_results(folder).scores), out / "heads.png", width=1100, scale=1.6)
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
