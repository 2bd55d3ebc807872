"""A training that starts from a trained drafter, in any layout, has its weights, its size and its mask token."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from dpace.config import DrafterConfig, Recipe
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import DraftVocabulary, load_vocabulary
from dpace.measure.results import read_log
from dpace.recipes.flags import Arguments, parse
from dpace.system.provenance import fingerprint
from dpace.training.initial import start_from
from dpace.training.run import make_datasets, train
from tests.support.files import read_json
from tests.support.models import (
    make_drafter,
    make_recipe,
    make_target,
    make_with_candidate_selector,
    make_with_convolutions,
    make_with_markov_head,
    make_with_selector,
)

FEW_STEPS = make_recipe(max_steps=2, eval_steps=1, logging_steps=1)


@pytest.fixture
def start(language_drafter_folder, language_folder):
    """The recipe and the drafter of a start, by default from the trained one."""

    def run(init=language_drafter_folder, given=(), **options):
        drafter = DrafterConfig(init=str(init), **options)
        return start_from(replace(FEW_STEPS, target=str(language_folder), drafter=drafter), given)

    return run


def test_another_layout_gives_the_same_start(
    start, do_export, language_target, language_drafter_folder, language_drafter
):
    recipe, init = start(do_export("speculators", folder=language_drafter_folder))
    shape = recipe.drafter
    assert (shape.num_layers, shape.block_size, shape.num_features, shape.norm_scale) == (2, 6, 2, 1.0)
    assert list(shape.target_layer_ids) == language_drafter.target_layer_ids
    assert shape.mask_token_id == language_drafter.mask_token_id
    assert fingerprint(init.float().start_for(language_target)) == fingerprint(language_drafter)


def test_training_goes_on_where_the_drafter_stood_and_says_so(
    start, language_target, language_drafter_folder, language_drafter, language_responses, tmp_path
):
    recipe, init = start()
    datasets = make_datasets(language_target, language_responses[:40], language_responses[50:], recipe)
    train(language_target, *datasets, recipe, tmp_path, init=init)
    trained = next(entry["eval_tau"] for entry in read_log(tmp_path) if "eval_tau" in entry)
    assert trained > 0.8 * language_drafter.config.dpace["tau"] > 1.5
    provenance = read_json(tmp_path / "provenance.json")
    assert provenance["init"] == str(language_drafter_folder) and provenance["init_sha256"] == fingerprint(init)
    with pytest.raises(ValueError, match="other weights to start from"):
        train(language_target, *datasets, recipe, tmp_path, init=make_drafter(language_target))


@pytest.mark.parametrize("is_known", [True, False])
def test_what_the_drafter_drafted_before_is_drafted_too(is_known, start, language_target, language_responses, tmp_path):
    """Where that is not known, it may have learned any token, and all are drafted."""
    recipe, init = start()
    before = init.vocabulary.token_ids
    unseen = sorted({*range(64)} - {*before.tolist()})[0]
    init.vocabulary = DraftVocabulary([unseen]) if is_known else None
    datasets = make_datasets(language_target, language_responses[:40], language_responses[50:], recipe)
    train(language_target, *datasets, recipe, tmp_path, init=init)
    written = load_vocabulary(tmp_path, 64)
    if is_known:
        assert {unseen} < {*written.token_ids.tolist()} <= {unseen, *before.tolist()}
    else:
        assert written is None


@pytest.mark.parametrize(
    "option, value, own",
    [("num_features", 3, 2), ("selector_width", 24, None)],
)
def test_an_option_that_contradicts_is_refused_with_both_values(option, value, own, start):
    """Where the user set it; how an untrained drafter would begin contradicts nothing."""
    flag = f"--drafter.{option.replace('_', '-')}"
    with pytest.raises(ValueError, match=rf"{flag} is {value}, but .* has {own}; leave {flag} out"):
        start(given={f"drafter.{option}"}, **{option: value})
    assert start(given={"drafter.intermediate_size"}, intermediate_size="auto")[0].drafter.intermediate_size == 64
    assert start(given={"drafter.norm_scale"}, norm_scale=0.18, **{option: value})[0].drafter.norm_scale == 1.0


def test_the_drafter_to_start_from_gets_other_blocks_where_no_weight_depends_on_them(start, language_target, tmp_path):
    asked = {"drafter.block_size"}
    recipe, init = start(given=asked, block_size=4)
    started = init.start_for(language_target)
    assert recipe.drafter.block_size == started.block_size == 4 and fingerprint(started) == fingerprint(init.float())
    assert start(block_size=4)[0].drafter.block_size == 6  # not asked for: a default
    make_with_selector(language_target).save_pretrained(tmp_path)  # LiLiCorr has weights for each slot
    with pytest.raises(ValueError, match=r"--drafter.block-size is 9, but .* has 4; leave --drafter.block-size out"):
        start(tmp_path, asked, block_size=9)


def test_a_recipe_is_causal_where_all_layers_are(start, language_target, tmp_path):
    """Not where the sliding ones alone are, which no option says."""
    windows = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 8}
    for is_causal in (True, "sliding", False):
        spec = replace(make_drafter(language_target).spec, is_causal=is_causal, **windows)
        Drafter(spec.config()).save_pretrained(tmp_path)
        assert start(tmp_path)[0].drafter.causal is (is_causal is True)


def test_recipes_and_flags_name_what_they_set(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("drafter:\n  block_size: 16\nthinking: true\n")
    _, given = parse(Arguments(Recipe), "train", [str(path), "--max-steps=3", "--drafter.num-layers", "2"])
    assert given.names == {"drafter.block_size", "thinking", "train.max_steps", "drafter.num_layers"}


def test_a_drafter_for_another_target_or_without_its_init_is_refused(
    start, language_target, language_responses, tmp_path
):
    recipe, init = start()
    with pytest.raises(ValueError, match="trained for another target"):
        init.start_for(make_target("qwen3", hidden_size=64))
    datasets = make_datasets(language_target, language_responses[:8], [], recipe)
    with pytest.raises(ValueError, match="dpace.training.initial.start_from"):
        train(language_target, *datasets, recipe, tmp_path)


def test_more_tokens_in_the_target_do_not_matter():
    """Fine-tuning often adds some; only selectors may have tables of their own, which then have more rows.

    The new ones are the same for a seed, whatever was drawn before.
    """
    for make in (make_with_convolutions, make_with_markov_head, make_with_candidate_selector):
        drafter = make(make_target("qwen3")).bfloat16()
        drafter.config.dpace = {"tau": 2.0}
        start = drafter.start_for(make_target("qwen3", vocab_size=72))
        assert start.spec.vocab_size == 72 and start.dtype == torch.float32 and not start.spec.record
    table = start.candidate_selector.successor_codebook
    assert torch.equal(table[:64], drafter.candidate_selector.successor_codebook.float()) and not table[64:].any()
    torch.manual_seed(7)
    again, other = (drafter.start_for(make_target("qwen3", vocab_size=72), seed=seed) for seed in (0, 1))
    before, same, different = (each.candidate_selector.predecessor_codebook[64:] for each in (start, again, other))
    assert torch.equal(before, same) and not torch.equal(before, different)


def test_verbs_take_drafters_of_the_hub(language_folder, language_drafter_folder, run_line, tmp_path, monkeypatch):
    def download(name, allow_patterns, local_files_only):
        assert local_files_only == is_silent and look_up.call_args == mock.call(name, timeout=10)
        if name == "someone/drafter":
            return str(language_drafter_folder)
        raise OSError("no such repository")

    is_silent = False
    look_up = mock.Mock()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", look_up)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert "written: imported\n" in run_line("import someone/drafter --output imported").out
    imported, trained = map(Drafter.from_pretrained, ("imported", language_drafter_folder))
    assert fingerprint(imported) == fingerprint(trained)
    line = f"generate --target {language_folder} --prompt w3 --max-new-tokens 4"
    assert f"next: dpace respond --target {language_folder} --prompts.path" in run_line(line).err
    for drafter, reason in {"other": "is no folder, and the Hub does not", "drafter/x": "is missing"}.items():
        assert f"--drafter someone/{drafter} {reason}" in run_line(f"{line} --drafter someone/{drafter}", 1).err
    look_up.side_effect = ConnectionError
    is_silent = True
    run_line("import someone/drafter --output again")  # the cache has it
