"""Whatever file operation a run dies at, the same call ends as an undisturbed run does."""

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpace.cli import main
from dpace.config import BenchConfig, CompareConfig, PromptsConfig, RespondConfig
from dpace.engines.engine import Request
from dpace.engines.export import export
from dpace.respond.answering import write_responses
from dpace.studies.compare import compare
from dpace.train.run import make_datasets, train
from tests.conftest import make_recipe
from tests.support.cases import wide
from tests.support.crash import GROWING, fill, kill, operations_of
from tests.support.files import make_prompts, write_prompts

UNUSED = {"tokens_per_second", "peak_memory_bytes", "total_flos", "python"}
"""What tells of this process alone; Python's random numbers, which training does not use, among it."""
FAULTS = ("full", "torn", "")
"""What happens at an operation: no room from there on, half of its file, or nothing any more."""
TORN = ("open", "append", "save", "fsync")
"""Operations that may leave half of a file."""
ALL = ["train", "respond", "compare", "bench", "export zlab", "export speculators", "export gguf"]
ALL += ["export over another", "import zlab", "import speculators", "import gguf"]
QUICK = "train", "respond"
"""Those that take hours; the others write in the same way."""


class Runs:
    """Tiny runs of the verbs, again and again into new folders."""

    def __init__(self, target, target_folder, target_gguf, prompts, responses, drafter_folder, folder):
        self.target, self.target_folder, self.target_gguf = target, target_folder, target_gguf
        self.prompts, self.responses, self.drafter = prompts, responses, drafter_folder
        self.recipe = make_recipe(max_steps=3, eval_steps=2, logging_steps=1, num_anchors=4, batch_size=4)
        self.prompts_file, self.folder = folder / "prompts.jsonl", folder
        write_prompts(self.prompts_file, prompts[:20])

    def prepare(self, name: str, output: Path) -> None:
        """Make what a run starts from."""
        output.parent.mkdir(exist_ok=True)
        if name == "export over another":
            shutil.copytree(self.exported("speculators"), output)

    def __call__(self, name: str, output: Path) -> None:
        verb, *words = name.split()
        getattr(self, verb if verb != "import" else "import_")(output, *words)

    def train(self, output: Path) -> None:
        datasets = make_datasets(self.target, self.responses[:8], self.responses[50:52], self.recipe)
        train(self.target, *datasets, self.recipe, output / "drafter")

    def respond(self, output: Path) -> None:
        config = RespondConfig(max_new_tokens=6, batch_size=2)
        write_responses(self.target, make_prompts(self.prompts[:6]), output / "responses.jsonl", config)

    def compare(self, output: Path) -> None:
        options = {name: getattr(self.recipe, name) for name in ("drafter", "loss", "train")}
        config = CompareConfig(
            **options,
            output=str(output),
            prompts=PromptsConfig(path=str(self.prompts_file), num_heldout=2, num_validation=2),
            respond=RespondConfig(max_new_tokens=12),
            bench=BenchConfig(num_prompts=1, max_new_tokens=4, widths=("full",)),
            objectives=("dflash",),
            baseline="dflash",
            seeds=(0,),
        )
        compare(self.target, config)

    def bench(self, output: Path) -> None:
        flags = f"--bench.drafters {self.drafter} --bench.max-new-tokens 4 --bench.widths full 2 --bench.temperatures 0"
        self.main("bench", f"--prompts.path {self.prompts_file} --prompts.num-heldout 2 --output {output} {flags}")

    def export(self, output: Path, *words: str) -> None:
        if words == ("over", "another"):
            words = ("zlab", "--dtype", "bfloat16")
        flags = f"--target-gguf {self.target_gguf}" if words == ("gguf",) else ""
        self.main("export", f"{self.drafter} --to {' '.join(words)} --output {output} {flags}")

    def import_(self, output: Path, source: str) -> None:
        self.main("import", f"{self.exported(source)} --output {output}")

    def exported(self, to: str) -> Path:
        """The drafter for an engine, written once; the GGUF file for llama.cpp."""
        folder = self.folder / to
        if not folder.exists():
            options = {"name": "d", "target_name": str(self.target_folder)}
            options |= {"target_gguf": self.target_gguf} if to == "gguf" else {}
            export(self.drafter, self.target, Request(to=to, output=folder, **options))
        return next(folder.glob("*.gguf"), folder)

    def main(self, verb: str, words: str) -> None:
        """Run a verb, and raise what it says when it fails: its last words, in one line."""
        with redirect_stderr(io.StringIO()) as said:
            code = main([verb, *words.split(), "--target", str(self.target_folder)])
        if code:
            assert "Traceback" not in said.getvalue(), said.getvalue()
            raise OSError(said.getvalue().strip().rsplit("\n", 1)[-1])


