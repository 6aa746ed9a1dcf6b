"""Notebooks run from the first cell to the last, whose assertion is their conclusion; rendered ones are of today.

`python notebooks/render.py 03` renders the notebooks whose names begin with 03. What a notebook concludes has to fail
where there is nothing to conclude: some run on a model of random weights too, put in place of the one `MODEL` line.
"""

import json
from pathlib import Path
from typing import Any

import jupytext
import pytest
import scripts
import torch
from nbclient.exceptions import CellExecutionError
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))
MODEL = 'MODEL = "demo"'
SECONDS = {"03_sinks": 1500, "04_pasta": 900, "06_long_context": 1200}
"""limits where the usual one does not do; times on 2 cores are a quarter of them"""
LARGEST = 400_000
"""bytes of a rendered notebook"""


def seconds(path):
    return SECONDS.get(path.stem, 300)


def every(*marks, paths=NOTEBOOKS):
    rows = [pytest.param(path, id=path.stem, marks=[*marks, pytest.mark.timeout(seconds(path))]) for path in paths]
    return pytest.mark.parametrize("path", rows)


@pytest.fixture(scope="module")
def render():
    """notebooks/render.py, which belongs to no package."""
    return scripts.load(FOLDER / "render.py")


def lines_of(notebook):
    return [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]


def replaced(notebook, old, new):
    """The notebook with one line of its code replaced, which has to be there, and once."""
    found = lines_of(notebook).count(old)
    assert found == 1, f"{old!r} stands {found} times"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(new if line == old else line for line in cell.source.splitlines())
    return notebook


@pytest.fixture(scope="module")
def random_model(demo, tmp_path_factory):
    """A folder with a small model of random weights and the demo's tokenizer."""
    _, tokenizer = demo
    folder = tmp_path_factory.mktemp("random")
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 12}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=8, max_position_embeddings=8192, **small)
    torch.manual_seed(0)
    made = LlamaForCausalLM(config)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_names_sort_in_the_order_of_reading():
    assert [path.stem[:3] for path in NOTEBOOKS] == [f"0{i}_" for i in range(1, 9)]


@pytest.mark.slow
@every()
def test_notebook_runs(path, render, tmp_path):
    render.run(jupytext.read(path), tmp_path, timeout=seconds(path))


@every()
def test_the_model_is_chosen_in_one_line(path):
    changed = replaced(jupytext.read(path), MODEL, 'MODEL = "other"')
    assert [line for line in lines_of(changed) if line.startswith("MODEL =")] == ['MODEL = "other"']


@every()
def test_rendered_notebook_has_the_cells_of_its_script(path, render):
    script, rendered = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [cell.source for cell in rendered.cells] == [cell.source for cell in script.cells]
    code = [cell for cell in rendered.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    figures = [output.data for output in outputs if render.FIGURE in output.get("data", {})]
    assert all("image/png" in data for data in figures)
    assert path.with_suffix(".ipynb").stat().st_size < LARGEST


@pytest.mark.slow
@every(paths=[path for path in NOTEBOOKS if path.stem[:2] in ("01", "04", "07")])
def test_nothing_is_concluded_of_random_weights(path, render, random_model, tmp_path):
    notebook = replaced(jupytext.read(path), MODEL, f"MODEL = {json.dumps(str(random_model))}")
    failed = in_last_cell(render, notebook, tmp_path, seconds(path))
    assert failed == "AssertionError"


@pytest.mark.slow
def test_a_head_that_writes_no_refusal_is_not_found(render, random_model, tmp_path):
    notebook = jupytext.read(FOLDER / "05_safety_heads.py")
    replaced(notebook, MODEL, f"MODEL = {json.dumps(str(random_model))}")
    replaced(notebook, "def plant(seed, size=1.5):", "def plant(seed, size=0.0):")
    assert in_last_cell(render, notebook, tmp_path, 300) == "AssertionError"


def in_last_cell(render, notebook, folder, limit):
    """The name of the error with which the last cell ends; all others have to run."""
    with pytest.raises(CellExecutionError) as caught:
        render.run(notebook, folder, timeout=limit)
    *before, last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(output.output_type != "error" for cell in before for output in cell.outputs), caught.value
    assert any(output.output_type == "error" for output in last.outputs)
    return caught.value.ename
