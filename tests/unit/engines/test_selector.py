"""A drafter with LiLiCorr or DSpark's head in the layout that engines read, and without it."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dpace.engines.gguf
from dpace.drafter import Drafter
from dpace.drafter.lilicorr import OLDER_NAMES
from dpace.engines import vllm
from dpace.engines.read import read_drafter
from tests.support.files import change_config, changed_json, changed_weights, read_json
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
        ({"sample_from_anchor": True}, "sample_from_anchor is True, which"),
    ],
)
def test_what_does_not_go_with_a_selector_is_refused_by_its_key(changes, line, language_target, tmp_path):
    make_with_selector(language_target).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=line):
        read_drafter(change_config(tmp_path, **changes))


def test_vllm_reads_a_selector_and_a_small_vocabulary_alone(language_target):
    spec = make_with_selector(language_target).spec
    small = replace(spec, draft_vocab_size=20)
    assert "--plain" in vllm.ENGINE.fault(small)
    assert vllm.ENGINE.fault(spec) == vllm.ENGINE.fault(replace(small, selector=None)) == ""


def test_dsparks_layout_is_that_of_the_engines(do_export):
    """Names of tensors as DeepSpec's, and what vLLM reads at the top level; both say where a block begins."""
    path = do_export("vllm", "markov")
    config = read_json(path / "config.json")
    keys = {"markov_rank": 64, "sample_from_anchor": False}
    outer = {"architectures": ["Qwen3DSparkModel"], "markov_head_type": "vanilla", "dspark_bonus_anchor": True}
    assert config | keys | outer == config and config["dflash_config"] | keys == config["dflash_config"]
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    tables = {f"markov_head.markov_w{number}.weight": (64, 64) for number in (1, 2)}
    assert shapes | tables == shapes
    card = (path / "README.md").read_text()
    assert "| selector | `--drafter.selector markov_head`: markov_rank 64 |" in card
    assert "--to gguf --target-gguf" in card and "from transformers" not in card
    spec = read_drafter(path).spec
    convolved = replace(spec, conv_kernel_size=2, conv_group_size=16)
    for engine in (vllm.ENGINE, dpace.engines.gguf.ENGINE):
        assert engine.fault(spec) == "" and "DSparkConvDraftModel, which" in engine.fault(convolved)
    plain = do_export("transformers", "markov", plain=True)
    assert Drafter.from_pretrained(plain).markov_head is None
    assert "markov" not in (plain / "config.json").read_text()


CONFIDENCE = {"proj.weight": torch.zeros(1, 112), "proj.bias": torch.zeros(1)}


@pytest.mark.parametrize("layout", ["Qwen3DSparkModel", "DSparkDraftModel", "Lfm2DSparkDraftModel"])
def test_published_drafters_with_dsparks_head_are_read(layout, folders, tmp_path):
    """DeepSpec has all keys at the top level, SpecForge the head's in `dflash_config`, and LiquidAI others there.

    Where they do not say it, a block begins at the anchor. Their head for confidences is left out.
    """
    expected = Drafter.from_pretrained(folders["markov, anchored"])
    path = shutil.copytree(folders["markov, anchored"], tmp_path / "published")
    with changed_json(path / "config.json") as config:
        for name in ("sample_from_anchor", "dspark_bonus_anchor"):
            del config[name]
        moved = {"Qwen3DSparkModel": (), "DSparkDraftModel": ("mask_token_id", "target_layer_ids", "markov_rank")}
        names = moved.get(layout, ("mask_token_id", "target_layer_ids", "num_target_layers"))
        config["dflash_config"] = {name: config.pop(name) for name in names}
        config |= {"architectures": [layout], "markov_head_type": "vanilla", "enable_confidence_head": True}
    with changed_weights(path) as weights:
        weights.update({f"confidence_head.{name}": tensor for name, tensor in CONFIDENCE.items()})
    found = read_drafter(path)
    assert found.spec == expected.spec and found.first_slot == 0
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    change_config(path, rope_is_neox_style=False)
    with pytest.raises(ValueError, match="rope_is_neox_style"):
        read_drafter(path)


def test_gguf_files_of_others_with_dsparks_head_are_read(folders, target_gguf, tmp_path, monkeypatch):
    """They say no rank, may not say where blocks begin, and have a head for confidences."""
    expected = Drafter.from_pretrained(folders["markov, anchored"])
    writer = dpace.engines.gguf.gguf.GGUFWriter
    add, add_file_type = writer.add_key_value, writer.add_file_type

    def add_some(self, name, *rest):
        if name not in ("dflash.markov_rank", "dflash.sample_from_anchor"):
            add(self, name, *rest)

    def add_more(self, *rest):
        for name, tensor in CONFIDENCE.items():
            self.add_tensor(f"conf_{name}", tensor.numpy())
        add_file_type(self, *rest)

    monkeypatch.setattr(writer, "add_key_value", add_some)
    monkeypatch.setattr(writer, "add_file_type", add_more)
    dpace.engines.gguf.write_gguf(tmp_path / "x.gguf", expected, target_gguf)
    found = read_drafter(tmp_path / "x.gguf", num_target_layers=6)
    assert found.spec == expected.spec
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())


def test_dsparks_layout_of_rank_0_has_no_head(folders, tmp_path):
    path = shutil.copytree(folders["trained"], tmp_path / "x")
    spec = read_drafter(change_config(path, architectures=["Qwen3DSparkModel"], markov_rank=0)).spec
    assert spec == read_drafter(folders["trained"]).spec
