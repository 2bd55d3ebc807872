"""Real processes that are ended and go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpace.cli import main
from tests.support.files import write_prompts

ROOT = Path(__file__).parents[3]
TINY = (
    "--respond.max-new-tokens 32 --drafter.num-layers 2 --drafter.block-size 6 --train.max-steps 400 "
    "--train.eval-steps 1000 --train.batch-size 8"
)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "launcher"), [("SIGTERM", ""), ("SIGINT", ""), ("SIGTERM", TORCHRUN)])
def test_a_signal_to_the_process_or_to_torchrun(name, launcher, language_folder, language_prompts, tmp_path):
    """A checkpoint of the step, advice that is given once, no traceback of ours; and it goes on."""
    path = write_prompts(tmp_path / "prompts.jsonl", language_prompts)
    options = f"--target {language_folder} --prompts.path {path} --output {tmp_path} {TINY}".split()
    assert main(["respond", *options]) == 0
    command = [sys.executable, *f"{launcher} -m dpace.cli train".split(), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    drafter = tmp_path / "drafter"
    for is_ended in (True, False):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if is_ended:
            while not (drafter / "recipe.yaml").exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.1)
            time.sleep(2)
            process.send_signal(getattr(signal, name))
        text, _ = process.communicate(timeout=300)
        expected = 128 + getattr(signal, name) if is_ended else 0
        assert process.returncode == expected or (launcher and is_ended and process.returncode), text
        assert text.count("run the same command to continue") == is_ended, text
        if is_ended:
            (checkpoint,) = (drafter / "checkpoints").glob("checkpoint-*")
            assert 0 < int(checkpoint.name.split("-")[1]) < 400
