"""What a training run shows and measures, and what Ctrl-C does to it."""

import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import ProgressCallback, TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """Makes the first Ctrl-C end training after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.is_asked = False

    @contextmanager
    def watching(self):
        """Watch SIGINT inside the `with` block; raise `KeyboardInterrupt` at its end if it came."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        previous = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.is_asked:
            raise KeyboardInterrupt

    def _ask(self, *_):
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        print("\nfinishing this step and saving; Ctrl-C again to stop at once", file=sys.stderr)

    def on_step_end(self, args, state, control, **_):
        """Save and stop where it was asked for."""
        if self.is_asked:
            control.should_save = control.should_training_stop = True


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, without data loading, evaluation and logging; waits for the GPU at its end."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """Stop it."""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class PeakMemory:
    """The most memory that was in use since it was made: allocated on the GPU, else resident in the process (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int | None:
        """None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class TrainingBar(ProgressCallback):
    """Trainer's progress bar with the latest numbers beside the ETA, instead of a line for every log."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.numbers = name, {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        transformers.utils.logging.disable_progress_bar()  # one bar for each checkpoint's file would break up ours
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        super().on_train_end(args, state, control, **kwargs)
        transformers.utils.logging.enable_progress_bar()

    def on_log(self, args, state, control, logs=None, **_):
        """Show the latest numbers."""
        names = {
            "loss": "loss",
            "slot_accuracy/1": "slot 1 right",
            "tokens_per_second": "tokens/s",
            "eval_tau": "validation tau",
        }
        self.numbers |= {names[key]: f"{value:.3g}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.numbers)
