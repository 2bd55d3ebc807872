"""Weights that do not fit, or are not numbers, are refused by name; no code of a checkpoint runs."""

import os
import shutil

import httpx
import pytest
import torch

from dpace.drafter import Drafter
from dpace.system.loading import translate_library_errors
from dpace.target import Target
from tests.support.files import change_config, changed_weights
from tests.support.models import make_target, make_with_markov_head


@pytest.fixture
def folders(language_folder, random_drafter_folder) -> dict:
    """A target's and its drafter's folder; tests change copies."""
    return {"target": language_folder, "drafter": random_drafter_folder}


LOADERS = {"target": lambda folder: Target.load(str(folder)), "drafter": Drafter.from_pretrained}
NAMES = {"target": "model.layers.1.mlp.up_proj.weight", "drafter": "layers.1.mlp.up_proj.weight"}
FAULTS = {
    "missing": (lambda w, n: w.pop(n), "lack {}"),
    "other shape": (lambda w, n: w.update({n: w[n][:-1].clone()}), r"have other shapes: {} is \["),
    "infinite": (lambda w, n: w[n].view(-1)[3:4].fill_(float("-inf")), "NaN or infinity in {}"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", LOADERS)
def test_weights_that_do_not_fit_are_refused_by_name(kind, fault, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    change, message = FAULTS[fault]
    with changed_weights(folder) as weights:
        change(weights, NAMES[kind])
    with pytest.raises(ValueError, match=message.format(NAMES[kind])) as refused:
        LOADERS[kind](folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    os.truncate(folder / "model.safetensors", 200)
    with pytest.raises(ValueError, match="damaged|cannot load"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("name", ["norm.weight", "markov_head.markov_w2.weight"])
def test_whole_numbers_are_no_weights(name, tmp_path):
    make_with_markov_head(make_target("qwen3")).save_pretrained(tmp_path / "d")
    with changed_weights(tmp_path / "d") as weights:
        weights[name] = weights[name].to(torch.int8)
    with pytest.raises(ValueError, match=f"has {name} in torch.int8, expected numbers with a point; copy"):
        Drafter.from_pretrained(tmp_path / "d")


def test_only_a_drafter_refuses_tensors_that_it_does_not_know(folders, tmp_path):
    """A target's file may have heads for other uses."""
    for kind in ("target", "drafter"):
        shutil.copytree(folders[kind], tmp_path / kind)
        with changed_weights(tmp_path / kind) as weights:
            weights["other.weight"] = torch.ones(3)
    Target.load(str(tmp_path / "target"))
    with pytest.raises(ValueError, match=r"have unknown other.weight"):
        Drafter.from_pretrained(tmp_path / "drafter")


def test_a_connection_that_breaks_is_one_line():
    with pytest.raises(ValueError, match="cannot load the target x: cut; again"):  # noqa: SIM117
        with translate_library_errors("the target x", "again"):
            raise httpx.RemoteProtocolError("cut")


def test_no_code_and_no_attention_of_a_config(folders, tmp_path, monkeypatch):
    """`auto_map` is not followed, and attention stays torch's own; the Hub's bot converts no pickle."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    shutil.copytree(folders["target"], tmp_path / "t")
    (tmp_path / "t" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    change_config(tmp_path / "t", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    expected = Target.load(str(folders["target"])).model.config._attn_implementation
    assert expected != "eager"
    for name in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        change_config(tmp_path / "t", **{name: "eager"})
        target = Target.load(str(tmp_path / "t"))
        assert target.model.config._attn_implementation == expected
        change_config(tmp_path / "t", **{name: None})
    change_config(tmp_path / "t", model_type="evil")
    with pytest.raises(ValueError):
        Target.load(str(tmp_path / "t"))
    assert not (tmp_path / "ran").exists() and os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
