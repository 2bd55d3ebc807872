"""The drafters that come with dpace: found by name, whole, and as their cards say."""

import re

import pytest

from dpace.config import DrafterConfig
from dpace.decode import generate, generate_plain
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import fit
from dpace.drafter.spec import read_folder
from dpace.prompts.prompts import demo_path, read_prompts
from dpace.recipes.recipe_file import read_recipe
from dpace.studies.demo import KINDS
from dpace.system.provenance import hash_file
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import DRAFTERS, TARGET_ID

by_name = pytest.mark.parametrize("name", DRAFTERS)


@by_name
def test_it_is_found_by_name_and_refuses_another_target(name, language_folder, run_line):
    assert Drafter.from_pretrained(name).num_parameters() < 10e6
    ask = f"generate --target {language_folder} --prompt w1 --drafter"
    assert "the drafter's hidden_size is 576 and the target" in run_line(f"{ask} {name}", 1).err
    assert f"or a drafter of dpace: {name}" in run_line(f"{ask} smollm", 1).err


@by_name
def test_its_card_has_the_hash_of_its_weights(name):
    folder = DRAFTERS[name]
    (found,) = re.findall(r"model\.safetensors, sha256 \| `(\w+)`", (folder / "README.md").read_text())
    assert found == hash_file(folder / "model.safetensors")


@by_name
def test_its_recipe_is_one_of_today(name):
    recipe = read_recipe(DRAFTERS[name] / "recipe.yaml")
    assert (recipe.target, recipe.loss.objective) == (TARGET_ID, "dpace")
    spec, _ = read_folder(DRAFTERS[name])
    assert len(spec.record["reach_rate"]) == spec.num_draft_tokens  # which its exports' cards go by


@pytest.mark.slow
@by_name
def test_it_keeps_the_text_of_its_target(name):
    target = Target.load(TARGET_ID)
    auto = fit(DrafterConfig(norm_scale="auto", intermediate_size="auto"), target)
    assert (auto.norm_scale, auto.intermediate_size) == (0.18, 768), "what the recipes had as numbers"
    drafter = load_drafter(DRAFTERS[name], target)
    for prompt in read_prompts(demo_path(KINDS))[::5]:
        token_ids = encode_chat(target, prompt.turns[0])
        drafted = generate(target, drafter, token_ids, max_new_tokens=48, width="full")
        assert drafted.token_ids == generate_plain(target, token_ids, max_new_tokens=48).token_ids
        assert drafted.acceptance.tau > 1.3
