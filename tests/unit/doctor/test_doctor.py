"""Every known fault of a drafter's folder is named by its check, and a good folder by none."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dpace.decode.loop
from dpace.batches.dataset import ResponseDataset
from dpace.cli import main
from dpace.doctor.checks import COMPARED
from dpace.doctor.doctor import RUN, Trial, accept_drafts, diagnose, read_as
from dpace.drafter import load_drafter
from dpace.engines.folder import read_files
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import MIN_PROMPTS, Acceptance
from dpace.target import Target
from tests.conftest import FAMILIES, make_drafter, make_target, make_tokenizer, make_with_convolutions, make_with_head
from tests.support.cases import wide
from tests.support.files import change_config, changed_json, changed_weights, write_rows

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IDS = "dflash_config.target_layer_ids"
Q = "layers.0.self_attn.q_proj.weight"
UP = "layers.1.mlp.up_proj.weight"


def named(folder, target, **options) -> set[str]:
    return {d.check for d in diagnose(folder, target, **options) if d.result in ("fails", "warns")}


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    monkeypatch.setattr("dpace.doctor.doctor.MAX_NEW_TOKENS", 6)


def set_values(folder: Path, values: dict) -> None:
    """Other values in the config, of keys or of `group.key`; None removes one."""
    with changed_json(folder / CONFIG) as config:
        for path, value in values.items():
            *groups, key = path.split(".")
            place = config[groups[0]] if groups else config
            place[key] = value
            if value is None:
                del place[key]


def both(key, value):
    """Another value in both places."""
    return {key: value, f"dflash_config.{key}": value}


@pytest.fixture
def folder(language_drafter_folder, tmp_path) -> Path:
    """A copy of a trained drafter, with its recipe and record."""
    (tmp_path / "a" / "b" / "drafter").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS, "recipe.yaml"):
        shutil.copy(language_drafter_folder / name, tmp_path / "a" / "b" / "drafter" / name)
    return tmp_path / "a" / "b" / "drafter"


NAMED = [
    ("architectures", ["Qwen3ForCausalLM"]),
    ("model_type", "llama"),
    ("tie_word_embeddings", True),
    ("rms_norm_eps", None),
    ("rope_parameters", None),
    ("rope_theta", None),
    ("rope_interleaved", True),
    ("partial_rotary_factor", 0.5),
    ("block_size", 5),
    ("block_size", None),
    ("is_causal", True),
    ("is_causal", None),
    ("layer_types", None),
    ("final_logit_softcapping", 30.0),
    ("input_embedding_scale", 6.9),
    ("output_multiplier", 0.5),
    ("dflash_config.projector_type", "lilicorr"),
    ("dtype", "float16"),
    ("dpace.tokenizer_sha256", "0"),
    ("dpace.chat_template_sha256", "0"),
    ("dpace.thinking", True),
    ("dpace.dtype", "bfloat16"),
]
"""Values that their own key is named for."""
CONFIGS = [
    *(({name: value}, name) for name, value in NAMED),
    ({"rope_theta": 1e6, "rope_parameters.rope_theta": 1e6}, "rope_parameters, rope_theta"),
    ({"rope_theta": 500000.0}, CONFIG),
    ({"rope_parameters.partial_rotary_factor": 0.5}, "rope_parameters"),
    ({"num_hidden_layers": 1, "layer_types": None}, f"num_hidden_layers, layer_types, {WEIGHTS}"),
    ({"head_dim": None}, CONFIG),
    ({"block_size": 1}, "block_size, loads"),
    ({"dflash_config.block_size": 7}, CONFIG),
    ({"dflash_config.causal": True}, CONFIG),
    ({"dflash_config": None}, f"{IDS}, dflash_config.mask_token_id"),
    ({"target_layer_ids": [1, 2]}, CONFIG),
    (both("target_layer_ids", [1, 5]), f"{IDS}, loads"),
    (both("target_layer_ids", [1.0, 3.0]), CONFIG),
    (both("target_layer_ids", [2, 4]), IDS),
    (both("target_layer_ids", [1, 2, 3]), f"{IDS}, {WEIGHTS}"),
    (both("mask_token_id", 0), "loads"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, CONFIG),
    ({"use_sliding_window": True, "sliding_window": 2048}, "sliding_window, use_sliding_window"),
    ({"hidden_size": 64}, f"hidden_size, {WEIGHTS}"),
    ({"vocab_size": 65}, "vocab_size, loads"),
    ({"num_target_layers": 7}, "num_target_layers, loads"),
]
"""Values of the config, and the checks that name them."""


def tensor(name, make):
    """Another tensor of that name, made from the old one."""

    def change(tensors):
        tensors[name] = make(tensors.get(name))

    return change


def lose_a_layer(tensors):
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]


def prefix(tensors):
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


TENSORS = {
    "one layer lost": (lose_a_layer, WEIGHTS),
    "one tensor in fp32": (tensor(UP, lambda old: old.float()), "dtype"),
    "names with a prefix": (prefix, WEIGHTS),
    "a tensor too many": (tensor("mask_hidden", lambda _: torch.ones(48).bfloat16()), WEIGHTS),
    "a random head": (tensor("lm_head.weight", lambda _: torch.randn(64, 48).bfloat16()), "own lm_head"),
    "a matrix turned": (tensor(UP, lambda old: old.T), WEIGHTS),
    "a NaN": (tensor("layers.0.self_attn.q_norm.weight", lambda old: old * float("nan")), WEIGHTS),
}


def check_faults(folder, target, expected: str) -> None:
    """These checks fail or warn, and no other; each says what was found and what to do."""
    diagnoses = diagnose(folder, target)
    wrong = {d.check: d for d in diagnoses if d.result in ("fails", "warns")}
    assert wrong.keys() == set(expected.split(", "))
    assert all(d.found and d.fix for d in wrong.values())
    if {CONFIG, WEIGHTS, "loads"} & wrong.keys():
        assert {d.check for d in diagnoses if d.result == "skipped"} >= RUN.keys() - {"loads"}


@pytest.mark.parametrize(("values", "expected"), CONFIGS, ids=[str(values) for values, _ in CONFIGS])
def test_a_fault_of_the_config_is_named_and_nothing_else(values, expected, folder, language_target):
    set_values(folder, values)
    check_faults(folder, language_target, expected)


@pytest.mark.parametrize("fault", TENSORS)
def test_a_fault_of_the_weights_is_named_and_nothing_else(fault, folder, language_target):
    change, expected = TENSORS[fault]
    with changed_weights(folder) as tensors:
        change(tensors)
    check_faults(folder, language_target, expected)


def test_convolutions_of_another_size_are_a_fault_of_the_weights(language_target, tmp_path):
    make_with_convolutions(language_target).save_pretrained(tmp_path)
    assert named(change_config(tmp_path, conv_kernel_size=3), language_target) == {WEIGHTS}


def test_a_text_for_a_number_is_called_so(folder, language_target):
    set_values(folder, {"block_size": "8"})
    (found,) = [d.found for d in diagnose(folder, language_target) if d.check == CONFIG]
    assert found == "block_size is the text '8': it should be a valid integer"


@pytest.mark.parametrize(("more", "result"), [({}, "fails"), ({"dflash_config.block_size": 6}, "warns")])
def test_a_block_size_is_needed_in_one_place(more, result, folder, language_target):
    """Where none is, engines refuse the folder or take 16; where it is in one place, some look in the other."""
    set_values(folder, {"block_size": None} | more)
    assert [d.result for d in diagnose(folder, language_target) if d.check == "block_size"] == [result]


@pytest.mark.parametrize("has_recipe", [True, False])
def test_windows_are_those_of_the_recipe_or_of_the_config(has_recipe, folder, language_target):
    windows = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": True}
    set_values(folder, {**windows, "is_causal": True})
    path = folder / "recipe.yaml"
    if has_recipe:
        assert named(folder, language_target) == {*windows, "is_causal"}
        options = "sliding_window: 8\n  full_layers: []\n  causal: true"
        path.write_text(re.sub(r"sliding_window: null\n  full_layers: .*\n  causal: false", options, path.read_text()))
    else:
        path.unlink()
    assert not named(folder, language_target)
    set_values(folder, {"use_sliding_window": False, "is_causal": None})
    assert named(folder, language_target) == {"use_sliding_window", "is_causal"}


def cut(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:9000])


FILE_FAULTS = {
    "config gone": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "config cut": (lambda folder: (folder / CONFIG).write_text('{"block_size": 6,'), CONFIG),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]"), CONFIG),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "weights cut": (cut, WEIGHTS),
    "recipe cut": (lambda folder: (folder / "recipe.yaml").write_text("drafter: ["), "recipe.yaml"),
    "a recipe of no drafter": (
        lambda folder: (folder / "recipe.yaml").write_text("drafter: {num_layers: 1000000000000}"),
        "recipe.yaml",
    ),
    "a mask embedding": (lambda folder: (folder / "mask_embedding.pt").touch(), "loads"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_broken_file_is_named_once_and_the_rest_is_examined(fault, folder, language_target):
    change, expected = FILE_FAULTS[fault]
    change(folder)
    assert named(folder, language_target) == {expected}
    (folder / "recipe.yaml").write_text("[]")
    assert named(folder, language_target) == {expected, "recipe.yaml"}
    if expected != CONFIG:
        change_config(folder, model_type="llama")
        assert named(folder, language_target) == {expected, "recipe.yaml", "model_type"}


@pytest.mark.parametrize("family", wide(FAMILIES, "smollm2"), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_good_drafters_pass(random_target, dtype, tmp_path):
    random_target.tokenizer = make_tokenizer()
    for make in (make_drafter, make_with_convolutions, make_with_head):
        make(random_target).to(dtype).save_pretrained(tmp_path)
        assert not named(tmp_path, random_target)


def test_scaling_of_rope_and_logits_is_compared(tmp_path):
    target = make_target("llama3.1")
    target.tokenizer = make_tokenizer()
    make_drafter(target).save_pretrained(tmp_path)

    set_values(tmp_path, {"rope_scaling": None})
    assert named(tmp_path, target) == {"rope_theta"}
    set_values(tmp_path, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})
    assert named(tmp_path, target) == {"rope_parameters", "rope_theta"}
    target = make_target("gemma2")
    target.tokenizer = make_tokenizer()
    make_drafter(target).save_pretrained(tmp_path)
    assert named(tmp_path, target, engine="vllm") == {"engine: vllm"}
    scales = {"final_logit_softcapping": None, "input_embedding_scale": None}
    set_values(tmp_path, scales)
    assert named(tmp_path, target) == scales.keys()


def test_an_embedding_of_the_targets_own_does_no_harm(folder, language_target):
    with changed_weights(folder) as tensors:
        tensors["lm_head.weight"] = language_target.head.weight.bfloat16()
    assert not named(folder, language_target)


def llama_rows(old):
    """The order of rows that GGUF files of Llama have."""
    return old.view(4, 2, -1, 48).transpose(1, 2).reshape(old.shape)


def untrain(tensors):
    tensors["fc.weight"] = torch.randn_like(tensors["fc.weight"]) * 0.02


SILENT_FAULTS = {
    "columns of fc permuted": tensor("fc.weight", lambda old: old.roll(48, 1)),
    "rows of q in the order of GGUF": tensor(Q, llama_rows),
    "fc of an untrained drafter": untrain,
}


def accepted_length(folder, target, responses):
    return accept_drafts("accepted length", Trial(target, read_files(folder), responses)).result


@pytest.mark.parametrize("fault", SILENT_FAULTS)
def test_what_no_file_shows_is_found_by_the_accepted_length(fault, folder, language_target, language_responses):
    with changed_weights(folder) as tensors:
        SILENT_FAULTS[fault](tensors)
    assert accepted_length(folder, language_target, language_responses[50:]) == "fails"


def test_on_other_responses_or_in_fp16_tau_must_reach_the_interval(folder, language_target, language_responses):
    others = language_responses[:20]  # trained on, and not among the recorded ones
    assert accepted_length(folder, language_target, others) == "passes"
    change_config(folder, dtype="float16")
    with changed_weights(folder) as tensors:
        tensors.update({name: old.half() for name, old in tensors.items()})
    assert accepted_length(folder, language_target, language_responses[50:]) == "passes"
    with changed_weights(folder) as tensors:
        untrain(tensors)
    assert accepted_length(folder, language_target, language_responses[50:]) == "fails"
    assert accepted_length(folder, language_target, others) == "fails"


def test_another_target_than_the_recorded_one_is_named(folder, language_folder):
    target = Target.load(str(language_folder))
    set_values(folder, {"dpace.target": target.short_name})
    assert not named(folder, target)
    set_values(folder, {"dpace.target": "SmolLM2-135M"})
    assert named(folder, target) == {"dpace.target"}


def test_another_target_of_the_same_shape_is_found(folder, language_responses):
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    assert accepted_length(folder, target, language_responses[50:]) == "fails"


# --- ways of reading a drafter ----------------------------------------------------------------------------------------

WAYS = {
    "sample_from_anchor": lambda drafter: drafter.first_slot == 0,
    "is_causal": lambda drafter: all(reach.is_causal for reach in drafter.reaches.values()),
    "target_layer_ids": lambda drafter: drafter.target_layer_ids,
}
"""How a drafter is read."""
SAID = {"sample_from_anchor": (False, True), "is_causal": (False, True), "target_layer_ids": ([1, 3], [2, 4])}
"""What its config says, and another way."""


def accept_where(is_right, right=-1, wrong=0):
    """Accept so many tokens in one way of reading a drafter, and so many in others; by default all, and nothing."""

    def measure(drafter, _, answers):
        rows = np.zeros((len(answers), drafter.block_size), int)
        rows[:, 1] = 9 * (wrong > 0)
        rows[:, right if is_right(drafter) else wrong] += 1
        return Acceptance(rows, drafter.block_size)

    return measure


def compare_way(key, folder, target, responses):
    return RUN[f"measured {key}"]("measured", Trial(target, read_files(folder), responses))


@pytest.mark.parametrize("key", WAYS)
@pytest.mark.parametrize(
    ("case", "num_answers", "result"),
    [("other", 20, "fails"), ("other", MIN_PROMPTS - 1, "skipped"), ("same", 20, "passes"), ("none", 20, "skipped")],
)
def test_the_better_way_is_named(
    key, case, num_answers, result, random_drafter_folder, language_target, language_responses, monkeypatch
):
    """With the answers that are needed; where nothing is accepted either way, neither is better."""
    right = {"same": SAID[key][0], "other": SAID[key][1], "none": None}[case]
    measure = accept_where(lambda drafter: WAYS[key](drafter) == right)
    monkeypatch.setattr("dpace.doctor.doctor.heldout_acceptance", measure)
    found = compare_way(key, random_drafter_folder, language_target, language_responses[:num_answers])
    assert found.result == result
    if result == "fails":
        assert "tau 1.00 as the config says" in found.found and f'"{key}": {found.expected}' in found.fix
    if result == "skipped":
        assert f"cannot be told apart on {num_answers} answers" in found.found


@pytest.mark.parametrize(("key", "result"), [("sample_from_anchor", "skipped"), ("is_causal", "fails")])
def test_a_small_gain_names_a_wrong_mask_and_no_shifted_slots(
    key, result, random_drafter_folder, language_target, language_responses, monkeypatch
):
    """A drafter that has learned little gains a little by a shift; a wrong mask costs little."""
    measure = accept_where(lambda drafter: WAYS[key](drafter) == SAID[key][1], right=2, wrong=1)  # tau 2.1 for 2
    monkeypatch.setattr("dpace.doctor.doctor.heldout_acceptance", measure)
    found = compare_way(key, random_drafter_folder, language_target, language_responses[:20])
    assert found.result == result


OTHER = pytest.mark.parametrize(
    ("key", "value"), [("sample_from_anchor", True), ("is_causal", True), ("target_layer_ids", (2, 4))]
)


@OTHER
@pytest.mark.parametrize(("is_edited", "result"), [(False, "passes"), (True, "fails")])
def test_a_better_way_is_no_fault_where_the_recipe_confirms_the_config(
    key, value, is_edited, result, folder, language_target, language_responses, monkeypatch
):
    set_values(folder, both(key, value) if is_edited else {})
    right = SAID[key][0 if is_edited else 1]
    monkeypatch.setattr("dpace.doctor.doctor.heldout_acceptance", accept_where(lambda found: WAYS[key](found) == right))
    assert compare_way(key, folder, language_target, language_responses[:20]).result == result


@pytest.mark.parametrize(("accepts", "result"), [(True, "passes"), (False, "warns")])
def test_without_a_record_drafts_must_be_of_use(
    accepts, result, random_drafter_folder, language_target, language_responses, monkeypatch
):
    monkeypatch.setattr("dpace.doctor.doctor.heldout_acceptance", accept_where(lambda drafter: accepts))
    trial = Trial(language_target, read_files(random_drafter_folder), language_responses[:6])
    found = accept_drafts("accepted length", trial)
    assert found[1:4] == (result, f"tau {4 if accepts else 1:.3f}", "" if accepts else "1.1 or more")


def test_a_head_has_one_slot_only(language_target, language_responses, tmp_path):
    make_with_head(language_target).save_pretrained(tmp_path)
    assert "one way only" in compare_way("sample_from_anchor", tmp_path, language_target, language_responses).found


@OTHER
def test_a_way_is_measured_as_if_the_config_said_so(key, value, folder, language_target, language_responses):
    drafter = load_drafter(folder, language_target)
    trial = Trial(language_target, read_files(folder), language_responses[:6])
    other = trial.measure(trial.answers, **{key: value}).rows
    again = trial.measure(trial.answers).rows
    data = ResponseDataset(language_responses[:6], max_length=10**9, num_anchors=None, seed=0)
    assert (again == heldout_acceptance(drafter, language_target, data).rows).all()
    set_values(folder, both(key, value))
    drafter = load_drafter(folder, language_target)
    assert (other == heldout_acceptance(drafter, language_target, data).rows).all()


def test_layers_of_two_kinds_are_read_as_before(language_target):
    drafter = make_drafter(language_target, sliding_window=9, full_layers=[1])
    for value, expected in ((True, [True, True]), ("sliding", [True, False]), (False, [False, False])):
        read_as(drafter, replace(drafter.spec, is_causal=value))
        assert [layer.self_attn.is_causal for layer in drafter.layers] == expected


# --- decoding, and the verb -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "result"), [(torch.float32, "fails"), (torch.bfloat16, "skipped")])
def test_a_text_that_the_drafter_changes_is_named(dtype, result, tmp_path, monkeypatch):
    target = make_target("qwen3")
    target.model.to(dtype)
    target = Target(target.model, make_tokenizer())
    make_drafter(target).to(dtype).save_pretrained(tmp_path)
    monkeypatch.setattr(dpace.decode.loop, "verify_draft", lambda draft, _: len(draft))
    (found,) = [d for d in diagnose(tmp_path, target) if d.check == "decodes three prompts"]
    assert found.result == result and "0 of 3 texts" in found.found


@pytest.mark.wide
def test_no_value_of_the_config_stops_the_examination(folder, language_target):
    whole = (folder / CONFIG).read_text()
    values = (None, "x", [], {}, -1, 0.5)
    for number, key in enumerate(json.loads(whole)):
        for value in (values[number % 6], values[(number + 1) % 6]):
            (folder / CONFIG).write_text(json.dumps({**json.loads(whole), key: value}))
            assert {d.check for d in diagnose(folder, language_target)} >= {CONFIG, *RUN}


def test_the_verb_passes_a_trained_drafter(folder, language_folder, language_responses, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # texts in one line
    write_rows(folder.parents[1] / "responses.jsonl", map(asdict, language_responses))
    flags = [str(folder), "--target", str(language_folder)]
    assert main(["doctor", *flags, "--engine", "vllm"]) == 0
    printed = capsys.readouterr()
    ends = '"num_speculative_tokens": 5', "next: dpace check"
    assert all(text in printed.out for text in (*RUN, *ends, "on the responses of the training"))
    assert "examining" in printed.err and "fails" not in printed.out.lower() and "warns" not in printed.out
    change_config(folder, is_causal=True)
    assert main(["doctor", *flags]) == 1
    printed = capsys.readouterr()
    assert "FAILS" in printed.out and "failed: is_causal" in printed.err


def test_every_compared_key_has_a_fault():
    provoked = {name for _, names in CONFIGS for name in names.split(", ")} | {"dpace.target"}
    compared = {key for keys in COMPARED for key in keys.names.split()}
    assert compared <= provoked | {"dflash_config.lilicorr_enabled"}
