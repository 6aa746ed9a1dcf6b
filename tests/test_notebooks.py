"""Notebooks run from the first cell to the last, whose assertion is their conclusion; rendered ones are of today.

To render one, make it with `jupytext --to ipynb notebooks/first_look.py` and fill it in with
`TQDM_DISABLE=1 PYTHONWARNINGS=ignore PLOTLY_RENDERER=plotly_mimetype pytest --nbmake --overwrite notebooks`:
figures are kept as data, without the megabytes of their script.
"""

from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = jupytext.read(path)
    # whatever a cell writes is gone with the folder; a cell that raises ends the test with its traceback
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_rendered_notebook_has_the_cells_of_its_script(path):
    script, rendered = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [cell.source for cell in rendered.cells] == [cell.source for cell in script.cells]
    assert all(cell.execution_count for cell in rendered.cells if cell.cell_type == "code")
