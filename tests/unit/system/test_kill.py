"""Real processes that are ended and go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpace.cli import main
from tests.support.files import write_prompts

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(language_folder, language_prompts, tmp_path_factory) -> list[str]:
    """A training of some seconds, whose answers are there."""
    folder = tmp_path_factory.mktemp("answers")
    path = write_prompts(folder / "prompts.jsonl", language_prompts)
    options = {"target": language_folder, "prompts.path": path, "respond.max-new-tokens": 32, "drafter.num-layers": 2}
    options |= {"drafter.block-size": 6, "train.max-steps": 400, "train.eval-steps": 1000, "train.batch-size": 8}
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["respond", *flags, "--output", str(folder)]) == 0
    return ["train", *flags, "--output", str(folder)]


def start(*words, num_ranks=1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "dpace.cli", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("name", "num_ranks"), [("SIGTERM", 1), ("SIGINT", 1), ("SIGTERM", 2)])
def test_a_signal_to_the_process_or_to_torchrun(name, num_ranks, words):
    """A checkpoint of the step, advice that is given once, no traceback of ours; and it goes on."""
    drafter = Path(words[-1]) / "drafter"
    shutil.rmtree(drafter, ignore_errors=True)
    process = start(*words, num_ranks=num_ranks)
    while not (drafter / "recipe.yaml").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(getattr(signal, name))
    text, _ = process.communicate(timeout=300)
    code = process.returncode
    assert code == 128 + getattr(signal, name) if num_ranks == 1 else code != 0
    assert text.count("run the same command to continue") == 1, text
    (checkpoint,) = (drafter / "checkpoints").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 400
    again = start(*words, num_ranks=num_ranks)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
