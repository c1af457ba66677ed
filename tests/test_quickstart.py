"""`examples/quickstart.ipynb` is a valid notebook, and its cells run in order."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_a_notebook_without_outputs(cells):
    """It has the fields required by nbformat 4.5."""
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    assert len({cell["id"] for cell in cells}) == len(cells) > 5
    for cell in cells:
        assert isinstance(cell["source"], list) and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))
        else:
            assert cell["cell_type"] == "markdown" and cell.keys().isdisjoint({"outputs"})


@pytest.mark.slow
def test_the_cells_run_and_the_model_learns(cells, tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code += "\nimport json\nprint(json.dumps([result['accuracy'], found, answers[0]]))\n"
    env = os.environ | {"STEPDISTILL_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy, found, answer = json.loads(done.stdout.splitlines()[-1])
    assert accuracy > 0.9
    assert {row["label"] for row in found} == {"smooth", "trouble"}
    assert answer["rationale"] and sum(answer["choices"].values()) == pytest.approx(1, abs=1e-4)
