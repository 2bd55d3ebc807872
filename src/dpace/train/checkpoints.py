"""Write checkpoints all or nothing, find the newest one that is whole, and remove the others.

A checkpoint is a folder `checkpoint-STEP` with safetensors and JSON only. Its `manifest.json`, which is written last,
names every file with its size and hash.

A Trainer with checkpoints all or nothing and without pickle, and with numbers that stay finite.
"""

import copy
import dataclasses
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerState

from dpace.drafter import Drafter
from dpace.system import ranks
from dpace.system.device import read_random_state, set_random_state
from dpace.system.ledger import UNFINISHED, make_readable, remove_unfinished, sync, write_json, write_text
from dpace.system.loading import refuse_infinite
from dpace.system.provenance import hash_file
from dpace.train.sharding import gather_weights, scatter_weights, shard, sharded_by_dpace, take_share, wants_shards

MANIFEST, STATE = "manifest.json", "trainer_state.json"
MOMENTS, STEPS = "optimizer.safetensors", "optimizer.json"


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Give the folder of a step's checkpoint."""
    return checkpoints / f"checkpoint-{step}"


def unfinished_folder(checkpoints: Path, step: int) -> Path:
    """Give the folder in which a step's checkpoint is written; the same on every rank."""
    return checkpoints / f".checkpoint-{step}{UNFINISHED}"


def finish(checkpoints: Path, step: int) -> Path:
    """Let a checkpoint that is written take its place, once all of it is on the disk."""
    unfinished, folder = unfinished_folder(checkpoints, step), checkpoint_folder(checkpoints, step)
    files = {}
    for path in sorted(unfinished.iterdir()):
        make_readable(path)
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_json(unfinished / MANIFEST, {"step": step, "files": files})
    sync(unfinished)
    if folder.exists():
        shutil.rmtree(folder)  # of this very step, from before it was trained again
    unfinished.rename(folder)
    sync(checkpoints)
    return folder


