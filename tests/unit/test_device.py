"""A device that is not the CPU: nothing is left behind, and the host waits only where it must."""

import json
import subprocess
import sys

import pytest
import torch

from dpace.device import default_dtype, describe, find_device, find_processor

WAITS_OF_A_TRAINING_STEP = {
    "target.py: num_shared = shared_prefix(token_ids.tolist())",  # where texts begin alike, they are read once
    "target.py: self.model(token_ids, cache=cache, use_cache=cache is not None)",  # masks of transformers
    "head_scores.py: for chosen in is_scored.flatten().nonzero()[:, 0].split(max(1, num_rows)):",  # rows that count
}


@pytest.fixture(scope="module")
def on_second_device():
    """What `tests.second_device` prints, in a process of its own: torch keeps such a device to the end."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.second_device"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["plain", "full", "auto", "batch", "measure", "train"])
def test_a_second_device_computes_the_same_and_nothing_is_left_behind(part, on_second_device):
    assert on_second_device[part]["is_same"]


def test_the_host_waits_once_a_step(on_second_device):
    """Of decoding whole drafts: for the tokens that the target chose."""
    waits = on_second_device["full"]["waits"]
    assert set(waits.values()) == {1, on_second_device["full"]["steps"]}
    assert len(waits) == 2  # the first token, and the steps


def test_the_waits_of_a_training_step_are_known(on_second_device):
    assert set(on_second_device["train"]["waits"]) == WAITS_OF_A_TRAINING_STEP


def test_a_device_that_is_not_here_is_refused():
    absent = next(name for name in ("cuda", "mps", "xpu") if name != str(torch.accelerator.current_accelerator()))
    with pytest.raises(ValueError, match=f"finds no {absent} here; choose one of: auto, .*cpu"):
        find_device(absent)
    cpu = find_device("cpu")
    assert default_dtype(cpu) == torch.float32 and describe(cpu) == find_processor()
