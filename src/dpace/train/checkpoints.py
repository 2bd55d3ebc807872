"""Write checkpoints all or nothing, find the newest one that is whole, and remove the others.

A checkpoint is a folder `checkpoint-STEP` with safetensors and JSON only. Its `manifest.json`, which is written last,
names every file with its size and hash.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpace.drafter import Drafter
from dpace.system import ranks
from dpace.system.ledger import filling, remove_unfinished, write_json, write_text
from dpace.system.provenance import hash_file
from dpace.train.sharding import take_share

MANIFEST, STATE = "manifest.json", "trainer_state.json"
WEIGHTS = "model.safetensors"
MOMENTS, STEPS = "optimizer.safetensors", "optimizer.json"


@dataclass
class TrainingState:
    """Where a training stands, and its log: what `trainer_state.json` holds."""

    max_steps: int
    global_step: int = 0
    """Steps that are taken."""
    epoch: float = 0.0
    best_global_step: int | None = None
    """Step of the best tau on the validation responses; None where it was not measured."""
    best_metric: float | None = None
    """That tau."""
    log_history: list[dict[str, float]] = field(default_factory=list)
    """Entries with their `epoch` and `step`."""

    def add_to_log(self, values: dict[str, float]) -> dict[str, float]:
        """Add an entry to the log, and return it."""
        entry = {**values, "epoch": self.epoch, "step": self.global_step}
        self.log_history.append(entry)
        return entry

    def note_tau(self, tau: float) -> bool:
        """Note a measured tau, and return whether it is the best one."""
        is_best = self.best_metric is None or tau > self.best_metric
        if is_best:
            self.best_metric = tau
            self.best_global_step = self.global_step
        return is_best


def read_state(folder: Path) -> TrainingState:
    """Read where a training stood when a checkpoint was written."""
    values = json.loads((folder / STATE).read_bytes())
    return TrainingState(**{each.name: values[each.name] for each in fields(TrainingState)})


def write_state(path: Path, state: TrainingState) -> None:
    """Write where a training stands, all or nothing."""
    write_text(path, json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"checkpoint-{step}"


def write_checkpoint(
    checkpoints: Path,
    drafter: Drafter,
    state: TrainingState,
    moving: tuple[Any, Any] | None,
    *,
    is_sharded: bool,
) -> None:
    """Write a checkpoint, and remove those that training does not need any more.

    All ranks call it, and the first one writes.

    Args:
        checkpoints: folder of all of them.
        drafter: with the weights as they are.
        state: of the training.
        moving: optimizer and schedule; without them training cannot go on from this checkpoint.
        is_sharded: whether the optimizer's state is spread over the ranks.

    Raises:
        OSError: no room on the disk; what was written so far is removed.
    """
    optimizer_state = None
    if moving and (is_sharded or ranks.is_first()):
        optimizer_state = gather_optimizer(*moving)
    if ranks.is_first():
        folder = checkpoint_folder(checkpoints, state.global_step)
        with (
            translate_full_disk(f"the checkpoint of step {state.global_step}", checkpoints),
            filling(folder, last=MANIFEST, is_guarded=False) as aside,
        ):
            if optimizer_state:
                moments, settings = optimizer_state
                save_file(moments, aside / MOMENTS)
                write_json(aside / STEPS, settings)
            drafter.save_pretrained(aside)
            write_state(aside / STATE, state)
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(aside.iterdir())
            }
            write_json(aside / MANIFEST, {"step": state.global_step, "files": files})
        best = state.best_global_step
        prune(checkpoints, folder, checkpoint_folder(checkpoints, best) if best else None)
    ranks.barrier()


def is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is there as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    paths = {name: folder / name for name in expected}
    return STATE in expected and all(
        path.is_file() and (path.stat().st_size, hash_file(path)) == expected[name] for name, path in paths.items()
    )


def best_of(folder: Path) -> Path | None:
    """Return the checkpoint that was the best one when this one was written.

    None where none was measured.
    """
    step = read_state(folder).best_global_step
    return checkpoint_folder(folder.parent, step) if step else None


def find_newest(checkpoints: Path) -> Path | None:
    """Find the newest checkpoint that is whole, its best one included, and remove useless ones.

    Call it inside `hold`. Checkpoints that are newer than the one found are removed: their steps are taken again.
    """
    if not checkpoints.is_dir():
        return None
    remove_unfinished(checkpoints)
    steps = {
        int(match[1]): path
        for path in checkpoints.iterdir()
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    newest = None
    for step in sorted(steps, reverse=True):
        folder = steps[step]
        if is_whole(folder) and not has_optimizer(folder):
            continue  # the best weights since the checkpoint before; their step is taken again
        if is_whole(folder) and ((best := best_of(folder)) in (None, folder) or is_whole(best)):
            newest = folder
            break
        print(f"{folder} is not whole, and is removed", file=sys.stderr)
        shutil.rmtree(folder)
    _rotate(checkpoints, keep={newest, best_of(newest)} if newest else set())
    return newest


def prune(checkpoints: Path, written: Path, best: Path | None) -> None:
    """Remove checkpoints that training does not need after one is written.

    What stays is that one, the best one, and where it has no optimizer's state, the newest one that has it with its own
    best one, whose optimizer's state goes.
    """
    keep = {written, best}
    if not has_optimizer(written):
        others = (path for path in checkpoints.glob("checkpoint-*") if has_optimizer(path))
        newest = max(others, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        if newest is not None:
            keep |= {newest, old_best := best_of(newest)}
            if old_best and old_best != newest:
                _lighten(old_best)
    _rotate(checkpoints, keep)


def has_optimizer(folder: Path) -> bool:
    """Return whether training can go on from a checkpoint; otherwise it has weights only."""
    try:
        return MOMENTS in json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lighten(folder: Path) -> None:
    """Remove all of a checkpoint that only going on from it needs."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    extra = [n for n in manifest["files"] if n in (MOMENTS, STEPS)]
    for name in extra:
        del manifest["files"][name]
    write_json(folder / MANIFEST, manifest)
    for name in extra:
        (folder / name).unlink(missing_ok=True)


