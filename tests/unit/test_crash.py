"""Whatever file operation a run dies at, the same call ends as an undisturbed run does."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpace.compare import compare
from dpace.config import BenchConfig, CompareConfig, PromptsConfig, RespondConfig
from dpace.data.prompts import Prompt
from dpace.data.responses import write_responses
from dpace.train.run import make_datasets, train
from tests.conftest import LANGUAGE_RECIPE
from tests.crash import kill, operations_of

TIMES = {"step_seconds", "tokens_per_second"}
UNUSED = {"peak_memory_bytes", "total_flos", "python"}
"""What tells of this process alone; Python's random numbers, which training does not use, among it."""
NUM_POINTS = 12
"""Points of a verb in the default run."""


class Verb:
    """A tiny run of one verb, again and again into new folders."""

    def __init__(self, name, target, prompts, responses):
        self.target, self.prompts, self.responses = target, prompts, responses
        config = replace(LANGUAGE_RECIPE.train, max_steps=3, eval_steps=2, logging_steps=1, num_anchors=4, batch_size=4)
        self.recipe = replace(LANGUAGE_RECIPE, train=config)
        self.run = {"train": self.train, "respond": self.respond, "compare": self.compare}[name]

    def train(self, folder: Path) -> None:
        datasets = make_datasets(self.target, self.responses[:8], self.responses[50:52], self.recipe)
        train(self.target, *datasets, self.recipe, folder / "drafter")

    def respond(self, folder: Path) -> None:
        prompts = [Prompt(str(i), "x", [[{"role": "user", "content": p}]]) for i, p in enumerate(self.prompts[:6])]
        config = RespondConfig(max_new_tokens=6, batch_size=2)
        write_responses(self.target, prompts, folder / "responses.jsonl", config)

    def compare(self, folder: Path) -> None:
        path = folder.parent / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in self.prompts[:20]))
        options = {name: getattr(self.recipe, name) for name in ("drafter", "loss", "train")}
        config = CompareConfig(
            **options,
            output=str(folder),
            prompts=PromptsConfig(path=str(path), num_heldout=2, num_validation=2),
            respond=RespondConfig(max_new_tokens=12),
            bench=BenchConfig(num_prompts=0),
            objectives=("dflash",),
            baseline="dflash",
            seeds=(0,),
        )
        compare(self.target, config)


@pytest.fixture
def verb(request, language_target, language_prompts, language_responses) -> Verb:
    return Verb(request.param, language_target, language_prompts, language_responses)


def end_state(folder: Path) -> dict:
    """All that a run leaves, without times and versions; weights as bytes."""
    state: dict = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.suffix == ".png" or path.name in (".dpace.lock", "manifest.json"):
            state[name] = None
        elif path.suffix == ".safetensors":
            state[name] = {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".json":
            state[name] = without_times(json.loads(path.read_text()))
        else:
            state[name] = path.read_text()
    return json.loads(json.dumps(state, default=repr).replace(str(folder), "FOLDER"))


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES | UNUSED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def check_points(verb: Verb, tmp_path: Path, points, *, is_torn: bool) -> list[str]:
    """Die at each point, run again, and compare; returns the rows of the table."""
    expected_folder = tmp_path / "undisturbed"
    verb.run(expected_folder)
    expected, rows = end_state(expected_folder), []
    for point in points:
        folder = tmp_path / "run"
        operation = kill(lambda folder=folder: verb.run(folder), folder, point, is_torn=is_torn)
        verb.run(folder)
        found = end_state(folder)
        differing = sorted(name for name in {*expected, *found} if expected.get(name, 0) != found.get(name, 0))
        rows.append(f"{point:4d}  {re.sub(r'[0-9]{2,}[.]', 'PID.', operation):68s} {'; '.join(differing) or 'same'}")
        shutil.rmtree(folder)
    return rows


def points_of(verb: Verb, folder: Path) -> list[str]:
    return operations_of(lambda: verb.run(folder), folder)


@pytest.mark.parametrize("verb", ["train", "respond"], indirect=True)
@pytest.mark.parametrize("is_torn", [False, True])
def test_a_run_that_dies_goes_on_to_the_same_end(verb, is_torn, tmp_path):
    """A spread of all operations."""
    count = len(points_of(verb, tmp_path / "counted"))
    points = sorted({round(i * (count - 1) / (NUM_POINTS // 2 - 1)) for i in range(NUM_POINTS // 2)})
    rows = check_points(verb, tmp_path, points, is_torn=is_torn)
    print("\n".join(rows))
    assert all(row.endswith(" same") for row in rows), "\n".join(rows)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "respond", "compare"], indirect=True)
@pytest.mark.parametrize("is_torn", [False, True])
def test_every_operation(verb, is_torn, tmp_path):
    """All of them; `DPACE_CRASH_TABLE` names a file that gets the table."""
    count = len(points_of(verb, tmp_path / "counted"))
    rows = check_points(verb, tmp_path, range(count), is_torn=is_torn)
    if os.environ.get("DPACE_CRASH_TABLE"):
        with open(os.environ["DPACE_CRASH_TABLE"], "a") as file:
            file.write(f"{verb.run.__name__}, {'torn' if is_torn else 'whole'}\n" + "\n".join(rows) + "\n")
    print("\n".join(rows))
    assert all(row.endswith(" same") for row in rows), "\n".join(rows)
