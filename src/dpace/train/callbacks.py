"""Show and time a training run, and end it well at Ctrl-C and SIGTERM."""

import functools
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import distributed
from transformers import ProgressCallback, TrainerCallback

from dpace.system.device import synchronize
from dpace.system.progress import PlainLines, is_terminal

SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time are one: a terminal sends Ctrl-C to every process, and torchrun sends it on to its own."""


class SaveOnInterrupt(TrainerCallback):
    """Ends training with a checkpoint after the current step at Ctrl-C or SIGTERM.

    All ranks end after the same step. A second signal ends it at once.
    """

    def __init__(self):
        self.asked_at: float | None = None

    @contextmanager
    def watching(self):
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
            raise KeyboardInterrupt

    def _ask(self, number: int, _frame):
        """Note that training is to end; end it at once when asked again."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(f"\n{name}: finishing this step and saving; once more stops at once", file=sys.stderr)
        elif now - self.asked_at > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **_):
        """Save and stop if a signal came, on this rank or on another."""
        is_asked = self.asked_at is not None
        if args.world_size > 1:
            flag = torch.tensor(int(is_asked), device=args.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            is_asked = bool(flag)
        if is_asked:
            self.asked_at = self.asked_at or time.monotonic()
            control.should_save = control.should_training_stop = True


class StepClock(TrainerCallback):
    """Measures the seconds of each optimizer step, without data loading, evaluation and logging.

    It waits for the GPU at the end of a step.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self.seconds_before = 0.0
        """Seconds of work that a step did before it began, as drawing its anchors."""

    def on_step_begin(self, args, state, control, **_):
        """Start the clock."""
        self._start, self.seconds_before = time.perf_counter() - self.seconds_before, 0.0

    def on_step_end(self, args, state, control, **_):
        """Stop the clock."""
        synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._start)


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


class TrackerGuard(TrainerCallback):
    """Turns what a tracker raises into one line; others run it, and it may fail at any time."""

    def __init__(self, tracker: TrainerCallback):
        self.tracker, self.name = tracker, type(tracker).__name__.removesuffix("Callback").lower()
        for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
            setattr(self, event, functools.partial(self._tell, event))

    def _tell(self, event: str, *args, **kwargs):
        try:
            return getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"the tracker {self.name} failed ({reason}); set it up, or leave it out of --train.report-to, and run "
                "the same command: it goes on from the last checkpoint"
            ) from error


class TrainingBar(ProgressCallback):
    """Progress bar of training with the latest numbers beside the ETA."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.numbers = name, {}
        self.had_others = True
        self.lines: PlainLines | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Name the bar; without a terminal, write lines in its place."""
        if state.is_world_process_zero and not is_terminal():
            self.lines = PlainLines(self.name, state.max_steps, state.global_step)
        else:
            super().on_train_begin(args, state, control, **kwargs)
        self.had_others = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()  # one bar for each checkpoint's file would break up ours
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar on."""
        if self.lines:
            self.lines.update(state.global_step, ", ".join(f"{name} {value}" for name, value in self.numbers.items()))
        else:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if not self.lines:
            super().on_train_end(args, state, control, **kwargs)
        if self.had_others:
            transformers.utils.logging.enable_progress_bar()

    def on_log(self, args, state, control, logs=None, **_):
        """Show the latest numbers."""
        names = {  # the first ones are seen in 80 columns
            "eval_tau": "validation tau",
            "loss": "loss",
            "slot_accuracy/1": "slot 1 right",
            "tokens_per_second": "tokens/s",
        }
        self.numbers |= {names[key]: f"{value:.3g}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            ordered = {name: self.numbers[name] for name in names.values() if name in self.numbers}
            self.training_bar.set_postfix(ordered)
