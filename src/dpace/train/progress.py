"""Show a training's numbers on the terminal and in trackers, and end it well at Ctrl-C and SIGTERM."""

import contextlib
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import Tensor

from dpace.config import Recipe
from dpace.loss import SlotScores
from dpace.recipes.recipe_file import without_passwords
from dpace.system import ranks
from dpace.system.progress import note, one_line
from dpace.train.checkpoints import TrainingState
from dpace.train.identity import flat_settings

SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time are one: a terminal sends Ctrl-C to every process, and torchrun sends it on to its own."""
SUMS = ("weights", "matches", "nll", "slots")
"""What `StepLog` adds up for each slot of a block."""
PROJECTS = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
"""Variables that name the project of a tracker; by default it is `dpace`."""
SHOWN = {
    "eval_tau": "validation tau",
    "loss": "loss",
    "slot_accuracy/1": "slot 1 right",
    "tokens_per_second": "tokens/s",
}
"""What the bar shows; the first ones are seen in 80 columns."""


class Interrupt:
    """Asks a training to end after the current step at Ctrl-C or SIGTERM; a second signal ends it at once.

    The `KeyboardInterrupt` has the number of the signal, from which the exit code of `dpace train` follows.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.asked_at: float | None = None
        self.number: int = signal.SIGINT
        self.is_asked = False
        """Whether a signal came to a rank, as far as all ranks know."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch both signals inside the `with` block; raise `KeyboardInterrupt` at its end if one came."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.asked_at is not None:
            raise KeyboardInterrupt(self.number)

    def _ask(self, number: int, _frame: Any) -> None:
        """Note that training is to end; end it at once when asked again."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.number = number
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            note(f"\n{name}: finishing this step and saving; once more stops at once")
        elif now - self.asked_at > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt(self.number)

    def ask_ranks(self) -> bool:
        """Set `is_asked` and return it; all ranks call this, since they have to end at the same place."""
        flag = torch.tensor(float(self.asked_at is not None), device=self.accelerator.device)
        total: Any = self.accelerator.reduce(flag, reduction="sum")
        self.is_asked = bool(total)
        return self.is_asked


LEAST_WEIGHT = 1e-4
"""Mean weight of slots below which a training is taken to learn nothing."""


class StepLog:
    """Sums over the steps since the last entry of the log, by slot where that says more.

    Args:
        block_size: slots of the drafter's blocks; shorter ones lack the last slots.
        device: of the training.
    """

    def __init__(self, block_size: int, device: torch.device):
        self._sums = torch.zeros(len(SUMS), block_size, device=device)
        self._steps: list[dict[str, float]] = []
        self._has_warned = False

    def add_batch(self, out: SlotScores, is_scored: Tensor) -> None:
        """Add what the head gives for a micro-batch."""
        by_slot = (out.weights, out.is_match, out.nll, is_scored)
        self._sums[:, : is_scored.shape[-1]] += torch.stack([values.float().sum((0, 1)) for values in by_slot])

    def add_step(self, **numbers: float) -> None:
        """Add the `loss`, `grad_norm`, `learning_rate` and `seconds` of an optimizer step."""
        self._steps.append(numbers)

    def unlogged(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return what was added since the last entry, over all ranks; they call this together."""
        total: Any = accelerator.reduce(self._sums, reduction="sum")
        return {"sums": total.tolist(), "steps": self._steps}

    def go_on(self, unlogged: dict[str, Any]) -> None:
        """Take up what `unlogged` returned when a checkpoint was written."""
        self._steps = list(unlogged.get("steps", []))
        if self._steps and ranks.is_first():
            self._sums += torch.tensor(unlogged["sums"], device=self._sums.device)

    def entry(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the log's entry for these steps over all ranks, and begin anew.

        It has the mean loss, the last gradient's norm before clipping and learning rate, the median seconds of a step
        without data loading, scored tokens a second, the negative log-likelihood of a token, and for each slot its
        share of the weight and how often the drafter is right.
        """
        total: Any = accelerator.reduce(self._sums, reduction="sum")
        sums = dict(zip(SUMS, total, strict=True))
        steps, seconds = self._steps, [step["seconds"] for step in self._steps]
        num_slots = sums["slots"].sum()
        mean_weight = float(sums["weights"].sum() / num_slots)
        if mean_weight < LEAST_WEIGHT and not self._has_warned:
            self._has_warned = True
            note(
                f"the objective gives all slots weights near 0 ({mean_weight:.2g} on average), so the drafter learns "
                "next to nothing; let the weights of slots that matter be near 1"
            )
        entry = {
            "loss": statistics.mean(step["loss"] for step in steps),
            "grad_norm": steps[-1]["grad_norm"],
            "learning_rate": steps[-1]["learning_rate"],
            "step_seconds": statistics.median(seconds),
            "tokens_per_second": float(num_slots) / sum(seconds),
            "nll": float(sums["nll"].sum() / num_slots.clamp_min(1)),
        }
        shares = (sums["weights"] / sums["weights"].sum()).tolist()
        accuracy = (sums["matches"] / sums["slots"].clamp_min(1)).tolist()
        for slot in range(1, len(shares)):
            entry[f"weight_share/{slot}"] = shares[slot]
            entry[f"slot_accuracy/{slot}"] = accuracy[slot]
        self._sums, self._steps = torch.zeros_like(self._sums), []
        return entry


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, before any work.

    Raises:
        ValueError: names it, and what to do.
    """
    available = set(map(str, get_available_trackers()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"--train.report-to has {name!r}, which accelerate does not know; choose some of "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or leave it out"
            )
        if name not in available:
            package = name.replace("_", "-")
            raise ValueError(
                f"--train.report-to has {name}, which is not installed; run `pip install {package}`, or leave it out"
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

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            reason = one_line(error)[:300] or type(error).__name__
            note(f"the tracker {name} failed ({reason}); the training goes on without it")
            trackers.pop(name, None)

    def start(name: str) -> None:  # as `Accelerator.init_trackers` does
        project = os.environ.get(PROJECTS.get(name, ""), "dpace")
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", "runs"), time.strftime("%Y-%m-%d_%H-%M-%S"))
        trackers[name] = make(project, folder) if make.requires_logging_directory else make(project)
        trackers[name].start()
        settings = without_passwords({"target": recipe.target, **flat_settings(recipe)})
        kept = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        trackers[name].store_init_configuration(kept)

    def log(entry: dict[str, float]) -> None:
        values = {name: value for name, value in entry.items() if name != "step"}
        for name, tracker in list(trackers.items()):
            attempt(name, partial(tracker.log, values, step=int(entry["step"])))

    for name in sorted(set(recipe.train.report_to)) if ranks.is_first() else ():
        attempt(name, partial(start, name))
    try:
        yield log
    finally:
        for name, tracker in list(trackers.items()):
            attempt(name, tracker.finish)


def latest_numbers(state: TrainingState) -> str:
    """Return what the bar shows of the log."""
    numbers = {name: value for entry in state.log_history[-20:] for name, value in entry.items() if name in SHOWN}
    return ", ".join(f"{label} {numbers[name]:.3g}" for name, label in SHOWN.items() if name in numbers)


class PeakMemory:
    """Measures the most memory that was in use since it was made.

    On an accelerator that is allocated memory, else memory resident in the process (on Linux).
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):  # the peak then counts from the start of the process
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int | None:
        """Peak in bytes; None where the system does not tell."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        found = re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        return found and 1024 * int(found[1])
