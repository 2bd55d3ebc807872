"""Show a training's numbers on the terminal and in trackers, and end it well at Ctrl-C and SIGTERM."""

import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import Tensor, nn

from dpace.config import Recipe
from dpace.loss import HeadOutput
from dpace.system import ranks
from dpace.system.progress import progress_bar
from dpace.train.checkpoints import TrainingState

SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time are one: a terminal sends Ctrl-C to every process, and torchrun sends it on to its own."""
PACKAGES = {"comet_ml": "comet-ml"}
"""Packages of trackers, where they have another name."""
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
            print(f"\n{name}: finishing this step and saving; once more stops at once", file=sys.stderr)
        elif now - self.asked_at > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt(self.number)

    def is_asked(self) -> bool:
        """Return whether a signal came to this rank or to another: all ranks have to end after the same step."""
        flag = torch.tensor(float(self.asked_at is not None), device=self.accelerator.device)
        total: Any = self.accelerator.reduce(flag, reduction="sum")
        return bool(total)


class StepLog:
    """Sums over the steps since the last entry of the log, by slot where that says more.

    Args:
        block_size: slots of the drafter's blocks; shorter ones lack the last slots.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._sums: dict[str, Tensor] = {}
        self._steps: list[dict[str, float]] = []

    def add_batch(self, out: HeadOutput, is_scored: Tensor) -> None:
        """Add what the head gives for a micro-batch."""
        missing = self.block_size - is_scored.shape[-1]
        by_slot = {"weights": out.weights, "matches": out.is_match, "nll": out.nll, "slots": is_scored}
        for name, values in by_slot.items():
            value = nn.functional.pad(values.float().sum((0, 1)), (0, missing))
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def add_step(self, *, loss: float, grad_norm: float, learning_rate: float, seconds: float) -> None:
        """Add the numbers of an optimizer step."""
        names = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "seconds": seconds}
        self._steps.append(names)

    def entry(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the log's entry for these steps over all ranks, and begin anew.

        It has the mean loss, the last gradient's norm before clipping and learning rate, the median seconds of a step
        without data loading, scored tokens a second, the negative log-likelihood of a token, and for each slot its
        share of the weight and how often the drafter is right.
        """
        sums: dict[str, Any] = {name: accelerator.reduce(value, reduction="sum") for name, value in self._sums.items()}
        steps, seconds = self._steps, [step["seconds"] for step in self._steps]
        num_slots = sums["slots"].sum()
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
        for slot in range(1, self.block_size):
            entry[f"weight_share/{slot}"] = shares[slot]
            entry[f"slot_accuracy/{slot}"] = accuracy[slot]
        self._sums, self._steps = {}, []
        return entry


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, before any work.

    Raises:
        ValueError: names it, and what to do.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"--train.report-to has {name!r}, which accelerate does not know; choose some of "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or leave it out"
            )
        if name not in available:
            raise ValueError(
                f"--train.report-to has {name}, and its package is not installed: run `pip install "
                f"{PACKAGES.get(name, name)}`, or leave it out"
            )


class Trackers:
    """The trackers of `--train.report-to`, open inside a `with` block; on rank 0 only.

    They are others' code, and may fail at any time. One that does is left out from then on, with one line: the
    training goes on, and its own log has every number.

    Args:
        recipe: names them, and is what they keep as the run's settings.
    """

    def __init__(self, recipe: Recipe):
        names = set(recipe.train.report_to) if ranks.is_first() else set()
        if "all" in names:
            names |= {str(tracker) for tracker in get_available_trackers()}
        self.recipe, self.names = recipe, sorted(names - {"all", "none"})
        self.open: dict[str, GeneralTracker] = {}

    def __enter__(self) -> "Trackers":
        settings = {
            f"{group}.{name}": value if isinstance(value, bool | int | float) else str(value)
            for group in ("drafter", "loss", "train")
            for name, value in asdict(getattr(self.recipe, group)).items()
        } | {"target": self.recipe.target}
        for name in self.names:
            self._try(name, lambda name=name: self._start(name, settings))
        return self

    def _start(self, name: str, settings: dict[str, Any]) -> None:
        """Open a tracker as `Accelerator.init_trackers` does."""
        project = os.environ.get(PROJECTS.get(name, ""), "dpace")
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", "runs"), time.strftime("%Y-%m-%d_%H-%M-%S"))
        self.open[name] = make(project, folder) if make.requires_logging_directory else make(project)
        self.open[name].start()
        self.open[name].store_init_configuration(settings)

    def log(self, entry: dict[str, float]) -> None:
        """Send an entry of the log."""
        values = {name: value for name, value in entry.items() if name != "step"}
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step=int(entry["step"])))

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, work: Callable[[], Any]) -> None:
        """Run a tracker's code, and leave the tracker out where that fails."""
        try:
            work()
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"the tracker {name} failed ({reason}); the training goes on without it", file=sys.stderr)
            self.open.pop(name, None)


def latest_numbers(state: TrainingState) -> str:
    """Return what the bar shows of the log."""
    numbers = {name: value for entry in state.log_history[-20:] for name, value in entry.items() if name in SHOWN}
    return ", ".join(f"{label} {numbers[name]:.3g}" for name, label in SHOWN.items() if name in numbers)


@contextmanager
def training_bar(objective: str, state: TrainingState) -> Iterator[Callable[[], None]]:
    """Show a progress bar inside the `with` block, and no bar of transformers, which would break it up.

    Yields:
        Moves the bar to where the training stands.
    """
    had_others = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with progress_bar() as bar:
            name = f"training, {objective}"
            task = bar.add_task(name, total=state.max_steps, completed=state.global_step, info="")
            yield lambda: bar.update(task, completed=state.global_step, info=latest_numbers(state))
    finally:
        if had_others:
            transformers.utils.logging.enable_progress_bar()


class PeakMemory:
    """Measures the most memory that was in use since it was made.

    On an accelerator that is allocated memory, else memory resident in the process (on Linux).
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int | None:
        """Peak in bytes; None where the system does not tell."""
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
