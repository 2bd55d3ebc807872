import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dpace
from dpace.config import PromptsConfig, Recipe
from dpace.recipes import RECIPES
from dpace.recipes.flags import Arguments, command, parse
from dpace.recipes.recipe_file import read_recipe
from dpace.verbs import PROMPT, generate_command
from dpace.verbs.generate import GenerateConfig

OF_RECIPES = Arguments(Recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_parse_and_are_found_by_name(name, run_line):
    recipe = read_recipe(RECIPES[name])
    assert recipe != Recipe()
    assert parse(OF_RECIPES, "train", [name])[0] == recipe
    _, given = parse(OF_RECIPES, "train", [name, "--seed", "7"])
    assert given.words == [name, "--train.seed", "7"]
    assert name in run_line("--help").out


def test_exit_codes_of_usage(run_line):
    usage = run_line("--help").out
    assert usage.startswith("usage: dpace") and max(map(len, usage.splitlines())) <= 80
    assert run_line("--version").out == f"dpace {dpace.__version__}\n"
    assert run_line("", 2).err == usage
    assert run_line("fly", 2).err == "unknown verb 'fly'; `dpace --help` lists the verbs\n"
    assert run_line("trian", 2).err == "unknown verb 'trian'; did you mean train? `dpace --help` lists the verbs\n"
    for name in ("nosuch", "nosuch.yaml"):
        assert f"no recipe named {name!r}; name a YAML file" in run_line(f"train {name}", 2).err
    assert run_line("--completion zsh", 2).err == "unknown verb '--completion'; `dpace --help` lists the verbs\n"


def test_what_may_stand_first_may_stand_last():
    reads = Arguments(GenerateConfig, first="prompt")
    for before in ([], ["--top-k", "3"], ["--top-k=3"]):
        for args in (["a b", "--target", "t", *before], ["--target", "t", *before, "a b"]):
            assert parse(reads, "generate", args)[0].prompt == "a b"
    assert parse(reads, "generate", ["--prompt", "a", "--target", "t"])[0].target == "t"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({}, "demo#notes/heldout/1"),
        ({"path": "mine.jsonl"}, "mine.jsonl#notes/heldout/1"),
        ({"path": "a.jsonl", "heldout_path": "b.jsonl"}, "b.jsonl#notes/heldout/1"),
        ({"path": "a.parquet"}, PROMPT),
    ],
)
def test_the_next_command_has_a_held_out_prompt(prompts, expected):
    recipe = Recipe(prompts=PromptsConfig(**prompts))
    prompt_id = "notes/heldout/1"
    assert shlex.split(generate_command(recipe, "d", prompt_id))[-1] == expected


def test_a_tilde_is_a_folder():
    assert parse(OF_RECIPES, "train", ["--output=~/x"])[0].output == str(Path.home() / "x")


def test_the_next_verb_is_told_the_same_settings(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("output: my out\ntrain:\n  max_steps: 5\nthinking: true\nprompts:\n  limit: 3\n")
    runs = (
        ("bench", []),
        ("bench", ["--sets", "gsm8k", "alpaca", "--widths", "full", "3"]),
        ("respond", [str(path), "--batch-size", "4", "--no-thinking", "--prompts.limit", "None"]),
        ("train", [str(path), "--seed", "1", "--output", "other"]),
    )
    for verb, args in runs:
        recipe, given = parse(OF_RECIPES, verb, args)
        _, following, *rest = shlex.split(command("train", *given.words))
        assert following == "train" and parse(OF_RECIPES, following, rest)[0] == recipe
    args = ["--output", "a b", "--max-steps=9", "--no-torch-compile"]
    expected = "dpace bench --output 'a b' --train.max-steps=9 --train.no-torch-compile"
    assert command("bench", *parse(OF_RECIPES, "train", args)[1].words) == expected


def test_help_and_refusals_import_no_torch_and_no_bar_of_a_library_is_drawn():
    """They come at once; transformers draws a bar for the tensors of a GGUF file with tqdm itself."""
    lines = [["--help"], ["respond", "--help"], ["train", "--train.seed", "-1"]]
    code = f"""import contextlib, sys, dpace.cli
for args in {lines}:
    with contextlib.suppress(SystemExit):
        dpace.cli.main(args)
assert not {{"torch", "transformers"}} & sys.modules.keys()
from tqdm.auto import tqdm
list(tqdm("abc"))"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    (refusal,) = done.stderr.splitlines()
    assert refusal.startswith("dpace train: --train.seed is -1")
