"""Weights that do not fit, or are not numbers, are refused by name; no code of a checkpoint runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpace.drafter import Drafter, load_drafter
from dpace.target import Target
from tests.conftest import make_drafter, make_target, make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target's and its drafter's folder; tests change copies."""
    folder = tmp_path_factory.mktemp("models")
    target = make_target("qwen3")
    target.model.save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_drafter(target).save_pretrained(folder / "drafter")
    return folder


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def spoil(name, value):
    def change(weights):
        weights[name].view(-1)[3] = value

    return change


FAULTS = {
    "missing": (lambda w, n: w.pop(n), "lack {}"),
    "other shape": (lambda w, n: w.update({n: w[n][:-1].clone()}), r"have other shapes: {} is \["),
    "nan": (lambda w, n: w[n].view(-1)[3:4].fill_(float("nan")), "NaN or infinity in {}"),
    "infinite": (lambda w, n: w[n].view(-1)[3:4].fill_(float("-inf")), "NaN or infinity in {}"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_weights_that_do_not_fit_are_refused_by_name(kind, fault, folders, tmp_path):
    name = {"target": "model.layers.1.mlp.up_proj.weight", "drafter": "layers.1.mlp.up_proj.weight"}[kind]
    shutil.copytree(folders / kind, tmp_path / kind)
    change, message = FAULTS[fault]
    change_weights(tmp_path / kind, lambda weights: change(weights, name))
    with pytest.raises(ValueError, match=message.format(name)) as refused:
        Target.load(str(tmp_path / kind)) if kind == "target" else Drafter.from_pretrained(tmp_path / kind)
    assert "\n" not in str(refused.value) and str(tmp_path / kind) in str(refused.value)


def test_only_a_drafter_refuses_tensors_that_it_does_not_know(folders, tmp_path):
    """A target's file may have heads for other uses."""
    for kind in ("target", "drafter"):
        shutil.copytree(folders / kind, tmp_path / kind)
        change_weights(tmp_path / kind, lambda weights: weights.update({"other.weight": torch.ones(3)}))
    Target.load(str(tmp_path / "target"))
    with pytest.raises(ValueError, match=r"have unknown other.weight"):
        Drafter.from_pretrained(tmp_path / "drafter")


@pytest.mark.parametrize("tied", [False, True])
def test_what_fits_is_loaded_as_it_was_written(tied, tmp_path):
    target = make_target("smollm2", tie_word_embeddings=tied)
    target.model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    again = Target.load(str(tmp_path))
    for name, value in target.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["target", "drafter"])
@pytest.mark.parametrize("size", [0, 7, 200])
def test_damaged_files_are_one_line(kind, size, folders, tmp_path):
    shutil.copytree(folders / kind, tmp_path / kind)
    path = tmp_path / kind / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    target = make_target("qwen3")
    with pytest.raises(ValueError, match="damaged|cannot load") as refused:
        Target.load(str(tmp_path / kind)) if kind == "target" else load_drafter(tmp_path / kind, target)
    assert "\n" not in str(refused.value)


HOSTILE = [None, "x", -1, 0, 1.5, [], {}, True, 10**30, "1"]
KEYS = ["hidden_size", "num_hidden_layers", "block_size", "target_layer_ids", "mask_token_id", "head_dim"]
KEYS += ["num_attention_heads", "num_key_value_heads", "rms_norm_eps", "dflash_config", "rope_parameters", "dpace"]


@pytest.mark.parametrize("key", KEYS)
def test_a_hostile_config_is_refused_or_harmless(key, folders, tmp_path):
    """Values of the wrong kind give one line, never a traceback of another kind."""
    shutil.copytree(folders / "drafter", tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config, target = json.loads(path.read_text()), make_target("qwen3")
    for value in HOSTILE:
        path.write_text(json.dumps({**config, key: value}))
        try:
            drafter = load_drafter(tmp_path / "d", target)
        except ValueError as error:
            assert "\n" not in str(error), (value, error)
        else:
            is_valid = key == "block_size" and value is None
            assert drafter.block_size == 4 or is_valid, (key, value)
            assert drafter.confidence_temperature == 1.0, (key, value)
    for text in ("", "[]", "{", "\xff", "[" * 100_000):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json"):
            load_drafter(tmp_path / "d", target)


def test_no_code_and_no_attention_of_a_config(folders, tmp_path):
    """`auto_map` is not followed, and attention stays torch's own."""
    shutil.copytree(folders / "target", tmp_path / "t")
    path = tmp_path / "t" / "config.json"
    config = json.loads(path.read_text())
    (tmp_path / "t" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    expected = Target.load(str(folders / "target")).model.config._attn_implementation
    assert expected != "eager"
    for name in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        path.write_text(json.dumps({**config, name: "eager"}))
        target = Target.load(str(tmp_path / "t"))
        assert target.model.config._attn_implementation == expected
    path.write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ValueError):
        Target.load(str(tmp_path / "t"))
    assert not (tmp_path / "ran").exists()
