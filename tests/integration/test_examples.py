"""The notebook runs, and what the examples for clusters start is understood."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from dpace.config import Recipe
from dpace.recipes.flags import parse

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "demo.ipynb"


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


@pytest.mark.parametrize("name", ["cluster/train.sbatch", "cluster/sky.yaml"])
def test_what_a_cluster_starts_is_understood(name):
    """Its dpace commands have verbs and flags that exist."""
    text = (EXAMPLES / name).read_text()
    if name.endswith(".yaml"):
        text = "\n".join(task["run"] for task in yaml.safe_load_all(text) if "run" in task)
    text = re.sub(r"^\s*#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    commands = re.findall(r"(?:dpace\.cli|\bdpace) (respond|train) (.*)", text)
    assert [verb for verb, _ in commands] == ["respond", "train"]
    for verb, rest in commands:
        words = shlex.split(rest.replace('"${URLS[@]}"', "http://a:1 http://b:1"))
        assert words[0] == "$RECIPE"
        parse(Recipe, verb, words[1:])
