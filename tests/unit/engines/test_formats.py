"""What is exported is the drafter that was read; what others wrote is taken over as it is, or refused."""

import shutil
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import dpace.engines.speculators
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec, read_folder
from dpace.engines import engine_of
from dpace.engines.gguf import ENGINE, open_target_gguf, to_gguf, write_gguf
from dpace.engines.read import read_drafter
from dpace.publish.export import import_drafter
from tests.support.cases import wide
from tests.support.files import change_config, read_json
from tests.unit.engines.conftest import LAYOUTS, LILICORR, MARKOV, RECORD

REFUSED = {
    ("speculators", "causal"): "is_causal is true",
    ("speculators", "convolutions"): "DFlash2DraftModel, which speculators does not read",
    ("speculators", "own"): "has_own_embed_tokens",
    ("speculators", "lilicorr"): "LiLiCorrDraftModel.* --plain leaves a selector out",
    ("gguf", "lilicorr"): "LiLiCorrDraftModel",
    ("zlab", "anchored"): "the drafter has sample_from_anchor",
    ("zlab", "small"): "draft_vocab_size",
    ("zlab", "own"): "has_own_embed_tokens",
    ("vllm", "anchored"): "the drafter has sample_from_anchor",
    ("vllm", "markov, anchored"): "the drafter has sample_from_anchor",
    ("speculators", "markov"): "Qwen3DSparkModel",
    ("zlab", "markov, anchored"): "Qwen3DSparkModel",
    ("openvino", "causal windows"): "is_causal is True, and OpenVINO GenAI takes it for False",
    ("openvino", "convolutions"): "DFlash2DraftModel, which OpenVINO GenAI does not read",
    ("openvino", "own"): "has_own_embed_tokens",
}
"""What an engine does not read."""
TO = ("zlab", "speculators", "gguf")
CASES = [(to, kind, "keep") for to in TO for kind in ("causal windows", "mixed layers", "convolutions", *LAYOUTS)]
CASES += [("vllm", kind, "keep") for kind in (*LAYOUTS, *LILICORR, *MARKOV)]
CASES += [(to, "lilicorr", "keep") for to in TO[1:]] + [("gguf", kind, "keep") for kind in MARKOV]
CASES += [("speculators", "markov", "keep"), ("zlab", "markov, anchored", "keep")]
CASES += [("openvino", kind, "keep") for kind in ("causal windows", "convolutions", "own", "windows")]
CASES += [(to, "trained", "bfloat16") for to in TO]
LIKE_THESE = [(to, *case) for to in TO for case in (("windows", "keep"), ("causal", "keep"), ("trained", "float16"))]
"""They take the same branches."""


@pytest.mark.parametrize("case", [*CASES, *wide(LIKE_THESE)], ids=str)
def test_out_and_in_again_is_the_same_drafter_or_it_is_refused(case, do_export, folders, language_folder, tmp_path):
    to, kind, dtype = case
    if reason := REFUSED.get((to, kind)):
        with pytest.raises(ValueError, match=reason):
            do_export(to, kind)
        return
    before = read_drafter(folders[kind])
    path = do_export(to, kind, dtype=dtype)
    patterns = ["README.md", "speculation_profile.json", ".dpace.*", *engine_of(to).files]
    assert all(any(map(file.match, patterns)) for file in (tmp_path / to).iterdir()), "a later export removes them"
    again = import_drafter(path, tmp_path / "again", target=str(language_folder))
    files = load_file(tmp_path / "again" / "model.safetensors")
    assert files.keys() == before.state_dict().keys()
    for name, tensor in before.state_dict().items():
        is_kept = dtype == "keep" or (to == "gguf" and tensor.dim() != 2)
        expected = tensor if is_kept else tensor.to(getattr(torch, dtype))
        assert files[name].dtype == expected.dtype and torch.equal(files[name], expected), name
    assert again.spec == before.spec
    assert again.spec.record == RECORD


def test_each_engine_is_told_in_its_own_counting(do_export, folder, language_drafter, tmp_path):
    path = do_export("vllm")
    for name in ("model.safetensors", "modeling_dflash.py", "config.json"):
        assert (path / name).read_bytes() == (folder / name).read_bytes(), "save is export"
    config = read_json(do_export("speculators") / "config.json")
    assert config["aux_hidden_state_layer_ids"] == [i + 1 for i in language_drafter.target_layer_ids]
    served = config["speculators_config"]
    assert served["proposal_methods"][0]["speculative_tokens"] == 5
    assert served["verifier"]["name_or_path"] == "some/target"
    assert config["sliding_window_non_causal"] is True
    with pytest.raises(ValueError, match="no rope_theta; .* convert other layouts by `dpace import`"):
        Drafter.from_pretrained(tmp_path / "speculators")


