"""Every known fault of a drafter's folder is named by its check, and a good folder by none."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpace.batches.dataset import ResponseDataset
from dpace.doctor import LOADS, NEEDED, RUN, Trial, accept_drafts, diagnose, read_as
from dpace.drafter import load_drafter
from dpace.drafter.spec import read_folder
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import MIN_PROMPTS, Acceptance
from dpace.target import Target
from tests.support.cases import wide
from tests.support.files import change_config, changed_json, changed_weights, write_rows
from tests.support.models import (
    FAMILIES,
    make_drafter,
    make_target,
    make_tokenizer,
    make_with_candidate_selector,
    make_with_convolutions,
    make_with_markov_head,
    make_with_selector,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IDS = "dflash_config.target_layer_ids"
HEAD = "lm_head.weight"
UP = "layers.1.mlp.up_proj.weight"


def set_values(folder: Path, values: dict) -> None:
    """Other values in the config, of keys or of `group.key`; None removes one."""
    with changed_json(folder / CONFIG) as config:
        for path, value in values.items():
            *groups, key = path.split(".")
            place = config[groups[0]] if groups else config
            place[key] = value
            if value is None:
                del place[key]


@pytest.fixture
def folder(language_drafter_folder, tmp_path) -> Path:
    """A copy of a trained drafter, with its recipe and record."""
    folder = tmp_path / "a" / "b" / "drafter"
    folder.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS, "recipe.yaml"):
        shutil.copy(language_drafter_folder / name, folder)
    return folder


NAMED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    "rms_norm_eps": None,
    "rope_parameters": None,
    "is_causal": None,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "dflash_config.projector_type": "lilicorr",
    "dtype": "float16",
    "dpace.tokenizer_sha256": "0",
    "dpace.thinking": True,
}
"""Values that their own key is named for."""
CONFIGS = [
    *(({name: value}, name) for name, value in NAMED.items()),
    ({"rope_theta": 1e6, "rope_parameters.rope_theta": 1e6}, "rope_parameters, rope_theta"),
    ({"num_hidden_layers": 1, "layer_types": None}, f"layer_types, {WEIGHTS}"),
    ({"is_neox_style": False}, CONFIG),
    ({"block_size": 1}, CONFIG),
    ({"block_size": "8"}, CONFIG),
    ({"block_size": None}, "block_size"),
    ({"dflash_config": None}, f"{IDS}, dflash_config.mask_token_id"),
    ({"mask_token_id": 0, "dflash_config.mask_token_id": 0}, LOADS),
    ({"use_sliding_window": True, "sliding_window": 2048}, "sliding_window, use_sliding_window"),
    ({"hidden_size": 64}, f"hidden_size, {WEIGHTS}"),
    ({"vocab_size": 65}, f"vocab_size, {LOADS}"),
]
"""Values of the config, and the checks that name them."""


def lose_a_layer(tensors, _):
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]


TENSORS = {
    "one layer lost": (lose_a_layer, WEIGHTS),
    "one tensor in fp32": (lambda tensors, _: tensors.update({UP: tensors[UP].float()}), "dtype"),
    "another name": (lambda tensors, _: tensors.update({"encoder.fc.weight": tensors.pop("fc.weight")}), WEIGHTS),
    "a random head": (lambda tensors, _: tensors.update({HEAD: torch.randn(64, 48).bfloat16()}), "own lm_head"),
    "the target's head": (lambda tensors, target: tensors.update({HEAD: target.head.weight.bfloat16()}), ""),
}


def check_faults(folder, target, expected: str, **options) -> None:
    """These checks fail or warn, and no other; each says what was found and what to do."""
    diagnoses = list(diagnose(folder, target, **options))
    wrong = {d.check: d for d in diagnoses if d.result in ("fails", "warns")}
    assert wrong.keys() == set(filter(None, expected.split(", ")))
    assert all(d.found and d.fix for d in wrong.values())
    if NEEDED & wrong.keys():
        assert {d.check for d in diagnoses if d.result == "skipped"} >= RUN.keys() - {LOADS}


@pytest.mark.parametrize(("values", "expected"), CONFIGS, ids=str)
def test_a_fault_of_the_config_is_named_and_nothing_else(values, expected, folder, language_target):
    set_values(folder, values)
    check_faults(folder, language_target, expected)


@pytest.mark.parametrize("fault", TENSORS)
def test_a_fault_of_the_weights_is_named_and_nothing_else(fault, folder, language_target):
    make, expected = TENSORS[fault]
    with changed_weights(folder) as tensors:
        make(tensors, language_target)
    check_faults(folder, language_target, expected)


def test_a_broken_file_is_named_once_and_the_config_is_compared(folder, language_target):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:9000])
    change_config(folder, model_type="llama")
    check_faults(folder, language_target, f"{WEIGHTS}, model_type")


@pytest.mark.parametrize("family", wide(FAMILIES, "smollm2"), indirect=True)
def test_good_drafters_pass(random_target, tmp_path):
    random_target.tokenizer = make_tokenizer()
    makers = [make_drafter, make_with_convolutions, make_with_selector, make_with_candidate_selector]
    if random_target.head.softcap is None:  # DSpark's head is refused beside a cap
        makers.append(make_with_markov_head)
    for make in makers:
        make(random_target).bfloat16().save_pretrained(tmp_path)
        check_faults(tmp_path, random_target, "")


def make_chat_target(family: str) -> Target:
    return Target(make_target(family).model, make_tokenizer())


def test_scaling_of_rope_and_logits_is_compared(tmp_path):
    target = make_chat_target("llama3.1")
    make_drafter(target).save_pretrained(tmp_path)
    set_values(tmp_path, {"rope_scaling": None})
    check_faults(tmp_path, target, "rope_theta")
    target = make_chat_target("gemma2")
    make_drafter(target).save_pretrained(tmp_path)
    set_values(tmp_path, {"final_logit_softcapping": None, "input_embedding_scale": None})
    check_faults(tmp_path, target, "final_logit_softcapping, input_embedding_scale", engine="sglang")


def make_trial(folder, target, responses) -> Trial:
    return Trial(target, folder, read_folder(folder)[0], responses)


@pytest.fixture
def judge(folder, language_target):
    """What is said of the accepted length on responses."""
    return lambda responses, target=language_target: accept_drafts(make_trial(folder, target, responses))[0]


def test_what_no_file_shows_is_found_by_the_accepted_length(judge, folder, language_responses):
    """Another target of the same shape, and weights of no training."""
    recorded, others = language_responses[50:], language_responses[:20]  # which are not among the recorded ones
    assert judge(recorded) == judge(others) == "passes"
    assert judge(recorded, make_chat_target("qwen3")) == "fails"
    with changed_weights(folder) as tensors:
        tensors["fc.weight"] = torch.randn_like(tensors["fc.weight"]) * 0.02
    assert judge(recorded) == judge(others) == "fails"


def test_without_the_recipe_tau_must_reach_the_recorded_interval(judge, folder, language_responses):
    """With it, and on the same responses, it must be the same within 1 %."""
    recorded = language_responses[50:]
    tau = read_folder(folder)[0].record["tau"]
    set_values(folder, {"dpace.tau": tau * 1.02})
    assert (judge(recorded), judge(recorded[:-1])) == ("fails", "passes")
    set_values(folder, {"dpace.tau": tau * 0.98})
    assert judge(recorded) == "fails"
    (folder / "recipe.yaml").unlink()
    assert judge(recorded) == "passes"


def test_a_check_is_told_before_later_ones_are_made(folder, language_target, monkeypatch):
    monkeypatch.setattr("dpace.doctor.load_drafter", lambda *_: pytest.fail("this takes longer"))
    assert any(done.check == "engine: gguf" for done in diagnose(folder, language_target, engine="gguf"))


def test_another_target_than_the_recorded_one_is_named(folder, language_folder):
    target = Target.load(str(language_folder))
    for name, expected in ((target.short_name, ""), ("SmolLM2-135M", "dpace.target")):
        set_values(folder, {"dpace.target": name})
        check_faults(folder, target, expected)


# --- ways of reading a drafter ----------------------------------------------------------------------------------------

WAYS = {
    "sample_from_anchor": (lambda drafter: drafter.first_slot == 0, False, True),
    "is_causal": (lambda drafter: all(reach.is_causal for reach in drafter.reaches.values()), False, True),
    "target_layer_ids": (lambda drafter: tuple(drafter.target_layer_ids), (1, 3), (2, 4)),
}
"""How a drafter is read, what its config says, and another way."""


@pytest.fixture
def accept(monkeypatch):
    """Let so many tokens be accepted in one way of reading a drafter, and so many in others."""

    def patch(key, value, right=-1, wrong=0):
        def measure(drafter, _, answers, **__):
            rows = np.zeros((len(answers), drafter.block_size), int)
            rows[:, 1] = 9 * (wrong > 0)
            rows[:, right if WAYS[key][0](drafter) == value else wrong] += 1
            return Acceptance(rows, drafter.block_size)

        monkeypatch.setattr("dpace.doctor.heldout_acceptance", measure)

    return patch


@pytest.fixture
def random_trial(random_drafter_folder, language_target, language_responses):
    """Of so many answers."""
    return lambda num_answers: make_trial(random_drafter_folder, language_target, language_responses[:num_answers])


@pytest.mark.parametrize("key", WAYS)
@pytest.mark.parametrize(
    ("better", "num_answers", "result"), [(2, 20, "fails"), (2, MIN_PROMPTS - 1, "skipped"), (1, 20, "passes")]
)
def test_the_better_way_is_named(key, better, num_answers, result, random_trial, accept):
    """With the answers that are needed."""
    accept(key, WAYS[key][better])
    found = RUN[f"measured {key}"](random_trial(num_answers))
    assert found[0] == result
    if result == "fails":
        assert "tau 1.00 as the config says" in found[1] and f'"{key}": {found[2]}' in found[3]
    if result == "skipped":
        assert f"cannot be told apart on {num_answers} answers" in found[1]


@pytest.mark.parametrize(
    ("key", "tau", "result"),
    [
        ("sample_from_anchor", None, "skipped"),
        ("is_causal", None, "fails"),
        ("is_causal", 2.1, "fails"),
        ("is_causal", 2.0, "passes"),
    ],
)
def test_a_small_gain_names_a_wrong_mask_where_tau_is_not_the_recorded_one(
    key, tau, result, folder, language_target, language_responses, accept
):
    """And no shifted slots: a drafter that has learned little gains a little by a shift; a wrong mask costs little."""
    accept(key, True, right=2, wrong=1)  # tau 2.1 for 2
    responses = language_responses[:20]
    record = {"dtype": "float32", "tau": tau, "tau_interval": [1.9, 2.1], "tau_responses": [r.id for r in responses]}
    set_values(folder, {"dpace": record if tau else None})
    assert RUN[f"measured {key}"](make_trial(folder, language_target, responses))[0] == result


@pytest.mark.parametrize(("value", "result"), [(False, "passes"), (None, "warns")])
def test_without_a_record_drafts_must_be_of_use(value, result, random_trial, accept):
    accept("is_causal", value)
    found = accept_drafts(random_trial(6))
    assert found[:3] == (result, "tau 4.000") if result == "passes" else (result, "tau 1.000", "1.1 or more")


def test_a_head_has_one_slot_only(language_target, language_responses, tmp_path):
    make_with_selector(language_target).save_pretrained(tmp_path)
    trial = make_trial(tmp_path, language_target, language_responses)
    assert "one way only" in RUN["measured sample_from_anchor"](trial)[1]


@pytest.mark.parametrize("key", WAYS)
def test_a_way_is_measured_as_if_the_config_said_so(key, folder, language_target, language_responses):
    trial = make_trial(folder, language_target, language_responses[:6])
    other = trial.measure(trial.cut(trial.responses), **{key: WAYS[key][2]}).rows
    data = ResponseDataset(trial.responses, max_length=10**9, num_anchors=None, seed=0)

    def measured():
        return heldout_acceptance(load_drafter(folder, language_target), language_target, data).rows

    assert (trial.acceptance.rows == measured()).all(), "it is left as it was"
    change_config(folder, **{key: WAYS[key][2]})
    assert (other == measured()).all()


def test_layers_of_two_kinds_are_read_as_before(language_target):
    drafter = make_drafter(language_target, sliding_window=9, full_layers=[1])
    for value, expected in ((True, [True, True]), ("sliding", [True, False]), (False, [False, False])):
        read_as(drafter, replace(drafter.spec, is_causal=value))
        assert [layer.self_attn.is_causal for layer in drafter.layers] == expected


# --- the verb -------------------------------------------------------------------------------------------


def test_the_verb_passes_a_trained_drafter(folder, language_folder, language_responses, run_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # texts in one line
    responses = folder.parents[1] / "responses.jsonl"
    write_rows(responses, map(asdict, language_responses[44:]))  # those that tau was measured on, and some more
    command = f"doctor {folder} --target {language_folder}"
    printed = run_line(f"{command} --engine vllm")
    parts = '"num_speculative_tokens": 5', "next: dpace check", "on the responses of the training"
    assert all(text in printed.out for text in (*RUN, *parts))
    assert "measuring tau: 1 of " in printed.err
    assert "fails" not in printed.out.lower() and "warns" not in printed.out
    change_config(folder, is_causal=True)
    printed = run_line(f"{command} --responses {responses.rename(folder.parent / 'mine.jsonl')}", 1)
    assert "FAILS" in printed.out and "failed: accepted length, measured is_causal" in printed.err