@pytest.fixture(scope="session")
def runs(
    language_target,
    language_folder,
    target_gguf,
    language_prompts,
    language_responses,
    language_drafter_folder,
    tmp_path_factory,
) -> Runs:
    made = language_target, language_folder, target_gguf, language_prompts, language_responses, language_drafter_folder
    return Runs(*made, tmp_path_factory.mktemp("crash"))


def end_state(folder: Path) -> dict:
    """All that a run leaves, without times and versions; weights as bytes."""
    state: dict = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in (".dpace.lock", "manifest.json"):
            state[name] = None
        elif path.suffix == ".safetensors":
            state[name] = {key: bits(value) for key, value in load_file(path).items()}
        elif path.suffix == ".json":
            state[name] = without_unused(json.loads(path.read_text()))
        elif path.match("bench-*.jsonl"):
            state[name] = last_of_each(path)
        else:
            state[name] = path.read_bytes()
    return json.loads(json.dumps(state, default=repr).replace(str(folder), "FOLDER"))


def bits(tensor: torch.Tensor) -> list:
    return [str(tensor.dtype), tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()]


def last_of_each(path: Path) -> list[str]:
    """Records of a benchmark: an unfinished prompt was measured again in all ways, and the last ones count."""
    records: dict = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        key = tuple(record.get(name) for name in ("drafter", "width", "set", "id", "turn", "temperature"))
        records.pop(str(key), None)
        records[str(key)] = line
    return list(records.values())


def without_unused(value):
    if isinstance(value, dict):
        return {k: without_unused(v) for k, v in value.items() if k not in UNUSED}
    return [without_unused(item) for item in value] if isinstance(value, list) else value


def operations(runs: Runs, name: str, folder: Path) -> list[str]:
    """Run undisturbed, to the end, and name the file operations."""
    return operations_of(lambda: runs(name, folder), folder)


def check_points(runs: Runs, name: str, tmp_path: Path, choose: Callable[[list[str]], list[tuple[int, str]]]) -> None:
    """Die at each point, or have no room from there on, run again, and compare."""
    undisturbed, folder, rows = tmp_path / "undisturbed" / "out", tmp_path / "killed" / "out", []
    runs.prepare(name, undisturbed)
    points = choose(operations(runs, name, undisturbed))
    expected = end_state(undisturbed)
    for point, fault in points:
        runs.prepare(name, folder)
        stop = fill if fault == "full" else partial(kill, is_torn=fault == "torn")
        operation = stop(partial(runs, name, folder), folder, point)
        operations(runs, name, folder)
        found = end_state(folder)
        differing = sorted(path for path in {*expected, *found} if expected.get(path, 0) != found.get(path, 0))
        what = re.sub(r"[0-9]{2,}[.]", "PID.", operation) + (fault and f", {fault}")
        rows.append(f"{point:4d}  {what:76s} {'; '.join(differing) or 'same'}")
        shutil.rmtree(folder)
    table = f"{name}, {len(rows)} points\n" + "\n".join(rows)
    assert all(row.endswith(" same") for row in rows), table


@pytest.mark.parametrize("name", wide(ALL, *QUICK))
def test_a_run_that_dies_goes_on_to_the_same_end(name, runs, tmp_path):
    """A spread of all operations: the disk gets full, half of a file is left, or nothing happens."""

    def spread(found: list[str]) -> list[tuple[int, str]]:
        points = (round(i * (len(found) - 1) / (len(FAULTS) - 1)) for i in range(len(FAULTS)))
        return list(zip(points, FAULTS, strict=True))

    check_points(runs, name, tmp_path, spread)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_operation(name, runs, tmp_path):
    """Each one does not happen, leaves half of its file, or is the first that finds no room."""

    def every(found: list[str]) -> list[tuple[int, str]]:
        of_fault = {"": tuple(found), "torn": TORN, "full": GROWING}
        return [(at, fault) for fault in of_fault for at, what in enumerate(found) if what.startswith(of_fault[fault])]

    check_points(runs, name, tmp_path, every)
