"""A device that is not the CPU: nothing is left behind, and the host waits only where it must."""

import json
import subprocess
import sys

import pytest
import torch

from dpace.system.device import default_dtype, device_name, find_device, processor_name

WAITS_OF_A_TRAINING_STEP = {
    "target.py: num_shared = len(commonprefix(token_ids.tolist()))",  # where texts begin alike, they are read once
    "target.py: out = self.decoder(token_ids, use_cache=cache is not None, **kwargs)",  # masks of transformers
    "head_scores.py: for chosen in is_scored.flatten().nonzero()[:, 0].split(max(1, num_rows)):",  # rows that count
}


@pytest.fixture(scope="module")
def on_second_device():
    """What `tests.support.second_device` prints, in a process of its own: torch keeps such a device to the end."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.second_device"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["plain", "full", "auto", "batch", "measure", "train"])
def test_a_second_device_computes_the_same_and_nothing_is_left_behind(part, on_second_device):
    assert on_second_device[part]["is_same"]


@pytest.mark.parametrize(("part", "limit"), [("full", 1), ("auto", 2), ("8 rows", 1), ("36 layers", 1)])
def test_the_host_waits_at_most_so_often_in_a_step(part, limit, on_second_device):
    """For the tokens that the target chose and, with width `auto`, for confidences; also for the first token."""
    found = on_second_device["steps"][part]
    assert sum(found["waits"].values()) <= 1 + limit * found["steps"]


def test_a_step_has_few_operations(on_second_device):
    """For a target of 36 layers and a drafter of 5 in bf16; a GPU's time is that of launching them."""
    operations = on_second_device["steps"]["36 layers"]["operations"]
    assert sum(operations.values()) <= 1000
    assert operations["scaled_dot_product_attention"] == 41 and operations["mm"] < 5 * 41
    assert "copies of masks" not in operations


def test_the_waits_of_a_training_step_are_known(on_second_device):
    assert set(on_second_device["train"]["waits"]) == WAITS_OF_A_TRAINING_STEP


def test_a_device_that_is_not_here_is_refused():
    absent = next(name for name in ("cuda", "mps", "xpu") if name != str(torch.accelerator.current_accelerator()))
    with pytest.raises(ValueError, match=f"finds no {absent} here; choose one of: auto, .*cpu"):
        find_device(absent)
    cpu = find_device("cpu")
    assert default_dtype(cpu) == torch.float32 and device_name(cpu) == processor_name()
