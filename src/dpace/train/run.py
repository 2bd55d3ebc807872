"""Train a drafter: from responses to a folder with its weights, recipe and provenance."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import keep_on_disk
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.drafter.drafter import ANSWERS_FILE
from dpace.drafter.vocabulary import VOCABULARY_FILE
from dpace.loss import Weigh
from dpace.loss.objective import make_weigh, name_of
from dpace.recipes.recipe_file import write_recipe
from dpace.respond.responses import Example, Response
from dpace.system import ranks
from dpace.system.ledger import lock_folder, register_files, write_json
from dpace.target import Target
from dpace.target.target import HEAD_INPUT
from dpace.train.checkpoints import STATE, find_newest
from dpace.train.finish import write_finished
from dpace.train.identity import RUN_FILE, Run, data_facts, flat_settings, target_facts
from dpace.train.loop import TrainingLoop
from dpace.train.progress import reset_peak_memory
from dpace.train.sharding import wants_shards

FILES = (
    "config.json",
    "model.safetensors",
    "modeling_dflash.py",
    VOCABULARY_FILE,
    ANSWERS_FILE,
    "recipe.yaml",
    RUN_FILE,
    "provenance.json",
    STATE,
    "checkpoints",
)
"""What `train` writes into a drafter's folder."""


def check_recipe(recipe: Recipe, weigh: Weigh | None = None) -> Weigh:
    """Refuse what no training takes, before any work, and return what computes the weights.

    Args:
        recipe: every setting.
        weigh: the function of a custom objective; otherwise it is imported by its name.

    Raises:
        ValueError: see `make_weigh` and `wants_shards`; there is a head, or servers of hidden states, and a loss that
            reads the target's distribution; an option of a head, and none; or one of hidden states on disk, and no
            folder.
    """
    config = recipe.train
    has_head = recipe.drafter.head is not None
    checked = make_weigh(recipe.loss, recipe.drafter.block_size, weigh, is_growing=config.grow_blocks)
    wants_shards()
    if config.feature_servers and recipe.needs_target_hidden:
        raise ValueError(
            "--train.feature-servers give no input of the LM head, which this token loss, confidence or penalty of a "
            "head needs; leave them out, or take --loss.token-loss nll and, with a head, --loss.head-penalty 0"
        )
    if not config.feature_files and (config.feature_dtype != "target" or config.feature_servers):
        raise ValueError(
            "--train.feature-dtype and --train.feature-servers are for hidden states on disk; name a folder for them "
            "with --train.feature-files"
        )
    defaults = flat_settings(Recipe())
    for name, value in flat_settings(recipe).items():
        is_read = has_head if name.startswith("drafter.") else recipe.drafter.head == "lilicorr"
        if ".head_" in name and not is_read and value != defaults[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {value}, and the drafter has no head that reads it; add --drafter.head lilicorr, or leave "
                f"{flag} out"
            )
    if has_head and recipe.loss.needs_target_probs:
        raise ValueError(
            f"--loss.token-loss is {recipe.loss.token_loss} and --loss.confidence {recipe.loss.confidence}; a drafter "
            "with --drafter.head learns with nll and token only: leave out what differs, and objectives such as "
            "dpace+kl, which set them"
        )
    return checked


def choose_conversations(
    responses: Sequence[Example | Response], validation: Sequence[Example | Response], recipe: Recipe
) -> tuple[ResponseDataset, ResponseDataset]:
    """Make the two datasets that `train` takes, without features.

    Raises:
        ValueError: nothing to train on, or no answer as long as a block for a head.
    """
    config = recipe.train
    dataset = ResponseDataset(responses, max_length=config.max_length, num_anchors=config.num_anchors, seed=config.seed)
    if not len(dataset):
        raise ValueError(
            f"none of the {len(responses)} responses has two tokens that the target wrote in a row, so there is "
            "nothing to train on; add prompts, or raise --train.max-length or --respond.max-new-tokens"
        )
    size = recipe.drafter.block_size
    longest = max(example.num_anchors(config.max_length) for example in dataset.examples)
    if recipe.drafter.head == "lilicorr" and longest < size - 1:
        raise ValueError(
            f"no answer fills a block of {size} tokens, so --drafter.head would learn nothing; lower "
            "--drafter.block-size, or leave --drafter.head out"
        )
    return dataset, ResponseDataset(validation, max_length=config.max_length, num_anchors=None, seed=config.seed)


