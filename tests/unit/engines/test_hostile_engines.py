"""Broken files and folders of others for the verbs that read and write drafters: one clear line, and nothing lost."""

import json
import os
import resource
import shutil
import struct
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from dpace.cli import main
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines import all_engines
from dpace.target import Target
from tests.support.files import change_config, changed_weights

ESC = "\x1b[31m"


@pytest.fixture(autouse=True)
def _known_target(monkeypatch, language_target):
    """The target `t` comes from memory."""
    load = Target.load
    monkeypatch.setattr(Target, "load", lambda name, **kwargs: language_target if name == "t" else load(name, **kwargs))


@pytest.fixture
def folder(random_drafter_folder, tmp_path) -> Path:
    return shutil.copytree(random_drafter_folder, tmp_path / "drafter")


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder, or the file."""
    return {str(path): path.read_bytes() for path in (folder, *folder.rglob("*")) if path.is_file()}


def refused(line: str, capsys, *expected: str) -> None:
    """It ends with one line that says all of this, and nothing that is printed steers a terminal."""
    capsys.readouterr()
    assert main(line.split()) in (1, 2)
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed and "\x1b" not in printed
    (reason,) = [text for text in printed.splitlines() if text.startswith("dpace ")]
    assert all(words in reason for words in expected), reason


def config(**changes):
    return lambda folder: change_config(folder, **changes)


def raw(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def weights(make):
    def change(folder):
        with changed_weights(folder) as tensors:
            make(tensors)

    return change


FOLDERS = {
    "hidden_size is 2147483648, expected": config(hidden_size=2**31),
    "its weights are quantized": config(quantization_config={"quant_method": "fp8"}),
    "tau_responses is 7, expected": config(dpace={"tau_responses": 7}),
    "model.safetensors: it is a folder, a device or a pipe": lambda folder: (
        (folder / "model.safetensors").unlink(),
        os.mkfifo(folder / "model.safetensors"),
    ),
    "model-2.safetensors: it is a folder, a device or a pipe": lambda folder: (folder / "model-2.safetensors").mkdir(),
    "target_layer_ids is [1, 99]": config(target_layer_ids=[1, 99]),
    "maximum recursion depth": raw("config.json", b"[" * 100_000),
    "a device or a pipe": lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
    "'hot'": config(dpace={"confidence_temperature": "hot"}),
    "of this config: '\\x1b[31m'": config(rope_parameters={"rope_type": ESC, "rope_theta": 1e4}),
    "make them equal": config(rope_theta=1.0),
    "has no rope_theta; add the target's value": config(rope_theta=None, rope_parameters=None),
    "selector_top_k is missing": config(dflash_config={"selector_rank": 256}),
    "sliding layers and no sliding_window": config(layer_types=["sliding_attention"] * 2),
    "causal is True in dflash_config and False at the top": config(dflash_config={"causal": True}),
    "dflash_config.use_swa": config(dflash_config={"use_swa": True}),
    "markov_head_type": config(markov_head_type="gated", markov_rank=8),
    "markov_rank is 8 in dflash_config and 9 at the top": config(markov_rank=9, dflash_config={"markov_rank": 8}),
    "final_logit_softcapping is 30.0, which dpace does not run with the selector markov_head": config(
        markov_rank=8, final_logit_softcapping=30.0
    ),
    "dflash_config.rope_is_neox_style": config(dflash_config={"rope_is_neox_style": False}),
    "are damaged": raw("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "have unknown": weights(lambda tensors: tensors.update({f"{ESC}.weight": torch.zeros(2)})),
    "has NaN or infinity in norm.weight": weights(lambda tensors: tensors["norm.weight"].fill_(float("nan"))),
    "write the target's embedding": raw("mask_embedding.pt", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
}
"""What is said, and what is broken."""


@pytest.mark.parametrize("reason", FOLDERS)
def test_a_broken_folder_is_one_line_of_import_and_a_table_of_doctor(reason, folder, tmp_path, capsys):
    FOLDERS[reason](folder)
    refused(f"import {folder} --output {tmp_path}/out", capsys, reason)
    assert not (tmp_path / "out").exists()
    refused(f"doctor {folder} --target t", capsys, "failed: ", "; the table above says what to do")


EXPORT = "export {folder} --target t --to "


@pytest.mark.parametrize(
    "line", ["import {folder}", f"{EXPORT}zlab", f"{EXPORT}speculators", f"{EXPORT}gguf --target-gguf {{gguf}}"]
)
def test_a_full_disk_is_one_line(line, folder, tmp_path, capsys, target_gguf):
    """The writers of safetensors and of GGUF say it in words of their own."""
    out = tmp_path / "out"
    line = line.format(folder=folder, gguf=target_gguf)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        refused(f"{line} --output {out}", capsys, f"{out}: ", "make room, and run the same command again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in out.iterdir()} <= {".dpace.lock"}


GGUF = {
    "a giant key": lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:],
    "an endless array": lambda data: data[:8] + struct.pack("<QQQcIIQ", 0, 1, 1, b"x", 9, 4, 2**40),
    "cut among the values": lambda data: data[:1500],
    "cut in the weights": lambda data: data[: len(data) * 3 // 5],
}


@pytest.mark.parametrize("fault", GGUF)
def test_damaged_gguf_files_are_refused(
    fault, random_drafter_gguf, folder, language_folder, target_gguf, tmp_path, capsys
):
    path = tmp_path / "d.gguf"
    path.write_bytes(GGUF[fault](random_drafter_gguf))
    out = tmp_path / "out"
    refused(f"import {path} --output {out} --target {language_folder}", capsys, f"cannot load the GGUF file {path}")
    path.write_bytes(GGUF[fault](target_gguf.read_bytes()))
    if fault != "cut in the weights":  # its header is whole: only it is read
        refused(f"export {folder} --target t --to gguf --target-gguf {path} --output {out}", capsys, str(path))
    assert not out.exists()


@pytest.mark.parametrize("verb", ["export --to zlab --drafter", "import"])
@pytest.mark.parametrize("name", ["config.json", "README.md", "its own"])
def test_folders_of_others_are_left_alone(verb, name, folder, language_folder, tmp_path, capsys):
    out = folder if name == "its own" else tmp_path / "theirs"
    if name != "its own":
        out.mkdir()
        (out / name).write_text("mine")
    before = tree(out)
    refused(f"{verb} {folder} --output {out} --target {language_folder}", capsys, "--output")
    assert tree(out) == before


@pytest.mark.parametrize("names", [["../victim.gguf"], [["a"]]], ids=str)
@pytest.mark.parametrize("verb", ["export --to zlab --target t --target-name o/t --drafter", "import"])
def test_a_marker_names_files_of_its_own_folder_only(verb, names, folder, tmp_path, capsys):
    victim = tmp_path / "victim.gguf"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".dpace.json").write_text(json.dumps({"files": names}))
    refused(f"{verb} {folder} --output {tmp_path}/out", capsys, ".dpace.json: files is ", "remove it")
    assert victim.read_text() == "mine"


def test_pipes_are_not_waited_for(folder, language_folder, tmp_path, capsys):
    """A target's weights and GGUF file."""
    target = shutil.copytree(language_folder, tmp_path / "target")
    (target / "model.safetensors").unlink()
    os.mkfifo(target / "model.safetensors")
    refused(
        f"respond --target {target} --output {tmp_path}/out", capsys, "model.safetensors: it is a folder, a device or"
    )
    os.mkfifo(tmp_path / "t.gguf")
    export = f"export {folder} --target t --to gguf --output {tmp_path}/gguf --target-gguf"
    refused(f"{export} {tmp_path}/t.gguf", capsys, "t.gguf: it is a folder, a device or a pipe")


