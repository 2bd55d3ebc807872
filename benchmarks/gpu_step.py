"""Time training steps by part, and compare their memory with the plan; `benchmarks/gpu.py` runs it."""

import contextlib
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from loss import peak_memory, reset_peak_memory

from dpace.batches.dataset import ResponseDataset
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh
from dpace.plan import TrainingPlan, known_lengths
from dpace.respond.responses import Response
from dpace.system.device import synchronize
from dpace.target import Target
from dpace.training import loop
from dpace.training.loop import TrainingLoop

PARTS = ("batch", "features", "mask", "drafter forward", "loss", "backward", "optimizer")
WARM_UP = 10
"""First steps that are not counted: kernels are compiled and chosen in them."""
PROMPT_TOKENS = 128
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "MI300X": 1307,
}
"""Dense bf16 products of a device in 1e12 operations a second, from data sheets; the first name that fits counts."""


def peak_flops(device_name: str, tflops: float | None) -> float | None:
    """Return the most operations a second that a device can do; None for one that is not known."""
    found = next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
    return None if (tflops or found) is None else 1e12 * float(tflops or found or 0)


class StepMarks:
    """Marks where parts of a step end, on the device's own clock, which makes nobody wait."""

    def __init__(self, device: torch.device):
        self.device, self.moments = device, []
        self.steps: list[Counter] = []
        """Seconds by part of each step."""

    def mark(self, part: str) -> None:
        """End a part; what was done since the last mark belongs to it."""
        moment: Any = time.perf_counter()
        if self.device.type != "cpu":
            moment = torch.Event(device=self.device, enable_timing=True)
            moment.record()
        self.moments.append((part, moment))

    def end_step(self) -> None:
        """Wait for the device and add up the parts."""
        synchronize(self.device)
        seconds: Counter = Counter()
        for (_, start), (part, end) in zip(self.moments, self.moments[1:], strict=False):
            is_clock = isinstance(end, float)
            seconds[part] += end - start if is_clock else start.elapsed_time(end) / 1000
        self.steps.append(seconds)
        self.moments = []


class MarkedLoop(TrainingLoop):
    """The training loop with a mark at the end of each part of a step; it writes no checkpoint."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.marks = StepMarks(self.target.device)
        self.drafter.register_forward_pre_hook(lambda *_: self.marks.mark("mask"))
        self.drafter.register_forward_hook(lambda *_: self.marks.mark("drafter forward"))

    @contextlib.contextmanager
    def marked(self):
        """Mark the target's part and the loss inside the `with` block."""
        features, reduce = self.target.read_features, loop.block_loss

        def marked_features(*args, **options):
            self.marks.mark("batch")
            found = features(*args, **options)
            self.marks.mark("features")
            return found

        def marked_loss(*args, **options):
            loss = reduce(*args, **options)
            self.marks.mark("loss")
            return loss

        with (
            mock.patch.object(self.target, "read_features", marked_features),
            mock.patch.object(loop, "block_loss", marked_loss),
        ):
            yield

    def take_step(self, batches):
        """Mark the start and the end of a step."""
        self.marks.mark("batch")
        super().take_step(batches)
        self.marks.mark("optimizer")
        self.marks.end_step()

    @contextlib.contextmanager
    def reduced_over_ranks(self, is_last: bool):
        """Mark the start of a micro-batch and the end of its backward pass."""
        self.marks.mark("batch")
        with super().reduced_over_ranks(is_last):
            yield
        self.marks.mark("backward")

    def save(self) -> None:
        """Write nothing."""


def random_conversations(target: Target, mask_token_id: int, recipe: Recipe, number: int) -> ResponseDataset:
    """Make conversations of the recipe's full length, of random tokens."""
    config = recipe.train
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(target.head.weight) - 1, (number, config.max_length), generator=generator)
    tokens += tokens >= mask_token_id  # every token but the mask
    start = min(PROMPT_TOKENS, config.max_length // 2)
    rows = [Response(str(i), "random", [], row, [[start, len(row)]]) for i, row in enumerate(tokens.tolist())]
    return ResponseDataset(rows, max_length=config.max_length, num_anchors=config.num_anchors, seed=config.seed)


def time_training(target: Target, recipe: Recipe, steps: int, peak: float | None) -> tuple[Drafter, dict[str, Any]]:
    """Train some steps as the recipe says; give the drafter, and medians and sums of what they took."""
    device = target.device
    config = replace(recipe.train, max_steps=steps, logging_steps=steps, report_to=())
    reset_peak_memory(device)
    drafter = Drafter.from_target(target, seed=config.seed, **vars(recipe.drafter))
    per_step = config.batch_size * config.gradient_accumulation_steps
    dataset = random_conversations(target, drafter.mask_token_id, recipe, steps * per_step)
    nothing = ResponseDataset([], max_length=config.max_length, num_anchors=None, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        timed = replace(recipe, train=config)
        weigh = make_weigh(recipe.loss, drafter.block_size)
        run = MarkedLoop(drafter, target, dataset, nothing, timed, weigh=weigh, checkpoints=Path(folder))
        with run.marked():
            run.run()
    counted = run.marks.steps[min(WARM_UP, steps // 2) :]
    seconds = statistics.median(sum(step.values()) for step in counted)
    uncached = replace(recipe, train=replace(config, feature_cache_gib=0.0))
    plan = TrainingPlan(uncached, device, 0, target, drafter, known_lengths(dataset))
    flops = sum(plan.flops())
    parts = plan.memory(plan.batch_size)
    del parts["libraries"]  # which torch's allocator does not count
    tokens = per_step * config.max_length
    return drafter.eval(), {
        "steps": len(counted),
        "step_seconds": seconds,
        "part_seconds": {part: statistics.median(step[part] for step in counted) for part in PARTS},
        "tokens_per_second": tokens / seconds,
        "tflops_per_step": flops / 1e12,
        "mfu": None if peak is None else flops / seconds / peak,
        "peak_memory_bytes": peak_memory(device),
        "planned_memory_bytes": sum(parts.values()),
    }
