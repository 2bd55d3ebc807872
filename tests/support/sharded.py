"""Training on several ranks, for test_sharded.py."""

import os
import signal
import time
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
from dpace.config import LossConfig, Recipe, TrainConfig
from dpace.drafter import Drafter
from dpace.loss import REDUCTIONS
from dpace.loss.objective import make_weigh
from dpace.measure import heldout
from dpace.respond.responses import Response
from dpace.system import ranks
from dpace.target import Target
from dpace.target.target import HEAD_INPUT, ShardedTarget
from dpace.train import run
from dpace.train.loop import TrainingLoop
from dpace.train.sharding import USE_FSDP, wants_shards
from tests.conftest import make_drafter

JOBS = ("anchors", "weights", "muon", "growing", "again")
"""Of the reductions, those whose divisors differ most; `test_ranks.py` has all with whole drafters."""
RESUMED = ("muon", "growing")
FSDP = {USE_FSDP: "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""


def make_jobs(recipe: Recipe, num_ranks: int) -> dict[str, Recipe]:
    """Every reduction, both optimizers, and what runs the drafter or its gradient in another way."""
    size = recipe.train.batch_size // num_ranks
    base = replace(recipe, train=replace(recipe.train, batch_size=size))
    jobs = {name: replace(base, loss=LossConfig(reduction=name)) for name in REDUCTIONS}
    halves = {"batch_size": size // 2, "gradient_accumulation_steps": 2}
    jobs["muon"] = replace(base, train=replace(base.train, optimizer="muon", **halves))
    growing = replace(base.train, grow_blocks=True)
    jobs["growing"] = replace(base, drafter=replace(base.drafter, block_size=8), train=growing)
    jobs["again"] = replace(base, train=replace(base.train, gradient_checkpointing=True, max_grad_norm=0.1))
    return jobs


def train_all(target: Target, responses: list[Response], recipe: Recipe, folder: Path, names: Sequence[str]) -> None:
    """Train each job for a few steps, with tau measured on an odd number of responses."""
    jobs = make_jobs(recipe, ranks.num_ranks())
    for name in names:
        job = jobs[name]
        datasets = run.make_datasets(target, responses[:-3], responses[-3:], job)
        drafter = run.train(target, *datasets, job, folder / name)
        assert not any(isinstance(parameter, DTensor) for parameter in drafter.parameters())
        ranks.barrier()  # rank 0 writes the folder
        kept = Drafter.from_pretrained(folder / name)
        for mine, other in ((drafter.parameters(), kept.parameters()), (drafter.buffers(), kept.buffers())):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def interrupt(target: Target, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """End a training by SIGTERM to one rank, and go on: the same weights and moments as without, bit by bit.

    The first one is ended in its first step, and the other one while it is measured after its second step.
    """

    def signalling(work):
        def signalled(*args):
            if ranks.rank() == ranks.num_ranks() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return work(*args)

        return signalled

    for name, place, work in zip(RESUMED, (TrainingLoop, heldout), ("take_step", "score_conversation"), strict=True):
        job = make_jobs(recipe, ranks.num_ranks())[name]
        datasets = run.make_datasets(target, responses[:-3], responses[-3:], job)
        try:
            with mock.patch.object(place, work, signalling(getattr(place, work))):
                run.train(target, *datasets, job, folder / f"{name}-again")
        except KeyboardInterrupt:
            step = 1 + RESUMED.index(name)
            assert (folder / f"{name}-again" / "checkpoints" / f"checkpoint-{step}").exists()
        else:
            raise AssertionError("it was not interrupted")
        run.train(target, *datasets, job, folder / f"{name}-again")
        ranks.barrier()
        last = f"checkpoints/checkpoint-{recipe.train.max_steps}"
        for file in ("model.safetensors", f"{last}/optimizer.safetensors"):
            found, expected = (load_file(folder / each / file) for each in (f"{name}-again", name))
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in found.items()), file


def is_spread(loop: TrainingLoop) -> None:
    """Check that a rank has its share of weights, gradients and moments only."""
    num_ranks = dist.get_world_size()
    model = loop.model
    assert isinstance(model, FSDPModule) and all(isinstance(layer, FSDPModule) for layer in model.layers)
    for parameter in model.parameters():
        state = loop.optimizer.state[parameter]
        for tensor in (parameter, *(value for value in state.values() if value.ndim)):
            assert isinstance(tensor, DTensor)
            assert len(tensor.to_local()) <= -(-len(tensor) // num_ranks)


def check_measuring(target: Target, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """Measure with the whole drafter of a sharded training: in bf16, where it trains in bf16."""
    datasets = run.make_datasets(target, responses[:-3], responses[-3:], recipe)
    drafter = make_drafter(target)
    weigh = make_weigh(recipe.loss, drafter.block_size)
    with mock.patch("dpace.train.loop.default_dtype", lambda device: torch.bfloat16):
        loop = TrainingLoop(drafter, target, *datasets, recipe, weigh=weigh, checkpoints=folder)
    dtypes = set()
    drafter.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    loop.state.global_step = loop.state.max_steps
    loop.measure(lambda entry: None)
    assert dtypes == {torch.bfloat16}


def train_sharded(target: Target, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """Train all jobs with shards of the drafter."""
    ended = mock.patch.object(TrainingLoop, "run", autospec=True, side_effect=TrainingLoop.run)
    with ended as trained:
        train_all(target, responses, recipe, folder, JOBS)
    assert len(trained.call_args_list) == len(JOBS)
    for call in trained.call_args_list:
        is_spread(call.args[0])
    check_measuring(target, responses, recipe, folder)
    for variable, value, message in (
        ("FSDP_VERSION", "1", "2 only"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--train.gradient-checkpointing"),
    ):
        with mock.patch.dict(os.environ, {variable: value}), pytest.raises(ValueError, match=message):
            wants_shards()


def check_target(name: str, whole: Target) -> ShardedTarget:
    """Load the shares of a target: the same features for other texts on each rank, from its share of the layers."""
    target, num_ranks, rank = Target.load(name, shard="fsdp"), dist.get_world_size(), dist.get_rank()
    kept = sum(ranks.local(parameter).numel() for parameter in target.layers.parameters())
    assert kept <= 1.02 / num_ranks * sum(parameter.numel() for parameter in whole.layers.parameters())
    assert target.sha256 == whole.sha256 and torch.equal(target.head.weight, whole.head.weight)
    text = torch.randint(4, 30, (2 + rank, 9 + 3 * rank))
    for layer_ids in ([1, 3], [1, 3, HEAD_INPUT]):
        expected = whole.features(text, layer_ids)
        torch.testing.assert_close(target.features(text, layer_ids), expected, rtol=1e-4, atol=1e-5)
    if rank:
        torch.testing.assert_close(target.features(text, [1]), whole.features(text, [1]), rtol=1e-4, atol=1e-5)
    else:
        target.join_features([1])
    return target


def train_on_shares(name: str, whole: Target, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """Train on the shares of a target, with hidden states of each step, and of an odd number of texts on disk."""
    target = check_target(name, whole)
    train_all(target, responses, recipe, folder, ["anchors", "growing"])
    dataset = run.make_datasets(whole, responses[:3], [], recipe)[0]
    for each in (target, whole):
        path = folder / type(each).__name__
        with mock.patch("dpace.batches.dataset.FEATURE_BATCH", 1):
            feature_files.keep_on_disk(each, dataset, [1, 3], TrainConfig(feature_files=str(path)))
        assert dataset.features is not None
        for i in range(len(dataset)):
            expected = whole.features(dataset.token_ids(i)[None], [1, 3])[0]
            torch.testing.assert_close(dataset.features[i], expected, rtol=1e-4, atol=1e-5)


def main(way: str, name: str, responses: list[Response], recipe: Recipe, folder: Path) -> None:
    """Do one part of the work on each rank."""
    target = Target.load(name)
    ranks.barrier()
    if way != "whole":
        os.environ |= FSDP
    if way == "drafter":
        train_sharded(target, responses, recipe, folder / way)
    elif way == "target":
        train_on_shares(name, target, responses, recipe, folder / way)
    else:
        train_all(target, responses, recipe, folder / way, RESUMED)
    if way == "resume":
        interrupt(target, responses, recipe, folder / way)
    if not ranks.rank():
        print(f"{way} on {ranks.num_ranks()} ranks: {time.process_time():.0f} seconds of a core on the first")
