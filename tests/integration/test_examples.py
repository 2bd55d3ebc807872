"""The notebook runs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "demo.ipynb"


@pytest.mark.slow
@pytest.mark.network
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "drafter" in said and re.search(r"^tau \d", said, flags=re.MULTILINE)


def test_the_notebook_imports_names_that_exist():
    """The default tests see it too when a name moves; only the slow test above runs the cells."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    source = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
    imports = re.findall(r"^from dpace.*$", source, flags=re.MULTILINE)
    assert imports
    exec("\n".join(imports), {})
