"""Describe what a training run depends on, and refuse to go on with another one in its folder.

What it depends on stands in the folder's `run.json`: the conversations, the target, and the settings that change
results.
"""

import hashlib
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.config import Recipe, is_custom
from dpace.drafter import Drafter
from dpace.loss import Weigh
from dpace.loss.objective import load_custom, source_sha256
from dpace.system import ranks
from dpace.system.device import dtype_name
from dpace.system.ledger import read_object
from dpace.system.provenance import fingerprint, same_run
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes

RUN_FILE = "run.json"
STEP_SIZE = "conversations_per_step"
NO_RESULT = {
    "train.batch_size",  # only the product with the next one and the ranks counts, and is `STEP_SIZE`
    "train.gradient_accumulation_steps",
    "drafter.init",  # the weights count, by their hash
    "train.logging_steps",
    "train.save_steps",
    "train.report_to",
    "train.feature_cache_gib",
    "train.feature_files",
    "train.feature_files_gib",
    "train.gradient_checkpointing",
    "train.target_shard",
}
"""Settings that change no result: a run goes on with other values of them."""
OBJECTIVE_SHA256 = "loss.objective_sha256"
OTHER_RUN = "name another folder with --output, or delete that one"


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of drafter, loss and training, named as `train.seed`."""
    return {
        f"{group}.{name}": value
        for group in ("drafter", "loss", "train")
        for name, value in asdict(getattr(recipe, group)).items()
    }


def settings_of(recipe: Recipe, weigh: Weigh | None = None, init: Drafter | None = None) -> dict[str, Any]:
    """Return the settings that change what is trained on these ranks, and hashes of what they name by code or weights.

    Args:
        recipe: every setting.
        weigh: the function of a custom objective, where it is at hand; otherwise it is imported by its name.
        init: the drafter that the training starts from; None where it starts from nothing.

    Raises:
        ValueError: see `load_custom` and `source_sha256`.
    """
    has_head = recipe.drafter.head is not None  # without, its options change nothing, and had other defaults once
    settings = {
        name: value
        for name, value in flat_settings(recipe).items()
        if name not in NO_RESULT and (has_head or ".head_" not in name)
    }
    settings[STEP_SIZE] = recipe.train.batch_size * recipe.train.gradient_accumulation_steps * ranks.num_ranks()
    settings["init_sha256"] = None if init is None else fingerprint(init)
    settings["train.feature_servers"] = bool(recipe.train.feature_servers)  # whatever their addresses
    if weigh is not None or is_custom(recipe.loss.objective):
        settings[OBJECTIVE_SHA256] = source_sha256(weigh or load_custom(recipe.loss.objective))
    settings["thinking"] = recipe.thinking
    return json.loads(json.dumps(settings))


def hash_rows(dataset: ResponseDataset) -> str:
    """Hash ids, tokens, and which of them the target wrote."""
    digest = hashlib.sha256()
    for index, response_id in enumerate(dataset.ids):
        name, token_ids = response_id.encode(), dataset.token_ids(index)
        digest.update(f"{len(name)} {len(token_ids)} ".encode() + name)
        digest.update(token_ids.to(torch.int64).numpy().tobytes())
        digest.update(dataset.is_response(index).to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """Read the facts of the run in a folder; None where the folder has no run.

    Raises:
        ValueError: the file cannot be read as that.
    """
    path = Path(folder) / RUN_FILE
    return read_object(path, OTHER_RUN) if path.exists() else None


class Run:
    """A training: its recipe, the drafter that it starts from, and the facts that decide what comes out of it.

    `facts` is what `run.json` holds. Those of the settings are there at once; `data_facts` and `target_facts` are added
    when they are known, so that a folder with another run is refused before a model is loaded.

    Args:
        recipe: every setting, as `start_from` gives it where there is a drafter to start from.
        init: that drafter.
        weigh: the function of a custom objective, where it is at hand; otherwise it is imported by its name.

    Raises:
        ValueError: see `settings_of`.
    """

    def __init__(self, recipe: Recipe, init: Drafter | None = None, weigh: Weigh | None = None):
        self.recipe = recipe
        self.init = init
        self.facts = settings_of(recipe, weigh, init)

    def is_in(self, folder: str | Path) -> bool:
        """Return whether a folder holds this run, finished or not.

        Facts that are not known yet are not compared. An option that the folder's version of dpace did not have counts
        as its default.

        Args:
            folder: a drafter's folder; it may be missing.

        Raises:
            ValueError: it holds another run; names the first thing that differs, with both values.
        """
        kept = read_run(folder)
        if kept is None:
            return False
        ways = {STEP_SIZE: "keep the product of --train.batch-size, --train.gradient-accumulation-steps and ranks"}
        if is_finished(folder):
            here = shlex.quote(str(folder))
            aside = shlex.quote(f"{folder}-before")
            longer = f"to train it further, run `mv {here} {aside}`, then add --drafter.init {aside}"
            ways |= {"train.max_steps": longer, "train.num_epochs": longer}
        same_run({**settings_of(Recipe()), **kept}, self.facts, f"{folder} holds a run", OTHER_RUN, ways)
        return True

    def is_finished_in(self, folder: str | Path) -> bool:
        """Return whether a folder holds this run with its drafter; see `is_in`."""
        return self.is_in(folder) and is_finished(folder)


def is_finished(folder: str | Path) -> bool:
    """Return whether the run of a folder, whichever it is, has written its drafter."""
    return (Path(folder) / "provenance.json").exists()


def data_facts(dataset: ResponseDataset, validation: ResponseDataset) -> dict[str, Any]:
    """Hash the conversations that are trained on and those that choose the checkpoint."""
    return {"train_sha256": hash_rows(dataset), "validation_sha256": hash_rows(validation)}


def target_facts(target: Target) -> dict[str, Any]:
    """Return what identifies a target and how its text is made."""
    return {
        "thinking": target.thinking,
        "dtype": dtype_name(target.model.dtype),
        **tokenizer_hashes(target),
        "target_sha256": target.sha256,
    }
