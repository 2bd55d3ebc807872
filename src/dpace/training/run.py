"""Train a drafter: from responses to a folder with its weights, recipe and provenance.

What a training depends on stands in the folder's `run.json`: the conversations, the target, and the settings that
change results. A folder with another run is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import keep_on_disk
from dpace.config import Recipe, is_custom
from dpace.drafter import Drafter
from dpace.drafter.drafter import ANSWERS_FILE, fit
from dpace.drafter.spec import SELECTORS
from dpace.drafter.vocabulary import VOCABULARY_FILE
from dpace.loss import Weigh
from dpace.loss.objective import load_custom, make_weigh, name_of, source_sha256
from dpace.recipes.recipe_file import write_recipe
from dpace.respond.responses import Example, Response
from dpace.system import ranks
from dpace.system.ledger import JsonObject, lock_folder, read_object, refuse_link, register_files, write_json
from dpace.system.provenance import fingerprint, same_run
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes
from dpace.training.checkpoints import STATE, find_newest
from dpace.training.finish import write_finished
from dpace.training.loop import TrainingLoop
from dpace.training.sharding import wants_shards

RUN_FILE = "run.json"
STEP_SIZE = "conversations_per_step"
NO_RESULT = {
    "train.batch_size",  # only the product with the next one and the ranks counts, and is `STEP_SIZE`
    "train.gradient_accumulation_steps",
    "drafter.init",  # the weights count, by their hash
    "drafter.norm_scale",  # these two count as numbers, which may follow from the target: see `target_facts`
    "drafter.intermediate_size",
    "train.logging_steps",
    "train.save_steps",
    "train.report_to",
    "train.feature_cache_gib",
    "train.feature_files",
    "train.gradient_checkpointing",
    "train.target_shard",
}
"""Settings that change no result: a run goes on with other values of them."""
OTHER_RUN = (
    "name another folder with --output, or delete that one; to train a finished drafter further, rename its folder, "
    "and name that with --drafter.init"
)
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


def settings_of(recipe: Recipe, weigh: Weigh | None = None, init: Drafter | None = None) -> JsonObject:
    """Return the settings that change what is trained on these ranks, and hashes of what they name by code or weights.

    Those that may follow from the target are among `target_facts`.

    Args:
        recipe: every setting.
        weigh: the function of a custom objective, where it is at hand; otherwise it is imported by its name.
        init: the drafter that the training starts from; None where it starts from nothing.

    Raises:
        ValueError: see `load_custom` and `source_sha256`.
    """
    settings = {name: value for name, value in recipe.settings.items() if name not in NO_RESULT}
    settings[STEP_SIZE] = recipe.train.batch_size * recipe.train.gradient_accumulation_steps * ranks.num_ranks()
    settings["init_sha256"] = None if init is None else fingerprint(init)
    settings["train.feature_servers"] = bool(recipe.train.feature_servers)  # whatever their addresses
    if weigh is not None or is_custom(recipe.loss.objective):
        settings["loss.objective_sha256"] = source_sha256(weigh or load_custom(recipe.loss.objective))
    settings["thinking"] = recipe.thinking
    return json.loads(json.dumps(settings))  # as a file gives them back: lists in place of tuples


def hash_rows(dataset: ResponseDataset) -> str:
    """Hash ids, tokens, and which of them the target wrote."""
    digest = hashlib.sha256()
    for index, response_id in enumerate(dataset.ids):
        name = response_id.encode()
        token_ids = dataset.token_ids(index)
        # With the lengths, no other rows give the same bytes.
        digest.update(f"{len(name)} {len(token_ids)} ".encode() + name)
        digest.update(token_ids.to(torch.int64).numpy().tobytes())
        digest.update(dataset.is_response(index).to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_run(folder: str | Path) -> JsonObject | None:
    """Read the facts of the run in a folder; None where the folder has no run.

    Raises:
        ValueError: the file cannot be read as that.
    """
    path = Path(folder) / RUN_FILE
    return read_object(path, OTHER_RUN) if path.exists() else None


class Run:
    """A training: its recipe, the drafter that it starts from, and the facts that decide what comes out of it.

    `facts` is what `run.json` holds. Facts of the settings are there at once; `data_facts` and `target_facts` are added
    when they are known, so that a folder with another run is refused before a model is loaded. `weigh` computes the
    weights of its objective.

    Args:
        recipe: every setting, as `start_from` gives it where there is a drafter to start from.
        init: that drafter.
        weigh: the function of a custom objective, where it is at hand; otherwise it is imported by its name.

    Raises:
        ValueError: see `check_recipe` and `settings_of`.
    """

    def __init__(self, recipe: Recipe, init: Drafter | None = None, weigh: Weigh | None = None):
        self.recipe = recipe
        self.init = init
        self.weigh = check_recipe(recipe, weigh)
        self.facts = settings_of(recipe, weigh, init)

    def is_in(self, folder: str | Path) -> bool:
        """Return whether a folder holds this run, finished or not; facts that are not known yet are not compared.

        Args:
            folder: a drafter's folder; it may be missing.

        Raises:
            ValueError: it holds another run; names the first thing that differs, with both values. Or it is a link.
        """
        refuse_link(Path(folder))
        written_facts = read_run(folder)
        if written_facts is None:
            return False
        same_run(written_facts, self.facts, f"{folder} holds a run", OTHER_RUN)
        return True

    def is_finished_in(self, folder: str | Path) -> bool:
        """Return whether a folder holds this run with its drafter; see `is_in`."""
        return self.is_in(folder) and is_finished(folder)


def is_finished(folder: str | Path) -> bool:
    """Return whether the run of a folder, whichever it is, has written its drafter."""
    return (Path(folder) / "provenance.json").exists()


def data_facts(dataset: ResponseDataset, validation: ResponseDataset) -> JsonObject:
    """Hash the conversations to train on, and the conversations that choose the checkpoint."""
    return {"train_sha256": hash_rows(dataset), "validation_sha256": hash_rows(validation)}


def target_facts(target: Target, recipe: Recipe) -> JsonObject:
    """Return what identifies a target and how its text is made, and the settings that may follow from it."""
    drafter = fit(recipe.drafter, target)
    facts = {
        "drafter.norm_scale": drafter.norm_scale,
        "drafter.intermediate_size": drafter.intermediate_size,
        "thinking": target.thinking,
        "dtype": target.dtype_name,
    }
    return facts | tokenizer_hashes(target) | {"target_sha256": target.sha256}


def check_recipe(recipe: Recipe, weigh: Weigh | None = None) -> Weigh:
    """Refuse what no training takes, before any work, and return what computes the weights.

    Args:
        recipe: every setting.
        weigh: the function of a custom objective; otherwise it is imported by its name.

    Raises:
        ValueError: see `make_weigh` and `wants_shards`; there is a selector, or servers of hidden states, and a loss
            that reads the target's distribution, or no folder for them; or an option of a selector, and none.
    """
    config = recipe.train
    selector = recipe.drafter.selector
    checked = make_weigh(recipe.loss, recipe.drafter.block_size, weigh, is_growing=config.grow_blocks)
    wants_shards()
    if config.feature_servers and (recipe.needs_target_hidden or not config.feature_files):
        raise ValueError(
            "--train.feature-servers write to disk, and give no input of the LM head; name a folder for them with "
            "--train.feature-files, and take --loss.token-loss nll, --loss.confidence token and, with a selector, "
            "--loss.selector-penalty 0"
        )
    defaults = Recipe().settings
    for name, value in recipe.settings.items():
        option = name.partition(".")[2]  # the name without its group, drafter or loss
        if not option.startswith("selector_") or value == defaults[name]:
            continue
        if selector is None or option not in SELECTORS[selector].reads:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {value}, and --drafter.selector is {selector}, which does not read it; leave {flag} out"
            )
    if selector and recipe.loss.needs_target_probs:
        raise ValueError(
            f"--loss.token-loss is {recipe.loss.token_loss} and --loss.confidence {recipe.loss.confidence}; a drafter "
            "with --drafter.selector learns with nll and token only: leave out what differs, and objectives such as "
            "dpace+kl, which set them"
        )
    return checked


def choose_conversations(
    responses: Sequence[Example | Response], validation: Sequence[Example | Response], recipe: Recipe
) -> tuple[ResponseDataset, ResponseDataset]:
    """Make the two datasets that `train` takes, without features.

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
    return dataset, ResponseDataset(validation, max_length=config.max_length, num_anchors=None, seed=config.seed)


