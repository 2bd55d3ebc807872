"""Show and time a training run, and end it well at Ctrl-C."""

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
    """Ends training with a checkpoint after the current step when Ctrl-C is pressed.

    A second Ctrl-C ends it at once.
    """

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
        """Note that training is to end; end it at once when asked again."""
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        print("\nfinishing this step and saving; press Ctrl-C again to stop at once", file=sys.stderr)

    def on_step_end(self, args, state, control, **_):
        """Save and stop if Ctrl-C was pressed."""
        if self.is_asked:
            control.should_save = control.should_training_stop = True


class StepClock(TrainerCallback):
    """Measures the seconds of each optimizer step, without data loading, evaluation and logging.

    It waits for the GPU at the end of a step.
    """

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """Stop the clock."""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class PeakMemory:
    """Measures the most memory that was in use since it was made.

    On a GPU that is allocated memory, else memory resident in the process (on Linux).
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int | None:
        """Peak in bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class TrainingBar(ProgressCallback):
    """Progress bar of training with the latest numbers beside the ETA."""

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
