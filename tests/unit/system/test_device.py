"""A device that is not the CPU: nothing is left behind, and the host waits only where it must."""

import json
import subprocess
import sys

import pytest
import torch

from dpace.system.device import default_dtype, device_name, find_device, processor_name
from tests.support.cases import wide


@pytest.fixture(scope="module", params=wide(["", "lilicorr"]))
def on_second_device(request):
    """Without a selector and with one: what a process of its own prints, since torch keeps such a device to the end."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.second_device", request.param]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_second_device_computes_the_same_and_nothing_is_left_behind(on_second_device):
    assert on_second_device["is_same"] == dict.fromkeys(("plain", "full", "auto", "batch", "measure", "train"), True)


@pytest.mark.parametrize(("part", "limit"), [("auto", 2), ("8 rows", 1), ("12 layers", 1)])
def test_the_host_waits_at_most_so_often_in_a_step(part, limit, on_second_device):
    """For the tokens that the target chose and, with width `auto`, for confidences; also for the first token."""
    found = on_second_device["steps"][part]
    assert sum(found["waits"].values()) <= 1 + limit * found["steps"]


def test_a_step_has_few_operations(on_second_device):
    """For a target of 12 layers and a drafter of 2 in bf16; a GPU's time is that of launching them."""
    operations = on_second_device["steps"]["12 layers"]["operations"]
    assert sum(operations.values()) <= 420
    assert operations["scaled_dot_product_attention"] == 14 and operations["mm"] < 5 * 14
    assert "copies of masks" not in operations


def test_the_host_waits_once_in_a_training_step(on_second_device):
    """For its sums; and in transformers, which looks for packed texts, for each micro-batch of hidden states."""
    waits = on_second_device["waits"]
    assert {place.partition(":")[0]: count for place, count in waits.items()} == {"loop.py": 1, "target.py": 2}


def test_a_device_that_is_not_here_is_refused():
    absent = next(name for name in ("cuda", "mps", "xpu") if name != str(torch.accelerator.current_accelerator()))
    with pytest.raises(ValueError, match=f"finds no {absent} here; choose one of: auto, .*cpu"):
        find_device(absent)
    cpu = find_device("cpu")
    assert default_dtype(cpu) == torch.float32 and device_name(cpu) == processor_name()
