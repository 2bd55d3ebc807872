"""Every known fault of a drafter's folder is named by its check, and a good folder by none."""

import json
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import dpace.blocks
from dpace.blocks import Blocks
from dpace.cli import main
from dpace.doctor.checks import CONFIG_CHECKS, FILE_CHECKS, FIXED_KEYS, TARGET_KEYS, TENSOR_KEYS, WEIGHT_CHECKS
from dpace.doctor.doctor import RUN_CHECKS, diagnose
from dpace.drafter import Drafter
from dpace.engines.card import serve_command
from dpace.target import Target
from tests.conftest import make_drafter, make_target, make_tokenizer, make_with_convolutions, make_with_head
from tests.support.files import changed_json, changed_weights, write_rows

Q, K, V = (f"layers.0.self_attn.{name}_proj.weight" for name in "qkv")
NORM, UP = "layers.1.input_layernorm.weight", "layers.1.mlp.up_proj.weight"


def named(folder, target, **options) -> set[str]:
    return {d.check for d in diagnose(folder, target, **options) if d.result in ("fails", "warns")}


def edit(folder: Path, change) -> None:
    """Let `change(config, tensors)` edit a drafter on disk."""
    with changed_json(folder / "config.json") as config, changed_weights(folder) as tensors:
        change(config, tensors)


@pytest.fixture
def folder(language_drafter_folder, tmp_path) -> Path:
    """A copy of a trained drafter, with its recipe and record."""
    files = ("config.json", "model.safetensors", "recipe.yaml")
    (tmp_path / "a" / "b" / "drafter").mkdir(parents=True)
    for name in files:
        shutil.copy(language_drafter_folder / name, tmp_path / "a" / "b" / "drafter" / name)
    return tmp_path / "a" / "b" / "drafter"


def keys(**values):
    return lambda config, _: config.update(values)


def nested(**values):
    return lambda config, _: config["dflash_config"].update(values)


def both(**values):
    """Other values in both places."""
    return lambda config, _: [found.update(values) for found in (config, config["dflash_config"])]


def ids(*layers):
    return both(target_layer_ids=list(layers))


def without(*names):
    return lambda config, _: [config.pop(name) for name in names]


def record(**values):
    return lambda config, _: config["dpace"].update(values)


def rope(config, _):
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 1e6


