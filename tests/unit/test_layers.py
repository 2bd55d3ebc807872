"""Imports go one way: later steps of the pipeline import earlier ones."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "dpace"
ORDER = "__init__ config progress weights metrics optimizer packing attention modeling_dflash cache fusion loss blocks target drafter folder layout gguf_file sampling lookup pace decode batch stream prompts sets responses dataset heldout".split()
ORDER += "objective train report predict benchmark dialects servers page compare check folder_checks doctor".split()
ORDER += "card formats llamacpp demo cli".split()


def test_imports_go_one_way():
    assert sorted(ORDER) == sorted(path.stem for path in SOURCE.glob("*.py"))
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpace."):
                imported = node.module.split(".")[1]
                assert ORDER.index(imported) < ORDER.index(path.stem), f"{path.name} imports {imported}"
