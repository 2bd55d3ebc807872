"""Show a training's numbers on the terminal and in trackers, and end it well at Ctrl-C and SIGTERM."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import Tensor

from dpace.config import Recipe
from dpace.loss import SlotScores
from dpace.system import ranks
from dpace.system.progress import note, shorten
from dpace.training.checkpoints import TrainingState

SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time are one: a terminal sends Ctrl-C to every process, and torchrun sends it on to its own."""
SHOWN = {"eval_tau": "validation tau", "loss": "loss", "slot_accuracy/1": "slot 1 right"}
"""What the bar shows; the first ones are seen in 80 columns."""


class Interrupt:
    """Asks a training to end after the current step at Ctrl-C or SIGTERM; a second signal ends it at once.

    The `KeyboardInterrupt` has the number of the signal, from which the exit code of `dpace train` follows.
    """

    def __init__(self):
        self.asked_at: float | None = None
        self.number: int = signal.SIGINT
        self.is_asked = False
        """Whether a signal came to a rank, as all ranks know after a step."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch both signals inside the `with` block; raise `KeyboardInterrupt` at its end if a rank got one."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        # Inside the block, the step and its checkpoint were still to be finished.
        if self.asked_at is not None or self.is_asked:
            raise KeyboardInterrupt(self.number)

    def _ask(self, number: int, _frame: object) -> None:
        """Note that training is to end; end it at once when asked again."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.number = number
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            note(f"\n{name}: finishing this step and saving; once more stops at once")
        elif now - self.asked_at > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt(self.number)


class StepLog:
    """Sums over the steps since the last entry of the log, or since a resume, by slot where that says more.

    Args:
        block_size: slots of the drafter's blocks; shorter ones lack the last slots.
        device: of the training.
    """

    def __init__(self, block_size: int, device: torch.device):
        self._sums = torch.zeros(4, block_size, device=device)
        """Sums by slot: weights, right drafts, negative log-likelihoods, scored slots."""
        self.steps: list[dict[str, float]] = []
        """Loss, gradient norm, learning rate and seconds of each optimizer step."""

    def add_batch(self, out: SlotScores, is_scored: Tensor) -> None:
        """Add what the head gives for a micro-batch."""
        numbers = (out.weights, out.is_match, out.nll, is_scored)  # each "batch block slot"
        sums = torch.stack([values.float().sum((0, 1)) for values in numbers])
        self._sums[:, : is_scored.shape[-1]] += sums  # blocks that grow are shorter at first

    def entry(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the log's entry for these steps over all ranks, and begin anew.

        It has the mean loss, the last gradient's norm before clipping and learning rate, the median seconds of a step
        without data loading, the negative log-likelihood of a token, and for each slot its share of the weight and how
        often the drafter is right.
        """
        weights, matches, nll, slots = accelerator.reduce(self._sums, reduction="sum")
        entry = {
            "loss": statistics.mean(step["loss"] for step in self.steps),
            "grad_norm": self.steps[-1]["grad_norm"],
            "learning_rate": self.steps[-1]["learning_rate"],
            "step_seconds": statistics.median(step["seconds"] for step in self.steps),
            "nll": float(nll.sum() / slots.sum().clamp_min(1)),
        }
        # Lists, since each number of a tensor would be a copy from the device.
        shares = (weights / weights.sum()).tolist()
        accuracy = (matches / slots.clamp_min(1)).tolist()
        for slot in range(1, len(shares)):
            entry[f"weight_share/{slot}"] = shares[slot]
            entry[f"slot_accuracy/{slot}"] = accuracy[slot]
        self._sums.zero_()
        self.steps = []
        return entry


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, before any work.

    Raises:
        ValueError: names it, and what to do.
    """
    for name in names:
        if name not in map(str, get_available_trackers()):
            raise ValueError(
                f"--train.report-to has {name!r}, which is unknown or not installed; accelerate knows "
                f"{', '.join(LOGGER_TYPE_TO_CLASS)}: install one of them, or leave it out"
            )


@contextmanager
def open_trackers(recipe: Recipe) -> Iterator[Callable[[dict[str, float]], None]]:
    """Open the trackers of `--train.report-to` inside the `with` block; on rank 0 only.

    They are others' code, and may fail at any time. One that does is left out from then on, with one line: the
    training goes on, and its own log has every number.

    Args:
        recipe: names them, and is what they keep as the run's settings.

    Yields:
        Sends them an entry of the log.
    """
    trackers: dict[str, GeneralTracker] = {}
    settings = {"target": recipe.target, **recipe.settings}
    for key, value in settings.items():
        if not isinstance(value, int | float):
            settings[key] = str(value)  # TensorBoard takes no lists, and no None

    def attempt(name: str, work: Callable[..., object], *args: object, **options: object) -> None:
        try:
            work(*args, **options)
        except Exception as error:
            note(f"the tracker {name} failed ({shorten(error, 300)}); the training goes on without it")
            trackers.pop(name, None)

    def start(name: str) -> None:  # as `Accelerator.init_trackers` does
        project = os.environ.get("WANDB_PROJECT", "dpace")  # accelerate does not read it
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        folder = Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S"))
        trackers[name] = make(project, folder) if make.requires_logging_directory else make(project)
        trackers[name].start()
        trackers[name].store_init_configuration(settings)

    def log(entry: dict[str, float]) -> None:
        for name, tracker in list(trackers.items()):  # a copy: one that fails leaves
            attempt(name, tracker.log, entry, step=int(entry["step"]))

    if ranks.is_first():
        for name in recipe.train.report_to:
            attempt(name, start, name)
    try:
        yield log
    finally:
        for name, tracker in list(trackers.items()):
            attempt(name, tracker.finish)


def latest_numbers(state: TrainingState) -> str:
    """Return what the bar shows of the log."""
    numbers: dict[str, float] = {}
    for entry in state.log_history[-20:]:
        numbers |= entry  # entries of steps and of measurements have different names
    return ", ".join(f"{label} {numbers[name]:.3g}" for name, label in SHOWN.items() if name in numbers)
