"""A drafter with a LiLiCorr head in the layout that engines read, and without the head."""

from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from dpace.batches.dataset import ResponseDataset
from dpace.cli import main
from dpace.doctor.doctor import diagnose
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.lilicorr import OLDER_NAMES
from dpace.engines import vllm
from dpace.engines.export import read_drafter
from dpace.measure.heldout import heldout_acceptance
from tests.conftest import make_drafter, make_with_head
from tests.support.files import read_json, write_rows
from tests.unit.doctor.test_doctor import edit, nested

KEYS = {
    "projector_type": "lilicorr",
    "lilicorr_enabled": True,
    "lilicorr_candidate_topk": 4,
    "lilicorr_hidden_size": 8,
    "lilicorr_num_layers": 2,
    "lilicorr_num_heads": 1,
    "lilicorr_mlp_ratio": 2.0,
    "lilicorr_factor_dim": 8,
    "lilicorr_vector_eps": 1e-4,
    "lilicorr_logit_scale": 8.0,
}
"""What vLLM, SGLang and TensorRT-LLM read from `dflash_config`, beside the usual keys."""
LINEARS = ["token_proj", "pass_hidden_proj", "context_proj", "feature_mlp.up_proj", "feature_mlp.down_proj"]
LINEARS += ["factor_input_proj", "out_head", "in_head", "anchor_out_head", "feature_norm"]
LINEARS += [f"layers.{i}.{name}" for i in (0, 1) for name in ("attn.out_proj", "mlp.up_proj", "mlp.down_proj")]
VECTORS = ["slot_embedding", "rank_embedding", "relative_slot_bias", "same_slot_bias"]
VECTORS += ["output_norm.weight", "anchor_norm.weight"]
VECTORS += [
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in ("attn_norm.weight", "mlp_norm.weight", "attn.in_proj_weight", "attn.in_proj_bias")
]
NAMES = {f"lilicorr.{name}" for name in VECTORS}
NAMES |= {f"lilicorr.{name}.{leaf}" for name in LINEARS for leaf in ("weight", "bias")}


@pytest.fixture(params=[0, 2], ids=["alone", "convolutions"])
def made(request, language_target, tmp_path):
    drafter = make_with_head(language_target, conv_kernel_size=request.param)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            parameter.add_(0.1 if "_conv." in name else 0.0)
    drafter.save_pretrained(tmp_path / "made")
    return tmp_path / "made", drafter


def export(folder, language_folder, to, output, *more):
    flags = ["export", str(folder), "--target", str(language_folder), "--to", to, "--output", str(output), *more]
    return main(flags)