def keep_features(target: Target, dataset: ResponseDataset, validation: ResponseDataset, recipe: Recipe) -> None:
    """Compute the features that the datasets lack, where they fit in memory or go to disk.

    Several drafters that read the same layers can share them. `feature_cache_gib` is the limit in memory, and
    `feature_files` the folder on disk; those to validate on are never on disk.

    Raises:
        ValueError: see `keep_on_disk`.
    """
    config = recipe.train
    measured_ids = Drafter.layer_ids(target, recipe.drafter)
    trained_ids = measured_ids + [HEAD_INPUT] * recipe.needs_target_hidden
    if config.feature_files and dataset.lacks(trained_ids):
        keep_on_disk(target, dataset, trained_ids, config)
    for part, layer_ids in ((dataset, trained_ids), (validation, measured_ids)):
        if part.lacks(layer_ids):
            part.keep_features(target, layer_ids, limit_bytes=config.feature_cache_gib * 2**30)


def make_datasets(
    target: Target, responses: Sequence[Response], validation: Sequence[Response], recipe: Recipe
) -> tuple[ResponseDataset, ResponseDataset]:
    """Make the two datasets that `train` takes: one to train on and one to measure tau on.

    In the second, every response token is an anchor. The features of both are computed here where they fit in
    `feature_cache_gib`, so that several drafters can share them.

    Raises:
        ValueError: nothing to train on; or see `check_recipe`.
    """
    check_recipe(recipe)
    datasets = choose_conversations(responses, validation, recipe)
    keep_features(target, *datasets, recipe)
    return datasets


def train(
    target: Target,
    dataset: ResponseDataset,
    validation: ResponseDataset,
    recipe: Recipe,
    folder: str | Path,
    *,
    weigh: Weigh | None = None,
    init: Drafter | None = None,
    run: Run | None = None,
) -> Drafter:
    """Train a drafter and write its folder.

    An interrupted run continues from its newest checkpoint that is whole; a finished one is read and left as it is.

    Memory: drafter, its gradient and the optimizer's moments in fp32; the target; features of a batch, or of all
    conversations where they are kept; O(batch x block tokens x (tokens + block tokens)) bytes for the dense mask on
    CPU; the loss as `frozen_head_nll` says. Disk: up to eleven times the drafter's size in fp32.

    Args:
        target: the frozen target.
        dataset: what it wrote, from `make_datasets`.
        validation: for measuring tau during training; best greedy responses. May be empty.
        recipe: every setting.
        folder: receives what `FILES` names.
        weigh: a custom objective, recorded by its name and source.
        init: a trained drafter to start from, with the recipe's size, as `engines.initial.start_from` gives both.
        run: this run with all its facts, where they are known; computed by default.

    Returns:
        The best drafter by tau of the validation responses, or the last one where there are none, in fp32 with its
        weights rounded as in the file.

    Raises:
        ValueError: the text contains the mask token; the folder holds another run, files that dpace did not write, or
            is written to by another process; a loss, gradient or weight that is not finite; an objective that fails; or
            see `check_recipe`.
        OSError: no room on the disk; the same call goes on when there is.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    if weigh is not None:
        recipe = replace(recipe, loss=replace(recipe.loss, objective=name_of(weigh)))
    checked = check_recipe(recipe, weigh)
    folder = Path(folder)
    if run is None:
        run = Run(recipe, init, weigh)
        run.facts |= data_facts(dataset, validation) | target_facts(target)
    with lock_folder(folder):
        ranks.from_first(lambda: register_files(folder, *FILES))
        if ranks.from_first(lambda: run.is_finished_in(folder)):
            return Drafter.from_pretrained(folder, dtype=torch.float32).to(target.device)
        newest = ranks.from_first(lambda: find_newest(folder / "checkpoints"))
        drafter = _make_drafter(target, dataset, recipe, init)
        keep_features(target, dataset, validation, recipe)
        loop = TrainingLoop(
            drafter, target, dataset, validation, recipe, weigh=checked, checkpoints=folder / "checkpoints"
        )
        if ranks.is_first():
            write_json(folder / RUN_FILE, run.facts)
            write_recipe(recipe, folder / "recipe.yaml")
        reset_peak_memory(target.device)
        loop.run(newest)
        write_finished(folder, loop, run.facts)
    return drafter


def _make_drafter(target: Target, dataset: ResponseDataset, recipe: Recipe, init: Drafter | None) -> Drafter:
    """Make the untrained drafter, or a copy of the one to start from."""
    if (init is None) != (recipe.drafter.init is None):
        raise ValueError("take both drafter.init and the drafter to start from from dpace.engines.initial.start_from")
    if init is None:
        drafter = Drafter.from_target(target, seed=recipe.train.seed, **vars(recipe.drafter))
    else:
        drafter = init.start_for(target)
    if drafter.mask_token_id in dataset.seen_tokens:
        raise ValueError(
            f"the training text contains the mask token {drafter.mask_token_id}; name a token that no text contains "
            "with --drafter.mask-token-id, or train without --drafter.init"
        )
    return drafter