def _rotate(checkpoints: Path, keep: set[Path | None]) -> None:
    """Remove all checkpoints but these."""
    for path in checkpoints.glob("checkpoint-*"):
        if path.is_dir() and path not in keep:
            shutil.rmtree(path)


def gather_optimizer(optimizer: Any, schedule: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the state of optimizer and schedule: the tensors of each parameter, and settings that JSON can hold.

    Sharded tensors are gathered one at a time; all ranks must then be here, and only the first one keeps them.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    for number, entry in state["state"].items():
        for name, value in entry.items():
            whole = ranks.whole(value.detach())
            if ranks.is_first():
                tensors[f"{number}.{name}"] = whole.cpu().contiguous()
    return tensors, {"groups": state["param_groups"], "scheduler": schedule.state_dict()}


def read_optimizer(folder: Path, optimizer: Any, schedule: Any) -> None:
    """Read the state of optimizer and schedule that `write_checkpoint` wrote.

    Of sharded tensors each rank keeps its share. Memory: one whole tensor at a time.
    """
    settings = json.loads((folder / STEPS).read_bytes())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / MOMENTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            number, name = key.split(".")
            value, parameter = file.get_tensor(key), parameters[int(number)]
            share = take_share(value, parameter) if value.shape == parameter.shape else value
            state.setdefault(int(number), {})[name] = share
    optimizer.load_state_dict({"state": state, "param_groups": settings["groups"]})
    schedule.load_state_dict(settings["scheduler"])


def read_weights(folder: Path, drafter: Drafter) -> None:
    """Read a checkpoint's weights into a drafter's tensors."""
    drafter.load_state_dict(load_file(folder / WEIGHTS))


@contextmanager
def translate_full_disk(what: str, folder: Path) -> Iterator[None]:
    """Turn a full disk into one line.

    Raises:
        OSError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise OSError(
            f"cannot write {what} into {folder}: {reason}; make room there and run the same command: it goes "
            "on from the last checkpoint"
        ) from error