def keep_features(target: Target, dataset: ResponseDataset, validation: ResponseDataset, recipe: Recipe) -> None:
    """Compute the features that the datasets lack, where they fit in memory or go to disk.

    Several drafters that read the same layers can share them. `feature_cache_gib` is the limit in memory, and
    `feature_files` the folder on disk; features of the validation responses are never on disk.

    Raises:
        ValueError: see `keep_on_disk`.
    """
    config = recipe.train
    layer_ids = Drafter.layer_ids(target, recipe.drafter)
    is_needed = recipe.needs_target_hidden
    if config.feature_files and dataset.lacks(layer_ids, with_head_input=is_needed):
        keep_on_disk(target, dataset, layer_ids, config, with_head_input=is_needed)
    limit_bytes = config.feature_cache_gib * 2**30
    # Only the loss reads the LM head's input, and validation has none.
    for conversations, with_head_input in ((dataset, is_needed), (validation, False)):
        if conversations.lacks(layer_ids, with_head_input=with_head_input):
            conversations.keep_features(target, layer_ids, limit_bytes=limit_bytes, with_head_input=with_head_input)


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
    CPU; the loss as `frozen_head_nll` says. Disk: less than ten times the drafter's size in fp32.

    Args:
        target: the frozen target.
        dataset: what it wrote, from `make_datasets`.
        validation: for measuring tau during training; best greedy responses. May be empty.
        recipe: every setting.
        folder: receives what `FILES` names.
        weigh: a custom objective, recorded by its name and source.
        init: a trained drafter to start from, with the recipe's size, as `training.initial.start_from` gives both.
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
    if run is None:
        run = Run(recipe, init, weigh)
        run.facts |= data_facts(dataset, validation) | target_facts(target, recipe)
    return _train_in(Path(folder), run, target, dataset, validation)