def is_whole(folder: Path) -> bool:
    """Say whether every file of a checkpoint is there as it was written."""
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
    """Give the checkpoint that was the best one when this one was written.

    None where none was measured.
    """
    step = json.loads((folder / STATE).read_bytes())["best_global_step"]
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
    """Say whether training can go on from a checkpoint; otherwise it has weights only."""
    try:
        return MOMENTS in json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lighten(folder: Path) -> None:
    """Remove all of a checkpoint that only going on from it needs."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    extra = [n for n in manifest["files"] if n in (MOMENTS, STEPS) or n.startswith("random-")]
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


def write_optimizer(folder: Path | None, optimizer: Any, scheduler: Any) -> None:
    """Write the state of optimizer and schedule: tensors as safetensors, the rest as JSON.

    Sharded tensors are gathered one at a time. All ranks must then be here, and those without a folder write nothing.
    """
    state = optimizer.state_dict()
    tensors, others = {}, {}
    for number, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                whole = ranks.whole(value.detach())
                if folder is not None:
                    tensors[f"{number}.{name}"] = whole.cpu().contiguous()
            else:
                others[f"{number}.{name}"] = value
    if folder is None:
        return
    save_file(tensors, folder / MOMENTS)
    rest = {"others": others, "groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    write_json(folder / STEPS, rest)


def read_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Give optimizer and schedule the state that `write_optimizer` wrote.

    Of sharded tensors each rank keeps its share. Memory: one whole tensor at a time.
    """
    rest = json.loads((folder / STEPS).read_bytes())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    with safe_open(folder / MOMENTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            number, _, name = key.partition(".")
            value, parameter = file.get_tensor(key), parameters[int(number)]
            share = take_share(value, parameter) if value.shape == parameter.shape else value
            state.setdefault(int(number), {})[name] = share
    for key, value in rest["others"].items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in rest["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(rest["scheduler"])


def write_random(folder: Path, rank: int) -> None:
    """Write the state of this process's random generators."""
    version, numbers, gauss = random.getstate()
    name, keys, *numpy_rest = np.random.get_state(legacy=True)
    on_device = read_random_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *numpy_rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "accelerator": None if on_device is None else on_device.hex(),
    }
    write_json(folder / f"random-{rank}.json", state)


def read_random(folder: Path, rank: int) -> None:
    """Set this process's random generators as they were."""
    state: Mapping[str, Any] = json.loads((folder / f"random-{rank}.json").read_bytes())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    set_random_state(state["accelerator"] and bytes.fromhex(state["accelerator"]))


def _bytes(digits: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)


LOWER = "lower --train.learning-rate or --train.max-grad-norm, and name another folder with --output"


class CheckpointedTrainer(Trainer):
    """Replaces how `transformers.Trainer` writes and reads checkpoints.

    Its own are written in place, so a killed process leaves half of one, which is then taken; and they are pickled.
    Training ends at the first loss, gradient or weight that is NaN or infinite, before it reaches a checkpoint.

    Where accelerate's configuration asks for FSDP2, a copy of the drafter is sharded and trained. The drafter itself
    stays whole on each rank, and gets the weights for measuring, for checkpoints and at the end. So the files are the
    same as those of one process.

    Memory, of a rank among n: a whole drafter, and a share 1/n of weights, gradients and moments.
    """

    model: Any
    """What is trained: the drafter, or its sharded copy."""

    def __init__(self, drafter: Drafter, **kwargs):
        self.drafter, self.is_sharded = drafter, wants_shards()
        with sharded_by_dpace():
            super().__init__(model=copy.deepcopy(drafter) if self.is_sharded else drafter, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("accelerate was set up with FSDP or DeepSpeed in this process before; let dpace set it up")
        if self.is_sharded:
            shard(self.model)
            self.is_distributed_loading_by_transformers = True  # the Trainer then leaves placement and gradients to it

    def gather(self) -> None:
        """Bring the weights as they are into `drafter`; all ranks must be here."""
        if self.is_sharded:
            gather_weights(self.model, self.drafter)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run forward and backward of a micro-batch.

        Raises:
            ValueError: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            self._refuse_step(f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Give the norm of the gradient; one that is not finite is refused before the step is taken."""
        norm: Any = ranks.whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(float(norm)):
            self._refuse_step(f"the gradient of step {self.state.global_step + 1} has the norm {float(norm)}")
        return norm

    def _refuse_step(self, fault: str):
        kept = "the last checkpoint is kept in " + str(self.args.output_dir)
        raise ValueError(f"{fault}, with the learning rate {self.args.learning_rate:g}; {LOWER} ({kept})")

    def refuse_infinite_weights(self) -> None:
        """Refuse weights that a step has spoilt.

        Raises:
            ValueError: names the step and the tensors.
        """
        refuse_infinite(f"the drafter after step {self.state.global_step}", self.drafter, LOWER)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Note the best step, and keep its weights where no checkpoint of it is due."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and not self.control.should_save:
            self._write_checkpoint(has_optimizer=False)
        return is_best

    def _save_checkpoint(self, model, trial=None) -> None:
        """Write a checkpoint aside and let it take its place; keep it and the best one."""
        self.store_flos()
        self._write_checkpoint(has_optimizer=True)

    def _write_checkpoint(self, *, has_optimizer: bool) -> None:
        """Write a checkpoint, which training can go on from only with the optimizer's state."""
        self.gather()
        self.refuse_infinite_weights()
        checkpoints, step = Path(str(self.args.output_dir)), self.state.global_step
        best = self.state.best_global_step
        best_folder = checkpoint_folder(checkpoints, best) if best else None
        self.state.best_model_checkpoint = str(best_folder) if best_folder else None
        unfinished = unfinished_folder(checkpoints, step)
        with room_for(f"the checkpoint of step {step}", checkpoints, unfinished):
            if self.is_world_process_zero():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if has_optimizer:
                write_random(unfinished, self.args.process_index)
            if has_optimizer and (self.is_sharded or self.is_world_process_zero()):
                keep = unfinished if self.is_world_process_zero() else None
                write_optimizer(keep, self.optimizer, self.lr_scheduler)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.drafter.save_pretrained(unfinished)
                self.write_state(unfinished / STATE)
                folder = finish(checkpoints, step)
                prune(checkpoints, folder, best_folder)
        self.accelerator.wait_for_everyone()

    def write_state(self, path: Path) -> None:
        """Write the log and the place in the training, all or nothing, as `TrainerState` reads them.

        The entry of the whole run is left out: it tells of this process's own steps only.
        """
        state = dataclasses.asdict(self.state)
        state["log_history"] = [entry for entry in state["log_history"] if "train_runtime" not in entry]
        write_text(path, json.dumps(state, indent=2, sort_keys=True) + "\n")

    def read_finished(self, state: TrainerState) -> None:
        """Take over the state and the best weights of a run whose last step has a checkpoint."""
        self.state = state
        step = state.best_global_step or state.global_step
        self._load_from_checkpoint(str(checkpoint_folder(Path(str(self.args.output_dir)), step)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Read the weights, into the tensors that the optimizer knows."""
        self.drafter.load_state_dict(load_file(Path(resume_from_checkpoint) / "model.safetensors"))
        if self.is_sharded:
            scatter_weights(self.drafter, self.model)

    def load_best(self) -> None:
        """Read the weights of the best step, if one was measured; else take those of the last one."""
        self.gather()
        if self.state.best_global_step:
            best = checkpoint_folder(Path(str(self.args.output_dir)), self.state.best_global_step)
            self._load_from_checkpoint(str(best))

    def _init_training_state(self, *args, **kwargs):
        """Find the best checkpoint by its step, since its path changes when the folder is moved."""
        trained = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            best = checkpoint_folder(Path(str(self.args.output_dir)), self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the state of optimizer and schedule."""
        if checkpoint is not None:
            read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: bf16 needs no scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the random generators."""
        if checkpoint is not None:
            read_random(Path(checkpoint), self.args.process_index)


@contextmanager
def room_for(what: str, folder: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Turn a full disk into one line, and free what was written so far.

    Raises:
        OSError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise OSError(
            f"cannot write {what} into {folder}: {reason}; make room there and run the same command: it goes "
            "on from the last checkpoint"
        ) from error