def swap(a, b):
    """Two tensors in each other's place."""

    def change(_, tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def tensor(name, make):
    """Another tensor of that name, made from the old one."""

    def change(_, tensors):
        tensors[name] = make(tensors.get(name))

    return change


def drop(pattern):
    def change(_, tensors):
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return change


def prefixed(_, tensors):
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


def rounded(config, tensors):
    config["dtype"] = "float16"
    tensors.update({name: old.half() for name, old in tensors.items()})


def convolved(**sizes):
    """Convolutions that do nothing, and sizes that the config says."""

    def change(config, tensors):
        config["architectures"] = ["DFlash2DraftModel"]
        config["dflash_config"] |= {"selector_rank": 1, "selector_top_k": 4} | sizes
        width, selector, dtype = 48, "candidate_selector.", tensors["fc.weight"].dtype
        for name in ("attention_conv", "mlp_conv"):
            for layer in range(2):
                tensors[f"layers.{layer}.{name}.base_kernel"] = torch.ones(2, 2, width, dtype=dtype)
                tensors[f"layers.{layer}.{name}.kernel_projection.weight"] = torch.ones(
                    2 * 2 * width // 16, width, dtype=dtype
                )
        codebooks = ("predecessor_codebook", "successor_codebook")
        tensors |= {selector + name: torch.zeros(64, 1, dtype=dtype) for name in codebooks}
        tensors[f"{selector}hidden_projection.weight"] = torch.zeros(1, width, dtype=dtype)

    return change


COMPARED = [key for key in (*FIXED_KEYS, *TENSOR_KEYS, *TARGET_KEYS) if "." not in key]
CONVOLUTION_KEYS = "dflash_config.conv_kernel_size, dflash_config.conv_group_size"
FAULTS = [
    ("no epsilon", without("rms_norm_eps"), "keys written"),
    ("another rope theta", rope, "rope"),
    ("old rope spelling only", without("rope_parameters"), "rope spellings"),
    ("new rope spelling only", without("rope_theta"), "rope spellings"),
    ("rope theta in one spelling", keys(rope_theta=500000.0), "rope"),
    ("interleaved rope", keys(rope_interleaved=True), "rope layout"),
    ("half of each head rotated", keys(partial_rotary_factor=0.5), "rope layout"),
    ("convolutions of another size", convolved(conv_kernel_size=3, conv_group_size=8), CONVOLUTION_KEYS),
    ("one layer lost", drop("layers.1."), "num_hidden_layers, layer_types"),
    ("ids at the top level only", without("dflash_config"), "dflash_config"),
    ("ids differ", keys(target_layer_ids=[1, 2]), "keys agree"),
    ("the last layer", ids(1, 5), "layer ids, as trained"),
    ("ids written as floats", ids(1.0, 3.0), "layer ids, as trained"),
    ("a number of layers written as a float", keys(num_hidden_layers=2.0), "num_hidden_layers"),
    ("ids + 1", ids(2, 4), "layer ids offset, as trained"),
    ("one id too many", ids(1, 2, 3), "fc columns, as trained"),
    ("mask is padding", both(mask_token_id=0), "mask token"),
    ("mask written as a float", both(mask_token_id=3.0), "mask token"),
    ("block of 1", keys(block_size=1), "block_size, as trained"),
    ("drafts for block size", keys(block_size=5), "as trained"),
    ("block_size missing", without("block_size"), "block_size, keys written, as trained"),
    ("block sizes differ", nested(block_size=7), "keys agree, as trained"),
    ("causal", keys(is_causal=True), "is_causal"),
    ("causal inside", nested(causal=True), "is_causal"),
    ("a sliding layer", keys(layer_types=["sliding_attention", "full_attention"]), "layer_types, mixed layers"),
    ("a window", keys(use_sliding_window=True, sliding_window=2048), "sliding window"),
    ("a softcap that the target has not", keys(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ("an embedding scale that the target has not", keys(input_embedding_scale=6.9), "input_embedding_scale"),
    ("a multiplier that the target has not", keys(output_multiplier=0.5), "output_multiplier"),
    ("another tokenizer", record(tokenizer_sha256="0"), "tokenizer"),
    ("another template", record(chat_template_sha256="0"), "chat template"),
    ("trained on thinking", record(thinking=True), "thinking"),
    ("trained in bf16", record(dtype="bfloat16"), "target dtype"),
    ("dtype in the config only", keys(dtype="float16"), "dtype"),
    ("one tensor in fp32", tensor(UP, lambda old: old.float()), "dtype"),
    ("names with a prefix", prefixed, "tensor names"),
    ("a tensor too many", tensor("mask_hidden", lambda _: torch.ones(48).bfloat16()), "tensor names"),
    (
        "a random head",
        tensor("lm_head.weight", lambda _: torch.randn(64, 48).bfloat16()),
        "own embedding",
    ),
    ("q and k swapped in one layer", swap(Q, K), "tensor shapes"),
    ("a matrix turned", tensor(UP, lambda old: old.T), "tensor shapes"),
    ("a NaN", tensor("layers.0.self_attn.q_norm.weight", lambda old: old * float("nan")), "tensor values"),
    ("a norm zeroed", tensor(NORM, torch.zeros_like), "tensor values"),
    ("a matrix exploded", tensor(UP, lambda old: old * 1e3), "exploded tensors"),
    ("a norm exploded", tensor("norm.weight", lambda old: old * 1e5), "exploded tensors"),
    ("a config that transformers refuses", keys(max_position_embeddings="many"), "loads"),
]


@pytest.mark.parametrize("key", COMPARED)
@pytest.mark.parametrize("value", ["other", None])
def test_every_key_is_compared(key, value, folder, language_target):
    edit(folder, keys(**{key: value}))
    assert named(folder, language_target) == {key}


@pytest.mark.parametrize(("change", "expected"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_named_and_nothing_else(change, expected, folder, language_target):
    edit(folder, change)
    assert named(folder, language_target) == set(re.split(", ", expected))


@pytest.mark.parametrize("has_recipe", [True, False])
def test_windows_are_those_of_the_recipe_or_of_the_config(has_recipe, folder, language_target):
    windowed = keys(layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=True, is_causal=True)
    edit(folder, windowed)
    if has_recipe:
        assert named(folder, language_target) == {"layer_types", "sliding window", "is_causal"}
        path = folder / "recipe.yaml"
        options = "sliding_window: 8\n  full_layers: []\n  causal: true"
        path.write_text(re.sub(r"sliding_window: null\n  full_layers: .*\n  causal: false", options, path.read_text()))
    else:
        (folder / "recipe.yaml").unlink()
    assert not named(folder, language_target)
    edit(folder, keys(use_sliding_window=False))
    assert named(folder, language_target) == {"sliding window"}
    edit(folder, without("is_causal"))
    assert named(folder, language_target) == {"sliding window", "keys written"}


def test_without_a_recipe_shifted_ids_are_suspected(folder, language_target):
    (folder / "recipe.yaml").unlink()
    edit(folder, ids(2, 4))
    assert named(folder, language_target) == {"layer ids offset"}


def test_more_ids_than_the_published_rule_has_are_no_fault(tmp_path):
    target = make_target("qwen3")
    make_drafter(target, num_features=None, target_layer_ids=[0, 1, 2, 3]).save_pretrained(tmp_path)
    assert "layer ids offset" not in named(tmp_path, target)


FILE_FAULTS = {
    "config gone": (lambda folder: (folder / "config.json").unlink(), "config readable"),
    "config cut": (lambda folder: (folder / "config.json").write_text('{"block_size": 6,'), "config readable"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config readable"),
    "weights gone": (lambda folder: (folder / "model.safetensors").unlink(), "weights readable"),
    "weights cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000]),
        "weights readable",
    ),
    "recipe cut": (lambda folder: (folder / "recipe.yaml").write_text("drafter: ["), "recipe readable"),
    "a mask embedding": (lambda folder: (folder / "mask_embedding.pt").touch(), "mask_embedding.pt"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_broken_file_is_named_and_the_rest_is_examined(fault, folder, language_target):
    change, expected = FILE_FAULTS[fault]
    change(folder)
    refused = {"loads"} if expected == "mask_embedding.pt" else set()
    assert named(folder, language_target) == {expected, *refused}
    (folder / "recipe.yaml").write_text("[]")
    assert named(folder, language_target) == {expected, "recipe readable", *refused}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_good_drafters_pass(random_target, dtype, tmp_path):
    random_target.tokenizer = make_tokenizer()
    for make in (make_drafter, make_with_convolutions, make_with_head):
        make(random_target).to(dtype).save_pretrained(tmp_path)
        assert not named(tmp_path, random_target)


def test_a_trained_drafter_passes_all_checks(folder, language_target, language_responses):
    write_responses(folder, language_responses)
    diagnoses = diagnose(folder, language_target, engine="vllm")
    assert not [d for d in diagnoses if d.result in ("fails", "warns")]
    assert [d.check for d in diagnoses if d.result == "skipped"] == ["target"]  # made in memory, it has no name


def test_scaling_of_rope_and_logits_is_compared(tmp_path):
    target = make_target("llama3.1")
    target.tokenizer = make_tokenizer()
    make_drafter(target).save_pretrained(tmp_path)

    def unscaled(config, _):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
        del config["rope_scaling"]

    edit(tmp_path, without("rope_scaling"))
    assert named(tmp_path, target) == {"rope spellings"}
    edit(tmp_path, keys(rope_scaling=None))
    edit(tmp_path, unscaled)
    assert named(tmp_path, target) == {"rope"}
    target = make_target("gemma2")
    target.tokenizer = make_tokenizer()
    make_drafter(target).save_pretrained(tmp_path)
    assert named(tmp_path, target, engine="vllm") == {"engine"}
    edit(tmp_path, without("final_logit_softcapping", "input_embedding_scale"))
    assert named(tmp_path, target) == {"final_logit_softcapping", "input_embedding_scale"}


def test_an_embedding_of_the_targets_own_does_no_harm(folder, language_target):
    edit(folder, tensor("lm_head.weight", lambda _: language_target.head.weight.bfloat16()))
    assert not named(folder, language_target)


def write_responses(folder, responses):
    write_rows(folder.parents[1] / "responses.jsonl", map(asdict, responses))


def llama_rows(old):
    """The order of rows that GGUF files of Llama have."""
    return old.view(4, 2, -1, 48).transpose(1, 2).reshape(old.shape)


SILENT_FAULTS = {
    "layers swapped": lambda _, tensors: [
        swap(name, name.replace("layers.0.", "layers.1."))(_, tensors)
        for name in list(tensors)
        if name.startswith("layers.0.")
    ],
    "columns of fc permuted": tensor("fc.weight", lambda old: old.roll(48, 1)),
    "rows of q in the order of GGUF": tensor(Q, llama_rows),
    "k and v swapped": swap(K, V),
    "fc of an untrained drafter": tensor("fc.weight", lambda old: torch.randn_like(old) * 0.02),
}


@pytest.mark.parametrize("fault", SILENT_FAULTS)
def test_what_no_file_shows_is_found_by_the_accepted_length(fault, folder, language_target, language_responses):
    write_responses(folder, language_responses)
    edit(folder, SILENT_FAULTS[fault])
    diagnoses = diagnose(folder, language_target)
    wrong = {d.check for d in diagnoses if d.result in ("fails", "warns")}
    assert wrong - {"drafts anything"} == {"accepted length"}, diagnoses[-1]


def test_on_other_responses_or_in_fp16_tau_must_reach_the_interval(folder, language_target, language_responses):
    write_responses(folder, language_responses[:20])  # trained on, and not among the recorded ones
    assert not named(folder, language_target)
    write_responses(folder, language_responses)
    edit(folder, rounded)
    assert not named(folder, language_target)
    edit(folder, SILENT_FAULTS["fc of an untrained drafter"])
    assert "accepted length" in named(folder, language_target)


def test_another_target_than_the_recorded_one_is_named(folder, language_folder):
    target = Target.load(str(language_folder))
    edit(folder, record(target=target.short_name))
    assert not named(folder, target)
    edit(folder, record(target="SmolLM2-135M"))
    assert named(folder, target) == {"target"}


LEAK, VIEWS = "no leak from the future", "training view is serving view"


def shifted_visibility(shift: int):
    """Blocks that see so many tokens more of the text than those before their anchor."""
    right = dpace.blocks.visibility

    def visibility(blocks, num_context, reach):
        return right(replace(blocks, anchors=blocks.anchors + shift), num_context, reach)

    return dpace.blocks, "visibility", visibility


def causal_when_serving():
    """A block alone, as decoding drafts it, whose slots do not see those after them."""
    right = Drafter.forward

    def forward(self, noise_embeds, context_hidden_states, position_ids, attention_mask=None, **options):
        if attention_mask is None:
            num_slots, num_keys = noise_embeds.shape[1], position_ids.shape[1]
            attention_mask = torch.ones(1, 1, num_slots, num_keys, dtype=torch.bool).tril(num_keys - num_slots)
        return right(self, noise_embeds, context_hidden_states, position_ids, attention_mask, **options)

    return Drafter, "forward", forward


def next_positions(blocks):
    return blocks.anchors[..., None] + torch.arange(1, blocks.block_size + 1)


VIEW_FAULTS = {
    "the anchor's features are seen": (shifted_visibility(1), {LEAK, VIEWS}),
    "a later token's features are seen": (shifted_visibility(3), {LEAK, VIEWS}),
    "slots hold the text": ((Blocks, "input_ids", lambda blocks, _: blocks.labels), {LEAK, VIEWS}),
    "the last token's features are hidden": (shifted_visibility(-1), {VIEWS}),
    "positions of slots are one too far": ((Blocks, "position_ids", property(next_positions)), {VIEWS}),
    "served slots are causal": (causal_when_serving(), {VIEWS}),
}
"""Faults of our own code; a block when serving has no future to see, so a leak shows in both checks."""


@pytest.mark.parametrize("fault", VIEW_FAULTS)
def test_leaks_and_views_that_differ_are_named(fault, folder, language_target, monkeypatch):
    assert not named(folder, language_target)
    change, expected = VIEW_FAULTS[fault]
    monkeypatch.setattr(*change)
    assert named(folder, language_target) == expected


def test_another_target_of_the_same_shape_is_found(folder, language_responses):
    write_responses(folder, language_responses)
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    assert named(folder, target) == {"accepted length", "drafts anything"}


def test_no_value_of_the_config_stops_the_examination(folder, language_target):
    whole = (folder / "config.json").read_text()
    values = (None, "x", [], {}, -1, 0.5)
    for number, key in enumerate(json.loads(whole)):
        for value in (values[number % 6], values[(number + 1) % 6]):
            (folder / "config.json").write_text(json.dumps({**json.loads(whole), key: value}))
            assert len(diagnose(folder, language_target)) > 35


def test_the_verb(folder, language_folder, language_responses, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # texts in one line
    write_responses(folder, language_responses)
    flags = [str(folder), "--target", str(language_folder)]
    for engine, drafts in (("vllm", '"num_speculative_tokens": 5'), ("llamacpp", "--spec-draft-n-max 5")):
        assert main(["doctor", *flags, "--engine", engine]) == 0
        printed = capsys.readouterr()
        assert drafts in printed.out and "next: dpace check" in printed.out and "those of the training" in printed.out
        assert "examining" in printed.err and "fails" not in printed.out.lower()
    edit(folder, keys(is_causal=True))
    assert main(["doctor", *flags]) == 1
    printed = capsys.readouterr()
    assert "FAILS" in printed.out and "failed: is_causal, accepted length;" in printed.err


def test_commands_count_slots_as_the_engine_does():
    assert serve_command("sglang", "d", "t", 8).endswith("--speculative-dflash-block-size 8")
    assert "--spec-draft-n-max 7" in serve_command("llamacpp", "d", "t", 8)
    assert "max_draft_len: 7" in serve_command("tensorrt", "d", "t", 8)
    words = shlex.split(serve_command("vllm", "d", "t", 8))
    assert json.loads(words[-1])["num_speculative_tokens"] == 7
    for engine in ("transformers", "zlab"):
        compile(serve_command(engine, "d", "t", 8), engine, "eval")


def test_every_check_has_a_fault():
    checks = {check.name for check in (*FILE_CHECKS, *CONFIG_CHECKS, *WEIGHT_CHECKS, *RUN_CHECKS)}
    provoked = {name for _, _, names in FAULTS for name in names.split(", ")} | {n for _, n in FILE_FAULTS.values()}
    provoked |= {name for _, names in VIEW_FAULTS.values() for name in names} | set(COMPARED)
    elsewhere = {"engine", "target", "accepted length", "drafts anything", "engine, slots", "sample_from_anchor"}
    elsewhere |= {"engine, head", "head keys"}
    assert provoked | elsewhere == checks
