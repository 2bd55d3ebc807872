"""Training on several ranks, for test_ranks.py, and the same on one."""

from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from dpace.batches import feature_files
from dpace.batches.dataset import ResponseDataset
from dpace.config import BenchConfig, CompareConfig, LossConfig, PromptsConfig, Recipe, TrainConfig
from dpace.drafter import Drafter
from dpace.loss import REDUCTIONS
from dpace.measure.benchmark import bench
from dpace.prompts.prompts import Prompt
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response
from dpace.studies.compare import compare
from dpace.system import ranks
from dpace.target import Target
from dpace.train.run import train


def make_dataset(responses: list[Response], recipe: Recipe) -> ResponseDataset:
    """Conversations of which some have no anchor, which a dataset would otherwise leave out."""
    config = recipe.train
    empty = [replace(response, id=f"empty/{response.id}", response_spans=[]) for response in responses[:5]]
    dataset = ResponseDataset(
        [*responses, *empty], max_length=config.max_length, num_anchors=config.num_anchors, seed=0
    )
    dataset.chosen = np.arange(len(dataset.corpus))  # those without an anchor too
    return dataset


def train_all(target: Target, responses: list[Response], recipe: Recipe, folder: Path, num_ranks: int) -> None:
    """A few steps with every reduction; the batch of a step is the same on any number of ranks."""
    no_validation = ResponseDataset([], max_length=8, num_anchors=None, seed=0)
    for reduction in REDUCTIONS:
        config = replace(recipe.train, batch_size=recipe.train.batch_size // num_ranks)
        job = replace(recipe, train=config, loss=LossConfig(reduction=reduction))
        elsewhere = folder / "another node"  # which does not see the folder of the first rank, and writes nothing
        train(
            target,
            make_dataset(responses, recipe),
            no_validation,
            job,
            (folder if ranks.is_first() else elsewhere) / reduction,
        )
        assert not elsewhere.exists()


def answer_all(target: Target, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """Answer the prompts again, greedily and sampled."""
    prompts = [Prompt(one.id, one.set, [[one.messages[0]]]) for one in responses]
    for temperature in (0.0, 1.0):
        config = replace(recipe.respond, temperature=temperature, batch_size=2)
        path = folder / f"answers-{temperature:g}" / "responses.jsonl"
        found = write_responses(target, prompts, path, config)
        assert [one.id for one in found] == [prompt.id for prompt in prompts]


def measure_all(target: Target, responses: list[Response], recipe: Recipe, folder: Path, num_ranks: int) -> None:
    """Keep features on disk, decode, and compare two objectives; each rank has a share, and all have the results."""
    dataset = make_dataset(responses, recipe)
    with (
        mock.patch.object(feature_files, "SHARD_BYTES", 2**16),
        mock.patch("dpace.batches.dataset.FEATURE_BATCH", 4),
    ):
        feature_files.keep_on_disk(target, dataset, [1, 3], TrainConfig(feature_files=str(folder / "features")))
    for i in (0, len(dataset) - 1):
        assert dataset.features is not None
        torch.testing.assert_close(dataset.features[i], target.features(dataset.token_ids(i)[None], [1, 3])[0])

    prompts = [Prompt(one.id, one.set, [[one.messages[0]]]) for one in responses[:5]]
    drafters = {"d": Drafter.from_target(target, num_layers=1, block_size=4)}
    config = BenchConfig(temperatures=(0.0, 1.0), max_new_tokens=6, widths=("full",))
    bench(target, drafters, prompts, config, folder / "bench")

    path = folder.parent / "prompts.jsonl"
    options = {field.name: getattr(recipe, field.name) for field in fields(Recipe)} | {
        "output": str(folder / "compare"),
        "prompts": PromptsConfig(path=str(path), num_heldout=3, num_validation=3),
        "train": replace(recipe.train, batch_size=recipe.train.batch_size // num_ranks, feature_cache_gib=1.0),
        "bench": replace(config, num_prompts=2, temperatures=(0.0,)),
        "respond": replace(recipe.respond, max_new_tokens=12),
    }
    compare(target, CompareConfig(**options, objectives=("dpace",), baseline="dflash", seeds=(0,)))


def tell_all() -> None:
    """What one rank tells the others, a failure among it."""

    def fail() -> None:
        raise OSError(28, "No space left on device", "x")

    rank, count = dist.get_rank(), dist.get_world_size()
    assert (ranks.rank(), ranks.num_ranks(), ranks.is_first()) == (rank, count, rank == 0)
    assert ranks.gather(rank) == list(range(count)) and ranks.from_first(lambda: rank) == 0
    try:
        ranks.from_first(fail)
    except OSError as error:
        assert error.filename == "x"
    else:
        raise AssertionError("the failure of rank 0 is unknown here")
    ranks.barrier()


def main(name: str, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """Do all of it on each rank."""
    target = Target.load(name)
    answer_all(target, responses, recipe, folder)  # first, since nothing has joined the ranks yet
    tell_all()
    train_all(target, responses, recipe, folder, ranks.num_ranks())
    measure_all(target, responses, recipe, folder, ranks.num_ranks())
