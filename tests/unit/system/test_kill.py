"""Real processes that are ended and go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.files import write_prompts

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(language_folder, language_prompts, tmp_path_factory):
    """A run of some seconds."""
    folder = tmp_path_factory.mktemp("prompts")
    path = write_prompts(folder / "prompts.jsonl", language_prompts)
    options = {"target": language_folder, "prompts.path": path, "respond.max-new-tokens": 32, "drafter.num-layers": 2}
    options |= {"drafter.block-size": 6, "train.max-steps": 60, "train.eval-steps": 2, "train.batch-size": 8}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def start(*words, num_ranks=1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "dpace.cli", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


@pytest.fixture(scope="module")
def answers(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    code, text = end(start("respond", *flags, "--output", str(out)))
    assert code == 0, text
    return out


@pytest.fixture
def answered(answers, tmp_path):
    """A folder with a copy of them."""
    for path in answers.glob("responses.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_process_or_to_torchrun(name, num_ranks, answered, flags):
    """A checkpoint of the step, advice that is given once, no traceback of ours; and it goes on."""
    words = ["train", *flags, "--output", str(answered), "--train.eval-steps", "1000", "--train.max-steps", "400"]
    process = start(*words, num_ranks=num_ranks)
    wait_for(answered / "drafter" / "recipe.yaml", process)
    time.sleep(2)
    process.send_signal(getattr(signal, name))
    code, text = end(process)
    assert code == 128 + getattr(signal, name) if num_ranks == 1 else code != 0
    assert text.count("run the same command to continue") == 1, text
    (checkpoint,) = (answered / "drafter" / "checkpoints").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 400
    code, text = end(start(*words, num_ranks=num_ranks))
    assert code == 0, text
