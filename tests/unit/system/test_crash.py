"""Whatever file operation a run dies at, the same call ends as an undisturbed run does."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import pytest

from dpace.cli import main
from dpace.config import PromptsWriterConfig, RespondConfig
from dpace.respond.answering import write_responses
from dpace.respond.prompt_writer import write_prompts as write_prompts_of_target
from dpace.training.run import make_datasets, train
from tests.support.crash import GROWING, fill, kill, operations_of
from tests.support.files import make_prompts, write_prompts
from tests.support.models import make_recipe, make_target

UNUSED = {"tokens_per_second"}
"""What tells of this process alone."""
FAULTS = ("full", "torn", "")
"""What happens at an operation: no room from there on, half of its file, or nothing any more."""
TORN = ("open", "append", "save", "fsync")
"""Operations that may leave half of a file."""
ALL = ["train", "respond", "prompts", "compare", "bench", "export zlab", "export speculators", "export gguf"]
ALL += ["export over another", "import zlab", "import speculators", "import gguf"]
QUICK = "train", "respond", "prompts"
"""Those that take hours; the others write in the same way."""


@pytest.fixture(scope="session")
def runs(
    language_target,
    language_folder,
    target_gguf,
    language_prompts,
    language_responses,
    language_drafter_folder,
    tmp_path_factory,
) -> tuple[Callable[[str, Path], None], dict[str, Callable[[Path], object]]]:
    """What makes the folder that a tiny run starts from, and the runs by name, each of which takes the folder."""
    folder = tmp_path_factory.mktemp("crash")
    recipe = make_recipe(max_steps=3, eval_steps=2, logging_steps=1, num_anchors=4, batch_size=4)
    prompts = write_prompts(folder / "prompts.jsonl", language_prompts[:20])
    few = f"--prompts.path {prompts} --prompts.num-heldout 2 --bench.max-new-tokens 4 --bench.temperatures 0"
    tiny = (
        "--drafter.num-layers 2 --drafter.block-size 6 --train.max-steps 3 --train.eval-steps 2 --train.num-anchors 4 "
        "--train.batch-size 4 --train.logging-steps 1 --prompts.num-validation 2 --respond.max-new-tokens 12"
    )
    cells = "--objectives dflash --seeds 0 --bench.num-prompts 1 --bench.widths full"
    export = f"export {language_drafter_folder} --to"
    commands = {
        "compare": f"compare {few} {tiny} {cells}",
        "bench": f"bench {few} --bench.drafters {language_drafter_folder} --bench.widths full 2",
        **{f"export {to}": f"{export} {to}" for to in ("zlab", "speculators")},
        "export gguf": f"{export} gguf --target-gguf {target_gguf}",
        "export over another": f"{export} zlab --dtype bfloat16",
        **{f"import {to}": f"import {folder / to}" for to in ("zlab", "speculators")},
        "import gguf": f"import {folder}/gguf/dflash-{language_folder.name}-BF16.gguf",
    }

    def run_train(output: Path) -> None:
        datasets = make_datasets(language_target, language_responses[:8], language_responses[50:52], recipe)
        train(language_target, *datasets, recipe, output / "drafter")

    def run_respond(output: Path) -> None:
        config = RespondConfig(max_new_tokens=6, batch_size=2)
        write_responses(language_target, make_prompts(language_prompts[:6]), output / "responses.jsonl", config)

    def run_prompts(output: Path) -> None:
        target = make_target("qwen3")
        target.tokenizer = language_target.tokenizer
        options = {"count": 5, "batch_size": 3, "max_new_tokens": 24, "temperature": 8.0, "output": str(output)}
        write_prompts_of_target(target, PromptsWriterConfig(target="x", **options))

    def run_verb(words: str, output: Path) -> None:
        """Run a verb, and raise what it says when it fails: its last words, in one line."""
        with redirect_stderr(io.StringIO()) as said:
            code = main([*words.split(), "--target", str(language_folder), "--output", str(output)])
        if code:
            raise OSError(said.getvalue().strip().rsplit("\n", 1)[-1])

    def start(name: str, output: Path) -> None:
        output.parent.mkdir(exist_ok=True)
        verb, _, kind = name.partition(" ")
        if verb == "import" and not (folder / kind).exists():
            run_verb(commands[f"export {kind}"], folder / kind)
        if kind == "over another":
            run_verb(commands["export speculators"], output)

    verbs = {name: partial(run_verb, words) for name, words in commands.items()}
    return start, {"train": run_train, "respond": run_respond, "prompts": run_prompts, **verbs}


def end_state(folder: Path) -> dict:
    """All that a run leaves, without times and versions; results have the last records of a benchmark."""
    state: dict = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.match("bench-*.jsonl") or path.name == ".dpace.lock":
            state[name] = None
        elif path.suffix == ".json":
            state[name] = without_unused(json.loads(path.read_text()))
        else:
            state[name] = path.read_bytes()
    return json.loads(json.dumps(state, default=repr).replace(str(folder), "FOLDER"))


def without_unused(value):
    if isinstance(value, dict):
        return {k: without_unused(v) for k, v in value.items() if k not in UNUSED}
    return [without_unused(item) for item in value] if isinstance(value, list) else value


def spread(found: list[str]) -> list[tuple[int, str]]:
    """A spread of all operations: the disk gets full, half of a file is left, or nothing happens."""
    points = (round(i * (len(found) - 1) / (len(FAULTS) - 1)) for i in range(len(FAULTS)))
    return list(zip(points, FAULTS, strict=True))


def every(found: list[str]) -> list[tuple[int, str]]:
    """Each operation does not happen, leaves half of its file, or is the first that finds no room."""
    of_fault = {"": tuple(found), "torn": TORN, "full": GROWING}
    return [(at, fault) for fault in of_fault for at, what in enumerate(found) if what.startswith(of_fault[fault])]


CASES = [pytest.param(name, spread, marks=() if name in QUICK else pytest.mark.wide) for name in ALL]
CASES += [pytest.param(name, every, marks=pytest.mark.slow) for name in ALL]


@pytest.mark.parametrize(("name", "choose"), CASES)
def test_a_run_that_dies_goes_on_to_the_same_end(name, choose, runs, tmp_path):
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
