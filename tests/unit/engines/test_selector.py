"""A drafter with LiLiCorr in the layout that engines read, and without it."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpace.drafter import Drafter
from dpace.drafter.lilicorr import OLDER_NAMES
from dpace.engines import vllm, zlab
from dpace.engines.read import read_drafter
from tests.support.files import change_config, read_json
from tests.support.models import make_with_selector
from tests.unit.engines.conftest import LILICORR

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


@pytest.fixture(params=LILICORR)
def kind(request) -> str:
    return request.param


@pytest.fixture
def drafter(kind, folders) -> Drafter:
    return Drafter.from_pretrained(folders[kind], dtype=torch.float32)


def test_the_layout_is_that_of_the_engines(kind, drafter, do_export):
    path = do_export("vllm", kind)
    config = read_json(path / "config.json")
    assert config["architectures"] == ["LiLiCorrDraftModel"]
    taps = {"conv_kernel_size": 2, "conv_group_size": 16} if drafter.spec.conv_kernel_size else {}
    usual = ("mask_token_id", "target_layer_ids")
    assert {k: v for k, v in config["dflash_config"].items() if k not in usual} == KEYS | taps
    files = load_file(path / "model.safetensors")
    assert "lilicorr.feature_mlp.up_proj.weight" in files
    assert not any("selector" in name for name in files)
    card = (path / "README.md").read_text()
    assert "| selector | `--drafter.selector lilicorr`: projector_type lilicorr" in card
    assert "--to gguf --plain" in card and "from transformers" not in card


def test_older_names_are_read(kind, drafter, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "older")
    files = load_file(folder / "model.safetensors")
    for older, newer in OLDER_NAMES.items():
        files = {
            name.replace(f".{newer}.", f".{older}.") if name.startswith("lilicorr.") else name: tensor
            for name, tensor in files.items()
        }
    assert "lilicorr.layers.1.mlp.0.bias" in files and "lilicorr.feature_mlp.0.weight" in files
    save_file(files, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack lilicorr.*`dpace import` the drafter if another program wrote it"):
        Drafter.from_pretrained(folder)
    again = read_drafter(folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drafter.state_dict().items())


def test_without_the_selector_it_is_dflashs(kind, drafter, do_export):
    assert do_export("gguf", kind, plain=True).exists()
    path = do_export("zlab", kind, plain=True)
    assert read_json(path / "config.json")["dpace"] == {"target": "a"}, (
        "what was measured with the selector does not stay"
    )
    plain = Drafter.from_pretrained(path)
    assert plain.lilicorr is None and plain.selector.num_candidates == 1
    own = drafter.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.state_dict().items() if name in own)


def test_without_dflash2s_selector_its_tables_are_zeros(do_export):
    with pytest.raises(ValueError, match="a selector, which transformers does not run"):
        do_export("transformers", "selector")
    plain = Drafter.from_pretrained(do_export("transformers", "selector", plain=True))
    assert not any(table.any() for table in plain.candidate_selector.buffers())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lilicorr_logit_scale": None}, "lilicorr_logit_scale is missing"),
        ({"lilicorr_num_heads": 3}, "lilicorr_num_heads is 3, expected a divisor of the selector's width, which is 8"),
        ({"sample_from_anchor": True}, "sample_from_anchor is True, which"),
    ],
)
def test_what_does_not_go_with_a_selector_is_refused_by_its_key(changes, line, language_target, tmp_path):
    make_with_selector(language_target).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=line):
        read_drafter(change_config(tmp_path, **changes))


def test_what_does_not_go_with_a_selector_is_refused_with_a_way_that_there_is(language_target):
    """vLLM reads a selector and a small vocabulary alone."""
    spec = make_with_selector(language_target).spec
    small = replace(spec, draft_vocab_size=20)
    assert "--plain" in vllm.ENGINE.fault(small)
    assert vllm.ENGINE.fault(spec) == vllm.ENGINE.fault(replace(small, selector=None)) == ""
    assert zlab.ENGINE.fault(spec).endswith("--to sglang or --plain, without its selector")
    assert zlab.ENGINE.fault(replace(spec, has_own_lm_head=True)).endswith("; export it with --to vllm")
    assert zlab.ENGINE.fault(replace(small, sample_from_anchor=True)).endswith("; decode it with dpace")
