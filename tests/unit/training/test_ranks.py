"""A step is the same on any number of ranks, with whole models and shares of them, and however it is accumulated."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpace.config import Recipe
from dpace.measure.results import read_log, read_results
from dpace.target import Target
from dpace.target.files import open_target, plan_distribution
from dpace.training.run import train
from dpace.training.sharding import wants_shards
from dpace.verbs import load_target
from tests.support import ranks
from tests.support.files import write_rows
from tests.support.launch import on_ranks
from tests.support.models import make_recipe

TRAIN = {"max_steps": 3, "eval_steps": 2, "logging_steps": 1, "num_anchors": 5, "warmup_ratio": 0.0}
RECIPE = make_recipe({"block_size": 8}, **TRAIN, feature_cache_gib=0.0)
CLOSE = RECIPE.train.learning_rate / 20
"""Rounding; a step moves a weight by about the learning rate, and so does what is summed wrongly."""
LAST = Path("checkpoints", "checkpoint-3", "model.safetensors")
"""Weights before they are rounded."""
on_two_and_four = pytest.mark.parametrize(
    "num_ranks", [pytest.param(2, marks=pytest.mark.wide), pytest.param(4, marks=pytest.mark.slow)]
)


@pytest.fixture(scope="module")
def responses(language_responses):
    """Conversations with 5 anchors, and every third with a single one."""
    return [
        replace(r, response_spans=[[start, start + 2] for start, _ in r.response_spans]) if i % 3 == 0 else r
        for i, r in enumerate(language_responses[:14])
    ]


def write_prompts(responses, folder):
    folder.mkdir(exist_ok=True)
    rows = ({"id": one.id, "prompt": one.messages[0]["content"]} for one in responses)
    write_rows(folder / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def on_one_rank(language_target, responses, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "one"
    write_prompts(responses, folder.parent)
    ranks.answer_all(language_target, responses, RECIPE, folder)
    ranks.train_all(language_target, responses, RECIPE, folder, RECIPE.train.batch_size)
    ranks.measure_all(language_target, responses, RECIPE, folder)
    return folder


def measured_in(folder):
    """What a comparison finds out, apart from times and from what measured it."""
    compare = read_results(folder / "compare" / "results.json")
    decoded = [
        (row.temperature, row.histogram, [one.token_ids for one in row.responses]) for row in compare.decode.rows
    ]
    return decoded, [(row.drafter, row.histogram, row.gain) for row in compare.rows]


def assert_same(one, other):
    """Losses, tau and the weights after three steps; nothing that one has may be missing in the other."""
    for mine, reference in zip(read_log(other), read_log(one), strict=True):
        assert set(mine) == set(reference)
        for key in {"loss", "grad_norm", "nll", "eval_tau"} & set(reference):
            assert mine[key] == pytest.approx(reference[key], rel=1e-4), key
    found, expected = (load_file(folder / LAST) for folder in (other, one))
    assert found.keys() == expected.keys()
    difference = max((value - expected[name]).abs().max() for name, value in found.items())
    print(other.name, difference)
    assert difference <= CLOSE


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_give_the_same(num_ranks, on_one_rank, language_folder, responses, tmp_path):
    """Uneven anchors, ranks and micro-batches without any, a last step with 3 of 8 conversations, every reduction."""
    write_prompts(responses, tmp_path)
    folder = tmp_path / "ranks"
    on_ranks(num_ranks, ranks.on_whole_models, str(language_folder), responses, RECIPE, folder)
    for name in ranks.JOBS:
        assert_same(on_one_rank / name, folder / name)
    for name in ("answers-0", "answers-1"):  # line by line in the same order
        found, expected = ((each / name / "responses.jsonl").read_bytes() for each in (folder, on_one_rank))
        assert found == expected
    assert measured_in(folder) == measured_in(on_one_rank)
    assert not list(folder.rglob("*.rank-*")) and len(list(folder.glob("features/*/*.safetensors"))) >= num_ranks


@on_two_and_four
def test_shares_of_drafter_and_target_give_the_same(num_ranks, on_one_rank, language_folder, responses, tmp_path):
    on_ranks(num_ranks, ranks.on_shares, str(language_folder), responses, RECIPE, tmp_path)
    for name in ranks.JOBS:
        assert_same(on_one_rank / name, tmp_path / name)
    for name in ranks.STOPPED:
        assert_same(on_one_rank / name, tmp_path / "of the target" / name)


@pytest.mark.wide
def test_accumulation_gives_the_same_steps(on_one_rank, language_target, responses, tmp_path):
    """Micro-batches of one conversation, some without an anchor; and reductions differ."""
    ranks.train_all(language_target, responses, RECIPE, tmp_path, 1)
    for name in ranks.JOBS:
        assert_same(on_one_rank / name, tmp_path / name)
    assert len({read_log(on_one_rank / name)[0]["loss"] for name in ranks.JOBS}) == len(ranks.JOBS)


@pytest.mark.parametrize("options", [{"selector": "lilicorr", "selector_candidates": 4}, {"selector": "markov_head"}])
def test_a_heads_step_is_the_same_however_it_is_split(options, language_target, responses, tmp_path):
    recipe = replace(RECIPE, drafter=replace(RECIPE.drafter, **options))
    for size in (8, 1):
        job = ranks.make_job(recipe, "anchors", size)
        train(language_target, *ranks.make_datasets(responses, job), job, tmp_path / str(size))
    assert_same(tmp_path / "8", tmp_path / "1")


def test_shares_that_are_not_there_are_refused(language_folder, run_line, monkeypatch):
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="spreads plain weights only"):
        open_target(str(language_folder), dtype=torch.float32, device=device, device_map="auto", shard="fsdp")
    said = run_line(f"compare --target {language_folder} --train.target-shard fsdp", 1).err
    assert "decodes, which needs the whole target" in said
    assert type(load_target(Recipe(target=str(language_folder)), shard="fsdp")) is Target  # one rank has all of it
    for name, value in {**ranks.FSDP, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert wants_shards()
    monkeypatch.setattr("dpace.system.ranks.barrier", lambda: None)
    model = AutoModelForCausalLM, AutoConfig.from_pretrained(language_folder)
    assert plan_distribution("none", *model) is None
    plan = plan_distribution("fsdp", *model)
    assert (plan.fsdp_size, plan.fsdp_plan) == (2, {"model.layers.*": "free_full_weight"})
    others = ("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING", "ACCELERATE_USE_DEEPSPEED")
    for name in others:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with pytest.raises(ValueError, match="which dpace does not have"):
                wants_shards()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not wants_shards() and plan_distribution("fsdp", *model) is None
