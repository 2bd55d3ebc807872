"""The real target with a drafter that has seen a little of it, for the slow tests with engines."""

from pathlib import Path
from typing import NamedTuple

import pytest

from dpace.config import DrafterConfig, Recipe, RespondConfig, TrainConfig
from dpace.decode.generation import Generation
from dpace.drafter import load_drafter
from dpace.metrics import Acceptance
from dpace.prompts.prompts import Prompt, demo_path, read_prompts
from dpace.respond.answering import write_responses
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import TARGET_ID, find_target
from dpace.training.run import make_datasets, train
from tests.support.models import decode_whole

MAX_NEW_TOKENS = 48


class RealPair(NamedTuple):
    """A target and its drafter, and what our own decoding makes of some prompts."""

    target: Target
    drafter_folder: Path
    prompts: list[Prompt]
    ours: list[Generation]


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory) -> RealPair:
    """Trained until it accepts more than nothing and less than everything."""
    folder = tmp_path_factory.mktemp("real")
    target = Target.load(find_target(TARGET_ID))
    prompts = read_prompts(demo_path("train"))[:3]
    settings = RespondConfig(max_new_tokens=MAX_NEW_TOKENS)
    responses = write_responses(target, prompts, folder / "responses.jsonl", settings)
    recipe = Recipe(
        drafter=DrafterConfig(num_layers=2, num_features=3, block_size=8, norm_scale=0.18),
        train=TrainConfig(learning_rate=2e-3, max_steps=60, batch_size=3, num_anchors=32, max_length=512),
    )
    train(target, *make_datasets(target, responses, [], recipe), recipe, folder / "drafter")
    drafter = load_drafter(folder / "drafter", target)
    encoded = [encode_chat(target, prompt.turns[0]) for prompt in prompts]
    ours = decode_whole(target, drafter, encoded, max_new_tokens=MAX_NEW_TOKENS)
    assert 1.3 < Acceptance.pooled([out.acceptance for out in ours]).tau < 4
    return RealPair(target, folder / "drafter", prompts, ours)