def test_the_layout_is_that_of_the_engines_and_reads_back(made, language_folder, tmp_path):
    folder, drafter = made
    assert export(folder, language_folder, "vllm", tmp_path / "out") == 0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["LiLiCorrDraftModel"]
    taps = {"conv_kernel_size": 2, "conv_group_size": 16} if drafter.spec.conv_kernel_size else {}
    usual = ("mask_token_id", "target_layer_ids")
    assert {k: v for k, v in config["dflash_config"].items() if k not in usual} == KEYS | taps
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in files if name.startswith("lilicorr.")} == NAMES
    assert not any("selector" in name for name in files)
    again = read_drafter(tmp_path / "out")
    assert again.spec == drafter.spec
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| head | LiLiCorr, over the 4 best tokens" in card
    assert "--to gguf --plain" in card and "from transformers" not in card
    theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = torch.randn(2, 3, 4, 48), torch.randn(2, 3, 4), torch.randn(2, 3, 48), torch.randn(2, 48)
    for found, expected in zip(theirs.lilicorr(*inputs), drafter.lilicorr(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_older_names_are_read(made, language_folder, tmp_path):
    folder, drafter = made
    files = load_file(folder / "model.safetensors")
    for older, newer in OLDER_NAMES.items():
        files = {
            name.replace(f".{newer}.", f".{older}.") if name.startswith("lilicorr.") else name: tensor
            for name, tensor in files.items()
        }
    assert "lilicorr.layers.1.mlp.0.bias" in files and "lilicorr.feature_mlp.0.weight" in files
    save_file(files, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack lilicorr.*or `dpace import` it where another program wrote it"):
        Drafter.from_pretrained(folder)
    flags = ["import", str(folder), "--output", str(tmp_path / "again"), "--target", str(language_folder)]
    assert main(flags) == 0
    again = Drafter.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drafter.state_dict().items())


def test_without_the_head_it_is_dflashs(made, language_target, language_folder, target_gguf, tmp_path, capsys):
    folder, drafter = made
    for to in ("gguf", "speculators"):
        more = ["--target-gguf", str(target_gguf)] if to == "gguf" else []
        assert export(folder, language_folder, to, tmp_path / to, *more) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "LiLiCorrDraftModel" in line and "--plain" in line and not (tmp_path / to).exists()
    more = ["--plain", "--target-gguf", str(target_gguf)]
    assert export(folder, language_folder, "gguf", tmp_path / "gguf", *more) == 0
    assert export(folder, language_folder, "zlab", tmp_path / "plain", "--plain") == 0
    plain = Drafter.from_pretrained(tmp_path / "plain")
    assert plain.lilicorr is None and plain.selector.num_candidates == 1
    own = drafter.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.state_dict().items() if name in own)
    assert not [d for d in diagnose(tmp_path / "plain", language_target) if d.result in ("fails", "warns")]
    make_drafter(language_target).save_pretrained(tmp_path / "none")
    assert export(tmp_path / "none", language_folder, "zlab", tmp_path / "x", "--plain") == 1
    assert "has no head" in capsys.readouterr().err


def test_the_record_of_the_head_does_not_stay_without_it(language_target, language_folder, tmp_path):
    drafter = make_with_head(language_target)
    drafter.config.dpace = {"confidence_temperature": 2.0, "tau": 3.0, "target": "a"}
    drafter.save_pretrained(tmp_path / "made")
    assert export(tmp_path / "made", language_folder, "zlab", tmp_path / "plain", "--plain") == 0
    assert read_json(tmp_path / "plain" / "config.json")["dpace"] == {"target": "a"}


def test_doctor_measures_a_head_on_responses(language_target, language_responses, tmp_path):
    make_with_head(language_target).save_pretrained(tmp_path / "head")
    write_rows(tmp_path / "some.jsonl", map(asdict, language_responses[:3]))
    found = diagnose(tmp_path / "head", language_target, responses=str(tmp_path / "some.jsonl"))
    data = ResponseDataset(language_responses[:3], max_length=10**9, num_anchors=None, seed=0)
    drafter = load_drafter(tmp_path / "head", language_target, all_tokens=True)
    tau = heldout_acceptance(drafter, language_target, data).tau
    assert {d.check: d.found for d in found}["accepted length"] == f"tau {tau:.3f}"


@pytest.mark.parametrize("value", [0, 48])
def test_a_head_as_wide_as_the_drafter(value, language_target, tmp_path):
    """Its width is written as 0, and read in both spellings, as whole numbers are for a scale."""
    make_with_head(language_target, head_width=48).save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["dflash_config"]["lilicorr_hidden_size"] == 0
    edit(tmp_path, nested(lilicorr_hidden_size=value, lilicorr_logit_scale=4))
    assert not [d for d in diagnose(tmp_path, language_target) if d.result == "fails"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda config, _: config["dflash_config"].pop("lilicorr_logit_scale"), "has no lilicorr_logit_scale"),
        (nested(sample_from_anchor=True), "sample_from_anchor is True, which"),
        (lambda config, _: config.update(draft_vocab_size=9), "draft_vocab_size is 9, which"),
    ],
)
def test_what_does_not_go_with_a_head_is_refused_by_its_key(change, line, language_target, tmp_path):
    make_with_head(language_target).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=line):
        read_drafter(tmp_path)


def drop_one(config, tensors):
    del tensors["lilicorr.out_head.bias"]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (nested(lilicorr_logit_scale="8"), "config.json"),
        (lambda config, _: config["dflash_config"].pop("lilicorr_vector_eps"), "config.json"),
        (nested(lilicorr_num_heads=2), "model.safetensors"),
        (lambda config, _: config.update(architectures=["DFlashDraftModel"]), "architectures"),
        (nested(projector_type="none"), "dflash_config.projector_type"),
        (lambda config, _: config["dflash_config"].pop("lilicorr_enabled"), "dflash_config.lilicorr_enabled"),
        (drop_one, "model.safetensors"),
        (lambda config, _: config.update(block_size=5), "model.safetensors"),
    ],
)
def test_doctor_looks_at_the_head(change, check, language_target, tmp_path):
    make_with_head(language_target).save_pretrained(tmp_path)
    edit(tmp_path, change)
    assert check in {d.check for d in diagnose(tmp_path, language_target) if d.result == "fails"}


def test_a_head_and_a_small_vocabulary_are_not_for_vllm(language_target):
    """It reads each of the two alone."""
    spec = make_with_head(language_target).spec
    small = replace(spec, draft_vocab_size=20)
    assert "--plain" in vllm.ENGINE.fault(small)
    assert vllm.ENGINE.fault(spec) == vllm.ENGINE.fault(replace(small, selector=None)) == ""
