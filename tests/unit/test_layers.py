"""Imports go one way, whatever their form and wherever they stand."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("dpace/**/*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def imports(module: str, text: str, is_package: bool) -> set[str]:
    """The modules of dpace that a module's text imports: `import dpace.x`, `from dpace import x`, `from . import x`, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package and node.level == 1 else -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return {name for name in found if name in MODULES} - {module}


GRAPH = {m: imports(m, path.read_text(), path.name == "__init__.py") for m, path in MODULES.items()}


def test_every_form_of_import_is_seen():
    text = "import dpace.loss\nfrom dpace import target\ndef f():\n    from . import sampling\n    from ..data.chat import x"
    found = imports("dpace.decode.loop", text, is_package=False)
    assert {"dpace.loss", "dpace.target", "dpace.decode.sampling"} <= found


def test_imports_go_one_way():
    faces = {"dpace", "dpace.decode", "dpace.train"}  # hand names on; what needs them is counted where it is defined
    list(TopologicalSorter({m: found - faces for m, found in GRAPH.items() if m not in faces}).static_order())


def test_measuring_knows_neither_rendering_nor_training_nor_engines():
    above = ("dpace.report", "dpace.train", "dpace.engines")
    found = {m: names for m, of_module in GRAPH.items() if (names := {n for n in of_module if n.startswith(above)})}
    assert not [module for module in found if module.startswith("dpace.measure")]