def test_a_file_that_says_something_else_is_refused(do_export, monkeypatch, tmp_path):
    """A weight, or a layer; nothing of it is left behind."""
    write = dpace.engines.speculators.save_file

    def write_twice_the_norm(tensors, path, **options):
        write(tensors | {"norm.weight": tensors["norm.weight"] * 2}, path, **options)

    changes = [
        (dpace.engines.speculators, "save_file", write_twice_the_norm),
        (DrafterSpec, "hidden_state_ids", property(lambda spec: list(spec.target_layer_ids))),
    ]
    for change in changes:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="does not read back as it was written"):
            patch.setattr(*change)
            do_export("speculators")
        assert [path.name for path in (tmp_path / "speculators").iterdir()] == [".dpace.lock"]


def test_other_spellings_are_read(folder, tmp_path):
    expected, weights = read_folder(folder)
    other = tmp_path / "other"
    top = dict.fromkeys(("block_size", "target_layer_ids", "mask_token_id"))
    for changes in (
        {"dflash_config": {name: getattr(expected, name) for name in top}, **top},
        {"dflash_config": None},
        {"rope_parameters": None},
        {"is_causal": None, "rope_theta": None},
    ):
        shutil.copytree(folder, other, dirs_exist_ok=True)
        assert read_folder(change_config(other, **changes))[0] == expected
    theirs = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    named = {f"model.{theirs.get(name, name)}": tensor for name, tensor in weights.items()}
    save_file(named, other / "model.safetensors")
    again = read_drafter(other).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


def test_layers_of_which_some_are_causal(folders, do_export, tmp_path):
    """Published drafters of mixed layers that do not say whether they are causal: the sliding layers are."""
    path = change_config(shutil.copytree(folders["mixed layers"], tmp_path / "x"), is_causal=None)
    spec, _ = read_folder(path)
    assert spec.is_causal == "sliding"
    assert [reach.is_causal for reach in Drafter.from_pretrained(path).reaches.values()] == [True, False]
    for to in ("zlab", "speculators"):
        out = do_export(to, folder=path)
        assert read_drafter(out, num_target_layers=6).spec == spec
        assert "--to gguf" not in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="is_causal is not set"):
        do_export("gguf", folder=path)


def test_gguf_files_that_do_not_fit_are_refused(do_export, language_folder, target_gguf, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="architecture 'qwen3'"):
        import_drafter(target_gguf, tmp_path / "out", target=str(language_folder))
    path = do_export("gguf")
    with pytest.raises(ValueError, match="--target"):
        import_drafter(path, tmp_path / "out")
    spec = read_drafter(path, num_target_layers=6).spec
    with pytest.raises(ValueError, match=r"\[6, 48, 64\] and the drafter's target \[7, 48, 64\]"):
        open_target_gguf(target_gguf, replace(spec, num_target_layers=7))
    scaled = replace(spec, rope_parameters={**spec.rope_parameters, "rope_type": "llama3"})
    assert "rope_type is 'llama3'" in ENGINE.fault(scaled)
    monkeypatch.setattr(gguf.GGUFWriter, "add_array", lambda *arguments: None)
    with pytest.raises(ValueError, match="no list that says which layers have it"):
        do_export("gguf", "windows")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_gguf_files_are_imported_as_plain_numbers(
    kind, folder, language_folder, target_gguf, tmp_path, monkeypatch
):
    """Those of llama.cpp's own tools."""

    def quantized(tensor):
        if tensor.dim() != 2 or tensor.shape[1] % 32:
            return to_gguf(tensor)
        to = gguf.GGMLQuantizationType[kind]
        return gguf.quants.quantize(tensor.numpy(), to), to

    monkeypatch.setattr("dpace.engines.gguf.to_gguf", quantized)
    drafter = read_drafter(folder)
    write_gguf(tmp_path / "x.gguf", drafter, target_gguf)
    found = import_drafter(tmp_path / "x.gguf", tmp_path / "plain", target=str(language_folder)).state_dict()
    for name, weight in drafter.state_dict().items():
        error = (found[name] - weight).norm() / weight.norm()
        assert 0 < error < 0.1 if weight.dim() == 2 and weight.shape[1] % 32 == 0 else error == 0, name
