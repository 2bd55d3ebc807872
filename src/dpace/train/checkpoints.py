"""Write checkpoints all or nothing, find the newest one that is whole, and remove the others.

A checkpoint is a folder `checkpoint-STEP` with safetensors and JSON only. Its `manifest.json`, which is written last,
names every file with its size and hash.
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpace import ranks
from dpace.device import read_random_state, set_random_state
from dpace.ledger import UNFINISHED, sweep, sync, write_json
from dpace.loading import share
from dpace.provenance import hash_file
from dpace.train.sharding import take_share

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
        share(path)
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
    sweep(checkpoints)
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
