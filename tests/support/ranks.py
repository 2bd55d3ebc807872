"""Work on several ranks, for test_ranks.py, and the same on one."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpace.batches import feature_files
from dpace.batches.dataset import ResponseDataset
from dpace.config import BenchConfig, CompareConfig, LossConfig, PromptsConfig, Recipe, TrainConfig
from dpace.drafter import Drafter
from dpace.prompts.prompts import Prompt
from dpace.respond.answering import write_responses
from dpace.respond.responses import Example, Response
from dpace.studies.compare import compare
from dpace.system import ranks
from dpace.target import Target
from dpace.target.target import ShardedTarget
from dpace.training.loop import TrainingLoop
from dpace.training.run import train
from dpace.training.sharding import USE_FSDP

FSDP = {USE_FSDP: "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""
JOBS = {
    "anchors": {},
    "batch": {},
    "slots": {"optimizer": "muon", "grow_blocks": True},
    "weights": {"gradient_checkpointing": True, "max_grad_norm": 0.1},
}
"""Options of training, with each reduction."""
STOPPED = ("slots",)
"""Jobs that are ended by a signal, and go on."""


def make_job(recipe: Recipe, reduction: str, micro_size: int) -> Recipe:
    """A job whose steps have as many conversations, on these ranks and in micro-batches of this size."""
    steps = recipe.train.batch_size // micro_size // ranks.num_ranks()
    config = replace(recipe.train, batch_size=micro_size, gradient_accumulation_steps=steps, **JOBS[reduction])
    return replace(recipe, train=config, loss=LossConfig(reduction=reduction))


def make_datasets(responses: Sequence[Response], recipe: Recipe) -> tuple[ResponseDataset, ResponseDataset]:
    """Conversations of which some have no anchor, which a dataset would otherwise leave out; and an odd number."""
    config = recipe.train
    empty = [replace(response, id=f"empty/{response.id}", response_spans=[]) for response in responses[:5]]
    dataset = ResponseDataset(responses, max_length=config.max_length, num_anchors=config.num_anchors, seed=0)
    dataset.examples = [Example.of(one) for one in (*responses, *empty)]  # those without an anchor too
    return dataset, ResponseDataset(responses[:3], max_length=config.max_length, num_anchors=None, seed=0)


def train_all(
    target: Target,
    responses: Sequence[Response],
    recipe: Recipe,
    folder: Path,
    micro_size: int,
    names: Sequence[str] = tuple(JOBS),
) -> None:
    """Train each job for a few steps."""
    for name in names:
        job = make_job(recipe, name, micro_size)
        drafter = train(target, *make_datasets(responses, job), job, folder / name)
        ranks.barrier()
        kept = Drafter.from_pretrained(folder / name)
        for mine, other in zip(drafter.parameters(), kept.parameters(), strict=True):
            assert not isinstance(mine, DTensor) and torch.equal(mine, other)


def stop_and_go_on(target: Target, responses: Sequence[Response], recipe: Recipe, folder: Path) -> None:
    """End trainings by SIGTERM to one rank in its first step, and go on: the same files as without, bit by bit."""

    def signalled(self, batches, take_step=TrainingLoop.take_step):
        if ranks.rank() == ranks.num_ranks() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self, batches)

    for name in STOPPED:
        again = folder / f"{name}-again"
        job = make_job(recipe, name, 2)
        datasets = make_datasets(responses, job)
        with mock.patch.object(TrainingLoop, "take_step", signalled), pytest.raises(KeyboardInterrupt):
            train(target, *datasets, job, again)
        assert (again / "checkpoints" / "checkpoint-1").exists()
        train(target, *datasets, job, again)
        ranks.barrier()
        for file in ("model.safetensors", f"checkpoints/checkpoint-{job.train.max_steps}/optimizer.safetensors"):
            found, expected = (load_file(each / file) for each in (again, folder / name))
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in found.items()), file


def answer_all(target: Target, responses: Sequence[Response], recipe: Recipe, folder: Path) -> None:
    """Answer the prompts again, greedily and sampled."""
    prompts = [Prompt(one.id, one.set, [[one.messages[0]]]) for one in responses]
    for temperature in (0.0, 1.0):
        config = replace(recipe.respond, temperature=temperature, batch_size=2, max_new_tokens=12)
        found = write_responses(target, prompts, folder / f"answers-{temperature:g}" / "responses.jsonl", config)
        assert [one.id for one in found] == [prompt.id for prompt in prompts]


def keep_features(target: Target, whole: Target, dataset: ResponseDataset, folder: Path) -> None:
    """Keep features on disk, of which each rank computes a share."""
    with (
        mock.patch.object(feature_files, "SHARD_BYTES", 2**16),
        mock.patch("dpace.batches.dataset.FEATURE_BATCH", 1),
    ):
        feature_files.keep_on_disk(target, dataset, [1, 3], TrainConfig(feature_files=str(folder)))
    assert dataset.features is not None
    for i in range(len(dataset)):
        expected = whole.features(dataset.token_ids(i)[None], [1, 3])[0]
        torch.testing.assert_close(dataset.features[i].layers, expected, rtol=1e-4, atol=1e-4)


def measure_all(target: Target, responses: Sequence[Response], recipe: Recipe, folder: Path) -> None:
    """Compare two objectives, and decode; each rank has a share, and all have the results."""
    size = recipe.train.batch_size // ranks.num_ranks()
    options = vars(recipe) | {
        "output": str(folder / "compare"),
        "prompts": PromptsConfig(path=str(folder.parent / "prompts.jsonl"), num_heldout=3, num_validation=3),
        "train": replace(recipe.train, batch_size=size, feature_cache_gib=1.0),
        "bench": BenchConfig(num_prompts=3, temperatures=(0.0, 1.0), max_new_tokens=6, widths=("full",)),
        "respond": replace(recipe.respond, max_new_tokens=12),
    }
    compare(target, CompareConfig(**options, objectives=("dpace",), baseline="dflash", seeds=(0,)))


def tell_all() -> None:
    """What one rank tells the others, a failure among it."""

    rank, count = dist.get_rank(), dist.get_world_size()
    assert (ranks.rank(), ranks.num_ranks(), ranks.is_first()) == (rank, count, rank == 0)
    assert ranks.gather(rank) == list(range(count)) and ranks.from_first(lambda: rank) == 0
    with pytest.raises(OSError, match="No space left on device: 'x'"):
        ranks.from_first(mock.Mock(side_effect=OSError(28, "No space left on device", "x")))


def check_shares_of_a_drafter(loop: TrainingLoop) -> None:
    """A rank has its share of weights, gradients and moments only."""
    model = loop.trained
    assert isinstance(model, FSDPModule) and all(isinstance(layer, FSDPModule) for layer in model.layers)
    for parameter in model.parameters():
        moments = [value for value in loop.optimizer.state[parameter].values() if value.ndim]
        for tensor in (parameter, *moments):
            assert isinstance(tensor, DTensor)
            assert len(tensor.to_local()) <= -(-len(tensor) // dist.get_world_size())


def check_shares_of_a_target(target: ShardedTarget, whole: Target) -> None:
    """The same features for other texts on each rank, from its share of the layers."""
    rank = dist.get_rank()
    kept = sum(ranks.local(parameter).numel() for parameter in target.layers.parameters())
    assert kept <= 1.02 / ranks.num_ranks() * sum(parameter.numel() for parameter in whole.layers.parameters())
    assert target.sha256 == whole.sha256 and torch.equal(target.head.weight, whole.head.weight)
    text = torch.randint(4, 30, (2 + rank, 9 + 3 * rank))
    for options in ({}, {"with_head_input": True}):
        found, expected = (each.read_features(text, [1, 3], **options) for each in (target, whole))
        torch.testing.assert_close([*found], [*expected], rtol=1e-4, atol=1e-5)
    if rank:
        torch.testing.assert_close(target.features(text, [1]), whole.features(text, [1]), rtol=1e-4, atol=1e-5)
    else:
        target.join_features([1])


def on_whole_models(name: str, responses: Sequence[Response], recipe: Recipe, folder: Path) -> None:
    """Do on each rank what `torchrun` does."""
    target = Target.load(name)
    answer_all(target, responses, recipe, folder)  # first, since nothing has joined the ranks yet
    tell_all()
    train_all(target, responses, recipe, folder, 2)
    if ranks.num_ranks() == 2:  # with more, gradients are summed in another order after a resume
        stop_and_go_on(target, responses, recipe, folder)
    keep_features(target, target, make_datasets(responses, recipe)[0], folder / "features")
    measure_all(target, responses, recipe, folder)


def on_shares(name: str, responses: Sequence[Response], recipe: Recipe, folder: Path) -> None:
    """Train with shares of the drafter, and of the target too."""
    whole = Target.load(name)
    os.environ |= FSDP
    with mock.patch.object(TrainingLoop, "run", autospec=True, side_effect=TrainingLoop.run) as trained:
        train_all(whole, responses, recipe, folder, 2)
    assert len(trained.call_args_list) == len(JOBS)
    for call in trained.call_args_list:
        check_shares_of_a_drafter(call.args[0])
    stop_and_go_on(whole, responses, recipe, folder)
    target = Target.load(name, shard="fsdp")
    check_shares_of_a_target(target, whole)
    train_all(target, responses, recipe, folder / "of the target", 2, STOPPED)
    keep_features(target, whole, make_datasets(responses, recipe)[0], folder / "features")
