"""Train a drafter: from responses to a folder with its weights, recipe and provenance."""

import json
from collections.abc import Sequence
from pathlib import Path

import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainerState

from dpace.config import Recipe
from dpace.data.chat import tokenizer_hashes
from dpace.data.dataset import ResponseDataset
from dpace.data.responses import Response
from dpace.drafter import Drafter
from dpace.flags import read_recipe, write_recipe
from dpace.provenance import find_hardware, find_versions
from dpace.target import Target
from dpace.train.calibration import fit_confidence_temperature
from dpace.train.callbacks import PeakMemory, SaveOnInterrupt
from dpace.train.trainer import DrafterTrainer, training_arguments


def is_trained(folder: str | Path, recipe: Recipe) -> bool:
    """Say whether a folder holds a finished drafter of this recipe.

    Raises:
        ValueError: it holds a run, finished or not, of another recipe.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").exists():
        return False
    old = read_recipe(folder / "recipe.yaml")
    for name in ("target", "prompts", "drafter", "loss", "train"):
        if getattr(old, name) != getattr(recipe, name):
            raise ValueError(
                f"{folder} holds a run with another setting of `{name}`: {getattr(old, name)}, not "
                f"{getattr(recipe, name)}; name another folder with --output, or delete that one"
            )
    return (folder / "provenance.json").exists()


def make_datasets(
    target: Target, responses: Sequence[Response], validation: Sequence[Response], recipe: Recipe
) -> tuple[ResponseDataset, ResponseDataset]:
    """Make the two datasets that `train` takes: one to train on and one to measure tau on.

    In the second, every response token is an anchor. The features of both are computed here where they fit in
    `feature_cache_gib`, so that several drafters can share them.

    Raises:
        ValueError: nothing to train on.
    """
    config = recipe.train
    dataset = ResponseDataset(responses, max_length=config.max_length, num_anchors=config.num_anchors, seed=config.seed)
    if not len(dataset):
        raise ValueError(
            f"none of the {len(responses)} responses has two tokens that the target wrote in a row, so there is "
            "nothing to train on; add prompts, or raise --train.max-length or --respond.max-new-tokens"
        )
    measured = ResponseDataset(validation, max_length=config.max_length, num_anchors=None, seed=config.seed)
    layer_ids = Drafter.layer_ids(target, **vars(recipe.drafter))
    for part, with_head_input in ((dataset, recipe.loss.needs_target_probs), (measured, False)):
        part.keep_features(
            target, layer_ids, limit_bytes=config.feature_cache_gib * 2**30, with_head_input=with_head_input
        )
    return dataset, measured


def train(
    target: Target, dataset: ResponseDataset, validation: ResponseDataset, recipe: Recipe, folder: str | Path
) -> Drafter:
    """Train a drafter and write its folder.

    An interrupted run continues from its last checkpoint.

    Memory: drafter, its gradient and the optimizer's moments in fp32; the target; features of a batch, or of all
    conversations where they are kept; O(batch x block tokens x (tokens + block tokens)) bytes for the dense mask on
    CPU; the loss as `frozen_head_nll` says. Disk: two checkpoints of three times the drafter's size.

    Args:
        target: the frozen target.
        dataset: what it wrote, from `make_datasets`.
        validation: for measuring tau during training; best greedy responses. May be empty.
        recipe: every setting.
        folder: receives `config.json`, `model.safetensors`, `recipe.yaml`, `provenance.json`, `trainer_state.json`, and
            `checkpoints/`.

    Returns:
        The best drafter by tau of the validation responses; the last one where there are none.

    Raises:
        ValueError: the text contains the mask token, or the folder holds a run of another recipe.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint of the last step.
    """
    folder, config = Path(folder), recipe.train
    is_trained(folder, recipe)
    drafter = Drafter.from_target(target, seed=config.seed, **vars(recipe.drafter))
    if any((token_ids == drafter.mask_token_id).any() for _, token_ids, _ in dataset.rows):
        raise ValueError(
            f"the training text contains the mask token {drafter.mask_token_id}; "
            "name a token that no text contains with --drafter.mask-token-id"
        )
    checkpoints = folder / "checkpoints"
    args = training_arguments(config, checkpoints, device=target.device, has_validation=bool(len(validation)))
    trainer = DrafterTrainer(drafter, target, dataset, validation, args, recipe.loss, config.optimizer == "muon")
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, folder / "recipe.yaml")
    memory = PeakMemory(target.device)
    _take_steps(trainer, drafter, checkpoints)
    if trainer.is_world_process_zero():
        temperature = fit_confidence_temperature(drafter, target, validation)
        record = _record(target, trainer, validation, recipe)
        drafter.config.dpace = {"confidence_temperature": temperature, **record}
        drafter.save_pretrained(folder)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        provenance = {**_provenance(target, trainer, dataset), "peak_memory_bytes": memory.bytes}
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return drafter


def _take_steps(trainer: Trainer, drafter: Drafter, checkpoints: Path) -> None:
    """Train from the last checkpoint, if there is one, to the last step."""
    last = transformers.trainer_utils.get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    if last and _is_last(Path(last)):  # only the folder's own files are missing; Trainer would take another step
        trainer.state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
        drafter.load_state_dict(load_file(Path(trainer.state.best_model_checkpoint or last) / "model.safetensors"))
    else:
        with interrupt.watching():
            trainer.train(resume_from_checkpoint=last)


def _is_last(checkpoint: Path) -> bool:
    """Say whether the checkpoint is that of the last step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps


def _record(target: Target, trainer: Trainer, validation: ResponseDataset, recipe: Recipe) -> dict:
    """Give what the drafter's config records: what it was trained for, and its tau.

    `dpace doctor` compares with it; engines ignore it.
    """
    record = {
        "target": target.short_name,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "thinking": recipe.thinking,
        **tokenizer_hashes(target),
    }
    measured = [entry for entry in trainer.state.log_history if "eval_tau" in entry]
    if measured:
        best = max(measured, key=lambda entry: entry["eval_tau"])
        record |= {
            "tau": best["eval_tau"],
            "tau_interval": [best["eval_tau_low"], best["eval_tau_high"]],
            "tau_responses": validation.ids,
        }
    return record


def _provenance(target: Target, trainer: Trainer, dataset: ResponseDataset) -> dict:
    """Give what a drafter was made from, for `provenance.json`."""
    return {
        "target": target.name,
        "target_revision": getattr(target.model.config, "_commit_hash", None),
        "conversations": len(dataset),
        "conversations_without_anchor": dataset.num_skipped,
        "steps": trainer.state.global_step,
        "best_eval_tau": trainer.state.best_metric,
        "hardware": vars(find_hardware(target.device)),
        "versions": vars(find_versions()),
    }
