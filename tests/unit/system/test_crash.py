"""Whatever file operation a run dies at, the same call ends as an undisturbed run does."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpace.cli import main
from dpace.config import BenchConfig, CompareConfig, PromptsConfig, RespondConfig
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


Runs = tuple[Callable[[str, Path], None], dict[str, Callable[[Path], object]]]
"""What makes the folder that a run starts from, and the runs by name, each of which takes the folder."""


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
    """Tiny runs of the verbs."""
    folder = tmp_path_factory.mktemp("crash")
    recipe = make_recipe(max_steps=3, eval_steps=2, logging_steps=1, num_anchors=4, batch_size=4)
    prompts = write_prompts(folder / "prompts.jsonl", language_prompts[:20])

    def run_train(output: Path) -> None:
        datasets = make_datasets(language_target, language_responses[:8], language_responses[50:52], recipe)
        train(language_target, *datasets, recipe, output / "drafter")

    def run_respond(output: Path) -> None:
        config = RespondConfig(max_new_tokens=6, batch_size=2)
        write_responses(language_target, make_prompts(language_prompts[:6]), output / "responses.jsonl", config)

    def run_compare(output: Path) -> None:
        config = CompareConfig(
            **{name: getattr(recipe, name) for name in ("drafter", "loss", "train")},
            output=str(output),
            prompts=PromptsConfig(path=prompts, num_heldout=2, num_validation=2),
            respond=RespondConfig(max_new_tokens=12),
            bench=BenchConfig(num_prompts=1, max_new_tokens=4, widths=("full",)),
            objectives=("dflash",),
            baseline="dflash",
            seeds=(0,),
        )
        compare(language_target, config)

    def run_verb(words: str, output: Path) -> None:
        """Run a verb, and raise what it says when it fails: its last words, in one line."""
        with redirect_stderr(io.StringIO()) as said:
            code = main([*words.split(), "--target", str(language_folder), "--output", str(output)])
        if code:
            assert "Traceback" not in said.getvalue(), said.getvalue()
            raise OSError(said.getvalue().strip().rsplit("\n", 1)[-1])

    def run_export(to: str, output: Path) -> None:
        more = f"--target-gguf {target_gguf}" if to == "gguf" else ""
        run_verb(f"export {language_drafter_folder} --to {to} {more}", output)

    @cache
    def exported(to: str) -> Path:
        run_export(to, folder / to)
        return folder / to

    def start(name: str, output: Path) -> None:
        output.parent.mkdir(exist_ok=True)
        if name == "export over another":
            shutil.copytree(exported("speculators"), output)

    bench = f"bench --prompts.path {prompts} --prompts.num-heldout 2 --bench.drafters {language_drafter_folder} "
    bench += "--bench.max-new-tokens 4 --bench.widths full 2 --bench.temperatures 0"
    over_another = f"export {language_drafter_folder} --to zlab --dtype bfloat16"
    found = {"train": run_train, "respond": run_respond, "compare": run_compare}
    found |= {"bench": partial(run_verb, bench), "export over another": partial(run_verb, over_another)}
    for to in ("zlab", "speculators", "gguf"):
        found[f"export {to}"] = partial(run_export, to)
        found[f"import {to}"] = lambda output, to=to: run_verb(f"import {exported(to)}", output)
    return start, found


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


def check_points(runs: Runs, name: str, tmp_path: Path, choose: Callable[[list[str]], list[tuple[int, str]]]) -> None:
    """Die at each point, or have no room from there on, run again, and compare."""
    start, by_name = runs
    run = by_name[name]
    undisturbed, folder = tmp_path / "undisturbed" / "out", tmp_path / "killed" / "out"
    start(name, undisturbed)
    points = choose(operations_of(partial(run, undisturbed), undisturbed))
    expected = end_state(undisturbed)
    rows = []
    for point, fault in points:
        start(name, folder)
        stop = fill if fault == "full" else partial(kill, is_torn=fault == "torn")
        operation = stop(partial(run, folder), folder, point)
        operations_of(partial(run, folder), folder)
        found = end_state(folder)
        differing = sorted(path for path in {*expected, *found} if expected.get(path, 0) != found.get(path, 0))
        rows += [f"{point:4d} {operation} {fault}: {differing}"] if differing else []
        shutil.rmtree(folder)
    assert not rows, "\n".join(rows)


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
