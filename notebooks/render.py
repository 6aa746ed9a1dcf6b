"""Render notebooks: `python notebooks/render.py [01 02 ...]` runs the scripts and writes each .ipynb beside its script.

A figure is kept as plotly's data, without the megabytes of its script, and as a picture for pages that run no scripts,
such as GitHub's. Whatever a notebook writes to its folder is gone afterwards.
"""

import os
import sys
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbclient
import plotly.graph_objects as go
from nbformat import NotebookNode

from interp import plots

FOLDER = Path(__file__).parent
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
FIGURE = "application/vnd.plotly.v1+json"
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "PLOTLY_RENDERER": "plotly_mimetype"}


def run(notebook: NotebookNode, folder: Path, timeout: int = 600) -> NotebookNode:
    """The notebook with the outputs of its cells, run in a folder; a cell that raises ends it with its traceback."""
    settings = {"timeout": timeout, "record_timing": False, "resources": {"metadata": {"path": str(folder)}}}
    return nbclient.NotebookClient(notebook, **settings).execute(env=os.environ | QUIET)


def picture(figure: dict) -> str:
    """A figure of plotly as a PNG, in base64."""
    held = BytesIO()
    plots.picture(go.Figure(figure), width=800).savefig(held, format="png")
    return b64encode(held.getvalue()).decode()


def main(names: list[str]) -> None:
    for path in SCRIPTS:
        if names and not path.name.startswith(tuple(names)):
            continue
        with TemporaryDirectory() as folder:
            made = run(jupytext.read(path), Path(folder))
        for cell in made.cells:
            for output in cell.get("outputs", ()):
                if FIGURE in output.get("data", {}):
                    output.data["image/png"] = picture(output.data[FIGURE])
        jupytext.write(made, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
