"""The README's picture, from a run folder: `python -m benchmarks.pictures runs/demo` after `interp score all demo`."""

from pathlib import Path
from typing import Annotated

import typer

from interp import plots
from interp.results import findings

HERE = Path(__file__).resolve().parents[1] / "docs" / "assets"


def main(
    folder: Annotated[Path, typer.Argument(help="A finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = HERE,
) -> None:
    """Draw what the heads do."""
    path = plots.save(plots.atlas(findings(folder).scores), out / "heads.png", width=1100, scale=1.6)
    typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