def _train_in(folder: Path, run: Run, target: Target, dataset: ResponseDataset, validation: ResponseDataset) -> Drafter:
    """Go on with a run in its folder, from nothing, from its newest checkpoint, or from its end."""
    recipe = replace(run.recipe, drafter=fit(run.recipe.drafter, target))
    init = run.init
    with lock_folder(folder):
        # All ranks go the way that rank 0 finds, since each may see the disk at another time.
        ranks.from_first(lambda: register_files(folder, *FILES))
        if ranks.from_first(lambda: run.is_finished_in(folder)):
            return Drafter.from_pretrained(folder, dtype=torch.float32).to(target.device)
        newest = ranks.from_first(lambda: find_newest(folder / "checkpoints"))
        drafter = _make_drafter(target, dataset, recipe, init)
        if init is None and newest is None:
            drafter.selector.begin(dataset)
        keep_features(target, dataset, validation, recipe)
        loop = TrainingLoop(
            drafter, target, dataset, validation, recipe, weigh=run.weigh, checkpoints=folder / "checkpoints"
        )
        if ranks.is_first():
            write_json(folder / RUN_FILE, run.facts)
            write_recipe(recipe, folder / "recipe.yaml")
        loop.run(newest)
        write_finished(folder, loop, run.facts, init)
    return drafter


def _make_drafter(target: Target, dataset: ResponseDataset, recipe: Recipe, init: Drafter | None) -> Drafter:
    """Make the untrained drafter, or a copy of the one to start from."""
    if (init is None) != (recipe.drafter.init is None):
        raise ValueError("take both drafter.init and the drafter to start from from dpace.training.initial.start_from")
    if init is None:
        drafter = Drafter.from_target(target, seed=recipe.train.seed, **vars(recipe.drafter))
    else:
        drafter = init.start_for(target, seed=recipe.train.seed)
    if drafter.mask_token_id in dataset.seen_tokens:
        raise ValueError(
            f"the training text contains the mask token {drafter.mask_token_id}; name a token that no text contains "
            "with --drafter.mask-token-id, or train without --drafter.init"
        )
    return drafter