@dataclass(frozen=True)
class GatedSpec(DrafterSpec):
    """What a new part of the layers adds; its author told no engine of it, and gave it no `architecture`."""

    gate_size: int = 0


@pytest.mark.parametrize("to", [engine.name for engine in all_engines()])
def test_what_no_engine_was_told_of_is_refused_by_each(to, folder, target_gguf, tmp_path, capsys, monkeypatch):
    def spec(drafter: Drafter) -> DrafterSpec:
        known = DrafterSpec.from_config(drafter.config.to_dict())
        return GatedSpec(**{field.name: getattr(known, field.name) for field in fields(known)}, gate_size=4)

    gguf = f"--target-gguf {target_gguf}" if to == "gguf" else ""
    line = f"export {folder} --target t --target-name o/t --to {to} {gguf} --output {tmp_path}/"
    assert main(f"{line}without".split()) == 0
    monkeypatch.setattr(Drafter, "spec", property(spec))
    refused(f"{line}with", capsys, "the drafter has gate_size, which ")
    assert not (tmp_path / "with").exists()


LATE = {
    "--to zlab --plain": "has no selector",
    "--to gguf": "name one with --target-gguf",
    "--to gguf --target-gguf nothing.gguf": "nothing.gguf: No such file",
    "--to speculators --output {trained}": "holds a drafter that dpace trained",
    "--to speculators": "is_causal is true",
    "--to vllm --drafter {gguf}": "is for llama.cpp, not in the published layout; convert it with `dpace import`",
}


@pytest.mark.parametrize("flags", LATE)
def test_an_export_that_is_refused_loads_no_target(
    flags, folder, language_drafter_folder, target_gguf, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dpace.verbs.export.load_target", lambda *_, **__: pytest.fail("it was loaded"))
    change_config(folder, is_causal=True)
    words = flags.format(gguf=target_gguf, trained=language_drafter_folder)
    line = f"export --drafter {folder} --target t --output {tmp_path}/out {words}"
    refused(line, capsys, LATE[flags])
    assert not (tmp_path / "out").exists()
