"""Compare time and peak memory of the frozen-head loss with those of plain PyTorch.

    python benchmarks/loss.py [--shape 49152 576 64]

Both process the same scored rows, give the same gradient (checked) and use D-PACE's weights. `materialized` is plain
PyTorch, which keeps the logits for the backward pass. Time is the median of alternating runs of forward and backward
pass; memory is the peak that a run adds, as reported by the operating system (Linux) or the GPU.
"""

import ctypes
import re
import statistics
import time
from pathlib import Path

import psutil
import torch
import tyro
from torch.nn.functional import cross_entropy

from dpace.config import LossConfig
from dpace.loss import Slots, frozen_head_nll
from dpace.loss.head_scores import chunk_bytes_of
from dpace.system.device import find_device, synchronize
from dpace.target.head import LmHead
from dpace.weights import dpace_weights

BLOCK_SIZE = 8
SMOLLM2 = (49152, 576)
QWEN3_4B = (151936, 2560)
SHAPES = [*((*SMOLLM2, blocks) for blocks in (64, 256, 1024)), *((*QWEN3_4B, blocks) for blocks in (64, 256))]
"""Vocabulary, hidden size and number of blocks."""


def weigh(slots: Slots) -> torch.Tensor:
    return dpace_weights(slots.token_probs, slots.is_scored)


def frozen(hidden, head, labels, is_scored):
    chunk_bytes = chunk_bytes_of(LossConfig(), head.weight, is_cpu=head.weight.is_cpu)
    return frozen_head_nll(hidden, head, labels, is_scored, weigh=weigh, chunk_bytes=chunk_bytes).losses


def materialized(hidden, head, labels, is_scored):
    logits = head.logits(hidden[is_scored]).float()
    scored = cross_entropy(logits, labels[is_scored], reduction="none")
    nll = torch.zeros(is_scored.shape, device=scored.device).masked_scatter(is_scored, scored)
    weights = dpace_weights(torch.exp(-nll).detach(), is_scored)
    return (weights * nll).sum(-1)


def run(method, hidden, head, labels, is_scored):
    hidden.grad = None
    method(hidden, head, labels, is_scored).sum().backward()


def measure(
    vocab: int, width: int, num_blocks: int, repeats: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Measure median seconds and peak bytes of each method."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device)
    hidden = torch.randn(1, num_blocks, BLOCK_SIZE, width, generator=generator).to(device).requires_grad_()
    labels = torch.randint(vocab, (1, num_blocks, BLOCK_SIZE), generator=generator).to(device)
    is_scored = torch.ones_like(labels, dtype=torch.bool)
    is_scored[..., 0] = False
    data = (hidden, LmHead(weight), labels, is_scored)
    methods = {"frozen-head": frozen, "materialized": materialized}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    grads = {}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            run(method, *data)
            synchronize(data[0].device)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
            grads[name] = hidden.grad
    for name in methods:
        torch.testing.assert_close(grads[name], grads["materialized"], rtol=1e-4, atol=1e-7)
    grads.clear()
    hidden.grad = None
    return {name: (statistics.median(seconds[name]), peak(method, data)) for name, method in methods.items()}


def peak(method, data) -> float:
    """Measure the bytes that a run adds at its peak."""
    device = data[0].device
    data[0].grad = None
    is_cpu = device.type == "cpu"
    before = torch.accelerator.memory_allocated(device) if not is_cpu else psutil.Process().memory_info().rss
    reset_peak_memory(device)
    run(method, *data)
    return peak_memory(device) - before


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory` anew."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is in use now


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use: allocated on an accelerator, else resident in the process, which Linux tells."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0])  # it is in KiB


def main(shape: tuple[int, int, int] | None = None, rounds: int = 5) -> None:
    """Print the table.

    Args:
        shape: vocabulary, hidden size and number of blocks; by default those of SmolLM2 and Qwen3-4B.
        rounds: of which the median counts.
    """
    device = find_device()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, fp32")
    if device.type == "cpu":  # freed tensors return to the system at once, so that each run has its own peak
        ctypes.CDLL(None).mallopt(-3, 2**20)
    print(f"{'vocab':>7}{'hidden':>7}{'blocks':>7}   {'method':<14}{'ms':>8}{'x':>7}{'MiB':>8}{'x':>7}")
    for vocab, width, num_blocks in [shape] if shape else SHAPES:
        results = measure(vocab, width, num_blocks, rounds, device)
        base_seconds, base_bytes = results["materialized"]
        for name, (seconds, size) in results.items():
            found = f"{1000 * seconds:8.0f}{seconds / base_seconds:7.2f}{size / 2**20:8.0f}{size / base_bytes:7.2f}"
            print(f"{vocab:>7}{width:>7}{num_blocks:>7}   {name:<14}{found}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
