"""What do the tests guard? Change the mathematics in one place at a time, and count how often a test fails.

    python benchmarks/mutants.py OUT.jsonl [--number 200] [--seed 0] [--files weights.py]

A mutant is a copy of the package with one operator, comparison, number, condition or call changed, as by a slip. The
tests of its file run on it until one fails; it survives where all pass. OUT gets a line for each mutant, so the same
command goes on where it stopped. The tests first run on a copy where nothing is changed, which must survive.
"""

import ast
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # once: the processes of mutants are forks
import transformers  # noqa: F401
import tyro

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dpace"
LIMIT_SECONDS = 120
"""A mutant whose tests compute longer, or wait five times as long, hangs, and is caught."""
TESTS = {
    "weights.py": "test_weights.py loss",
    "loss/*.py": "loss test_weights.py training/test_selector.py training/test_runs.py",
    "blocks.py": "test_blocks.py drafter/test_windows.py loss",
    "metrics.py": "test_metrics.py measure/test_results.py",
    "decode/sampling.py": "decode/test_sampling.py decode/test_decode.py",
    "decode/loop.py": "decode/test_decode.py decode/test_stream.py decode/test_sampling.py decode/test_copies.py",
    "decode/copies.py": "decode/test_copies.py decode/test_decode.py",
    "drafter/views.py": "drafter/test_views.py drafter/test_windows.py drafter/test_drafter.py",
    "drafter/selector.py": "drafter/test_selector.py training/test_selector.py decode/test_sampling.py",
    "drafter/markov_head.py": "drafter/test_selector.py training/test_selector.py engines/test_selector.py",
    "drafter/lattice.py": "drafter/test_selector.py training/test_selector.py decode/test_sampling.py",
    "drafter/bigrams.py": "drafter/test_bigrams.py",
    "training/optimizer.py": "training/test_optimizer.py training/test_selector.py",
}
"""What is changed, and its tests in tests/unit, the nearest first; the golden values come last."""
SWAPS: dict[str, str] = dict(
    pair.split(":")
    for pair in "Add:Sub Sub:Add Mult:Div Div:Mult FloorDiv:Mult Pow:Mult BitAnd:BitOr BitOr:BitAnd And:Or Or:And "
    "Lt:LtE LtE:Lt Gt:GtE GtE:Gt Eq:NotEq NotEq:Eq Is:IsNot IsNot:Is min:max max:min any:all all:any amin:amax "
    "amax:amin argmax:argmin cumsum:cumprod clamp_min:clamp_max floor:ceil".split()
)
"""Operators of `ast` and names of functions, each with what stands in its place."""
DROPPED = "clamp clamp_ detach exp flip log sqrt softmax".split()
"""Methods whose call is left out."""


def changed(node: ast.AST) -> ast.AST | None:
    """Make what stands in a node's place in a mutant; None where nothing does."""
    match node:
        case ast.operator() | ast.cmpop() | ast.boolop() if type(node).__name__ in SWAPS:
            return getattr(ast, SWAPS[type(node).__name__])()
        case ast.UnaryOp() if not isinstance(node.operand, ast.Constant):  # 1 is often the last axis, as -1 is
            return node.operand
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            return ast.Constant(value + 1)
        case ast.IfExp():
            return ast.IfExp(node.test, node.orelse, node.body)
        case ast.If():
            return ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in DROPPED:
            return value
        case ast.Name(id=name) if name in SWAPS:
            return ast.Name(SWAPS[name])
        case ast.Attribute(attr=name) if name in SWAPS:
            return ast.Attribute(node.value, SWAPS[name])


class Mutant(ast.NodeTransformer):
    """A file with one place changed, or with none where it has no place of that number."""

    def __init__(self, file: str, place: int):
        self.place, self.num_places, self.line = place, 0, 0
        self.text = ast.unparse(ast.fix_missing_locations(self.visit(ast.parse((SOURCE / file).read_text()))))
        """What the file holds now."""

    def visit(self, node: ast.AST) -> ast.AST:
        """Count the places in a node, and change the chosen one.

        Types, messages and tuned constants stay, and so do flags that change no result.
        """
        if isinstance(node, ast.arg | ast.AnnAssign | ast.Raise | ast.JoinedStr):
            return node
        if isinstance(node, ast.keyword) and node.arg in ("strict", "frozen", "dynamic"):
            return node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            return node
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if self.num_places <= self.place:
            self.line = getattr(node, "lineno", self.line)
        new = changed(node)
        self.num_places += new is not None
        if new is not None and self.num_places - 1 == self.place:
            return new
        return self.generic_visit(node)


def run_tests(folder: str, tests: list[str]) -> None:
    """Run tests on the package in a folder; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    sys.path.insert(0, folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(pytest.main(["-xq", "--assert=plain", "-p", "no:cacheprovider", *tests]))


def survives(file: str, text: str) -> bool:
    """Return whether the tests of a file pass when it holds this text."""
    tests = next(tests for pattern, tests in TESTS.items() if Path(file).match(pattern))
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copytree(SOURCE, Path(folder, "dpace"), copy_function=os.symlink) / file
        path.unlink()
        path.write_text(text)
        arguments = (folder, [*(f"tests/unit/{name}" for name in tests.split()), "tests/golden"])
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
        process.start()
        process.join(5 * LIMIT_SECONDS)
        process.kill()
        process.join()
    return process.exitcode == 0


def main(out: tyro.conf.Positional[Path], number: int = 200, seed: int = 0, files: tuple[str, ...] = tuple(TESTS)):
    """Draw mutants, run their tests, and print what was caught.

    Args:
        out: JSONL file of results.
        number: of mutants.
        seed: of the draw.
        files: that are changed; a pattern may stand for several.
    """
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # the threads of a parent do not survive a fork
    names = sorted(str(path.relative_to(SOURCE)) for pattern in files for path in SOURCE.glob(pattern))
    places = [(name, place) for name in names for place in range(Mutant(name, -1).num_places)]
    drawn = random.Random(seed).sample(places, min(number, len(places)))
    rows = {(row["file"], row["place"]): row for row in map(json.loads, out.open())} if out.exists() else {}
    for file, place in [*((file, -1) for file in dict(drawn)), *drawn]:
        if (file, place) not in rows:
            mutant = Mutant(file, place)
            row = {"file": file, "place": place, "line": mutant.line, "survives": survives(file, mutant.text)}
            assert place >= 0 or row["survives"], f"the tests of {file} fail where nothing is changed"
            rows[file, place] = row
            with out.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
    survivors = [rows[key] for key in drawn if rows[key]["survives"]]
    for file in dict(drawn):
        lines = [row["line"] for row in survivors if row["file"] == file]
        print(f"{file}: {len(lines)} of {sum(name == file for name, _ in drawn)} survive, in lines {lines}")
    print(f"{len(drawn) - len(survivors)} of {len(drawn)} caught")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
