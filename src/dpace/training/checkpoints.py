"""Write checkpoints all or nothing, find the newest one that is whole, and remove the others.

A checkpoint is a folder `checkpoint-STEP` with safetensors and JSON only. It is whole where it has its
`trainer_state.json`, which is written last, when all other files are on the disk.
"""

import json
import shutil
from dataclasses import field
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from dpace.drafter import Drafter
from dpace.system import ranks
from dpace.system.ledger import filling, read_object, refuse_link, remove_unfinished, write_text
from dpace.system.progress import note
from dpace.system.validation import read_as
from dpace.training.sharding import take_share

STATE = "trainer_state.json"
REMOVE = "remove that folder, and run the same command again"
"""What helps where the files of a checkpoint were damaged later."""
WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"


@dataclass(config=ConfigDict(extra="forbid", strict=True))
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
    log_history: list[dict[str, int | float]] = field(default_factory=list)
    """Entries with their `epoch` and `step`."""

    def add_to_log(self, values: dict[str, float]) -> dict[str, float]:
        """Add an entry to the log, and return it."""
        entry = values | {"epoch": self.epoch, "step": self.global_step}
        self.log_history.append(entry)
        return entry


def read_state(folder: Path) -> TrainingState:
    """Read where a training stood when a checkpoint was written.

    Raises:
        ValueError: the file cannot be read, or has other keys or types, as of another version of dpace.
    """
    return read_as(TrainingState, read_object(folder / STATE, REMOVE), folder / STATE, REMOVE)


def write_state(path: Path, state: TrainingState) -> None:
    """Write where a training stands, all or nothing."""
    write_text(path, json.dumps(vars(state), sort_keys=True) + "\n")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"checkpoint-{step}"


def checkpoint_folders(checkpoints: Path) -> dict[int, Path]:
    """Find the folders that have the name of a step's checkpoint, by their steps; links are refused."""
    folders = {}
    for path in checkpoints.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal():  # others are not ours
            refuse_link(path)
            folders[int(step)] = path
    return folders


def write_checkpoint(checkpoints: Path, drafter: Drafter, state: TrainingState, optimizer: Optimizer) -> None:
    """Write a checkpoint, and remove all that training does not need any more.

    All ranks call it, and the first one writes. Sharded tensors of the optimizer are gathered one at a time.

    Raises:
        OSError: no room on the disk; what was written so far is removed.
    """
    moments: dict[str, Tensor] = {}
    for number, moments_of_parameter in optimizer.state_dict()["state"].items():
        for name, value in moments_of_parameter.items():
            whole = ranks.whole(value.detach())  # on all ranks, since each has a share
            if ranks.is_first():
                moments[f"{number}.{name}"] = whole.cpu().contiguous()
    if ranks.is_first():
        folder = checkpoint_folder(checkpoints, state.global_step)
        with filling(folder, last=STATE) as aside:
            save_file(moments, aside / MOMENTS)
            drafter.save_pretrained(aside)
            write_state(aside / STATE, state)
        remove_others(folder)
    ranks.barrier()


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (folder / STATE).exists()


def find_newest(checkpoints: Path) -> Path | None:
    """Find the newest checkpoint that is whole, and remove all but it and the one that was the best then.

    Call it inside `lock_folder`. Steps whose checkpoints are not whole are taken again.
    """
    folders = checkpoint_folders(checkpoints)
    for folder in (checkpoints, *folders.values()):
        remove_unfinished(folder)
    for _, folder in sorted(folders.items(), reverse=True):
        if is_whole(folder):
            remove_others(folder)
            return folder
        note(f"{folder} is not whole, and is removed")
        shutil.rmtree(folder)
    return None


def remove_others(newest: Path) -> None:
    """Remove all checkpoints but this one and the best one when it was written."""
    best_step = read_state(newest).best_global_step
    for step, folder in checkpoint_folders(newest.parent).items():
        if folder != newest and step != best_step:
            shutil.rmtree(folder)


def read_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Read the moments of an optimizer that `write_checkpoint` wrote.

    Of sharded tensors each rank keeps its share. Memory: one whole tensor at a time.

    Raises:
        ValueError: moments that are missing, or of another shape.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / MOMENTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            number, name = key.split(".")
            value = file.get_tensor(key)
            parameter = parameters[int(number)]
            if value.shape == parameter.shape:
                value = take_share(value, parameter)
            elif value.shape:  # the step has none
                raise ValueError(f"{key} has the shape {list(value.shape)}, expected {list(parameter.shape)}")
            state.setdefault(int(number), {})[name] = value
    if not state:  # one without gradient has none, but not all
        raise ValueError(f"{MOMENTS} has no moments")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
