"""Imports go one way: each room imports only rooms to its right in `ROOMS`.

Every form of import counts, at any place in a file.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
FILES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("dpace/**/*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
ROOMS = """cli verbs compare demo plan engines train report measure decode data servers views drafter mask_token
    validity draft_vocabulary sharded_target target target_files target_shards probe objective own_objective loss fast
    spec modeling_dflash head restarts weights blocks metrics locate flags recipe_file ranges loading ledger
    provenance progress ranks device config recipes __init__""".split()
STRANGERS = {  # rooms that stand to the right, and still do not know each other
    "engines": {"train"},
    "train": {"decode"},
    "fast": set("weights blocks metrics locate flags recipe_file ranges progress ledger spec loading".split()),
}


def imports(module: str, text: str, is_package: bool) -> set[str]:
    """Find the modules of dpace that a text imports, at any depth.

    Forms are `import dpace.x`, `from dpace import x` and `from . import x`.
    """
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {name for name in found if name in MODULES} - {module}


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


GRAPH = {m: imports(m, path.read_text(), path.name == "__init__.py") for m, path in MODULES.items()}


def test_every_form_of_import_is_seen():
    inner = "def f():\n    from . import sampling\n    from ..data.chat import x"
    text = f"import dpace.loss\nfrom dpace import target\n{inner}"
    expected = {"dpace.loss", "dpace.target", "dpace.decode.sampling", "dpace.target.chat"}
    assert imports("dpace.decode.loop", text, is_package=False) == expected
    assert imports("dpace.decode", "from .loop import generate\nfrom . import pace", is_package=True) == {
        "dpace.decode.loop",
        "dpace.decode.pace",
    }


def test_imports_go_one_way():
    assert {room(module) for module in MODULES} == set(ROOMS)
    for module, found in GRAPH.items():
        if module == "dpace":  # it hands on names of all rooms, and loads them late
            continue
        for other in found:
            here, there = room(module), room(other)
            assert ROOMS.index(here) <= ROOMS.index(there), f"{module} imports {other}, which stands to its left"
            assert there not in STRANGERS.get(here, ()), f"{module} imports {other}, which it is not to know"


def test_no_file_waits_for_itself():
    # faces hand names on; what needs them is counted where it is defined
    faces = {"dpace", "dpace.config", "dpace.decode", "dpace.train"}
    list(TopologicalSorter({m: found - faces for m, found in GRAPH.items() if m not in faces}).static_order())


def test_the_network_can_be_copied_beside_the_weights():
    assert not GRAPH["dpace.modeling_dflash"]
