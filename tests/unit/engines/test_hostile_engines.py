"""Hostile files and folders for the verbs that read them: one clear line, or a right result."""

import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch

from dpace.cli import main
from tests.support.files import change_config, changed_weights

ESC = "\x1b[31m"
BARS = ("Loading weights", "Writing model shards", "examining")


@pytest.fixture(autouse=True)
def _known_target(monkeypatch, language_target):
    """The verbs load the target from memory, where the test does not break its folder."""
    for verb in ("doctor", "export"):
        monkeypatch.setattr(f"dpace.verbs.{verb}.load_target", lambda *_, **__: language_target)
    monkeypatch.setattr("dpace.target.locate.find_target", str)


@pytest.fixture
def folder(random_drafter_folder, tmp_path) -> Path:
    shutil.copytree(random_drafter_folder, tmp_path / "drafter")
    return tmp_path / "drafter"


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that a folder holds, and the folders in it."""
    files = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in files}


def refused(args: list[str], capsys, *expected: str) -> str:
    """The verb ends with 1 or 2, one line on stderr at its end, no traceback and nothing that steers a terminal."""
    capsys.readouterr()
    assert main(args) in (1, 2)
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "\x1b" not in out
    assert len(own_lines(err)) == 1 and own_lines(err)[0].startswith("dpace "), err
    for words in expected:
        assert words in err, err
    return err


def own_lines(text: str) -> list[str]:
    """What dpace wrote, without the progress bars of others."""
    return [line for line in text.strip().splitlines() if line and not any(bar in line for bar in BARS)]


# --- configs and weights: import refuses each in one line, doctor shows a table ---------------------------------------


def config(**changes):
    return lambda folder: change_config(folder, **changes)


def raw(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def weights(make):
    def change(folder):
        with changed_weights(folder) as tensors:
            make(tensors)

    return change


def fifo(name):
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def index(value: object):
    return raw("model.safetensors.index.json", json.dumps(value).encode())


WRONG = {"text": "x", "zero": 0, "huge": 10**12, "fraction": 1.5, "true": True}
FOLDERS = {
    **{f"hidden_size is {kind}": config(hidden_size=value) for kind, value in WRONG.items()},
    **{f"target_layer_ids is {kind}": config(target_layer_ids=value) for kind, value in WRONG.items()},
    "more layers than fit": config(num_hidden_layers=10**6),
    "no head_dim": config(head_dim=None),
    "config is a list": raw("config.json", b"[]"),
    "config is cut": raw("config.json", b'{"block_size": 6,'),
    "config is deep": raw("config.json", b"[" * 100_000),
    "config is no UTF-8": raw("config.json", b'{"a": "\xff"}'),
    "config has an endless number": raw("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"),
    "config is a pipe": fifo("config.json"),
    "an epsilon of a text": config(rms_norm_eps="x"),
    "dflash_config is a list": config(dflash_config=[1]),
    "layer_types is a number": config(layer_types=5),
    "layer ids are floats": config(target_layer_ids=[1.0, 3.0]),
    "the confidence temperature is a text": config(dpace={"confidence_temperature": "hot"}),
    "rope of no known type": config(rope_parameters={"rope_type": ESC, "rope_theta": 1e4}),
    "rope without its factor": config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "rope of two factors": config(
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0], "long_factor": [1.0]}
    ),
    "rope divided by 0": config(
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "original_max_position_embeddings": 0}
    ),
    "an odd head_dim": config(head_dim=33),
    "a block of ages": config(block_size=2**31 - 1),
    "padding of a text": config(pad_token_id="x"),
    "begin of a list": config(bos_token_id=[2]),
    "rope of a text": config(rope_parameters={"rope_type": "default", "rope_theta": "x"}, rope_theta=None),
    "layers out of the target": config(target_layer_ids=[1, 99]),
    "mask token outside": config(mask_token_id=10**6),
    "weights are noise": raw("model.safetensors", bytes(range(256)) * 40),
    "weights have a giant header": raw("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "weights are a pipe": fifo("model.safetensors"),
    "index names numbers": index({"weight_map": {"a": 1}}),
    "index leads elsewhere": index({"weight_map": {"a": "../../secret.safetensors"}}),
    "index names a pickle": index({"weight_map": {"a": "model.bin"}}),
    "a tensor is missing": weights(lambda tensors: tensors.pop("fc.weight")),
    "a tensor too many": weights(lambda tensors: tensors.update({f"{ESC}.weight": torch.zeros(2)})),
    "a layer of a thousand digits": weights(lambda t: t.update({"layers." + "9" * 1000 + ".x": torch.zeros(2)})),
    "a tensor has another shape": weights(lambda tensors: tensors.update({"norm.weight": torch.zeros(3)})),
    "a tensor is not finite": weights(lambda tensors: tensors["norm.weight"].fill_(float("nan"))),
    "a tensor holds integers": weights(lambda t: t.update({"norm.weight": torch.ones(48, dtype=torch.int64)})),
    "a mask embedding of its own": raw("mask_embedding.pt", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_import_refuses_a_folder_in_one_line(fault, folder, tmp_path, capsys):
    FOLDERS[fault](folder)
    before = {path.name for path in folder.iterdir()}
    args = ["import", str(folder), "--output", str(tmp_path / "out")]
    refused(args, capsys)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in folder.iterdir()} == before


def test_what_has_another_type_is_refused_before_decoding(folder, capsys, monkeypatch, language_target):
    monkeypatch.setattr("dpace.verbs.generate.load_target", lambda *_, **__: language_target)
    args = ["generate", "--target", "t", "--drafter", str(folder), "--prompt", "w3 w51", "--max-new-tokens", "4"]
    whole = (folder / "config.json").read_bytes()
    for fault, words in {
        "the confidence temperature is a text": "'hot'",
        "layer ids are floats": "[1.0, 3.0]",
        "rope without its factor": "'rope_type'='yarn': {'factor'}",
        "an odd head_dim": "`head_dim`=33",
        "padding of a text": "'pad_token_id' with value 'x'",
    }.items():
        FOLDERS[fault](folder)
        refused(args, capsys, words, ";")
        (folder / "config.json").write_bytes(whole)
    config(architectures=5)(folder)
    assert main(["doctor", str(folder), "--target", "t"]) == 1


@pytest.mark.parametrize("verb", ["import", "export", "export to speculators", "export to gguf"])
def test_a_full_disk_is_one_line(verb, folder, tmp_path, capsys, target_gguf):
    """The writers of safetensors and of GGUF say it in words of their own."""
    out = tmp_path / "out"
    to = verb.split()[-1].replace("export", "zlab")
    args = [verb.split()[0], str(folder), "--output", str(out)]
    args += ["--target", "t", "--to", to] if verb != "import" else []
    args += ["--target-gguf", str(target_gguf)] if to == "gguf" else []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        refused(args, capsys, f"{out}: ", "make room, and run the same command again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists()


@pytest.mark.parametrize("fault", FOLDERS)
def test_doctor_shows_a_table_for_any_folder(fault, folder, capsys):
    FOLDERS[fault](folder)
    code = main(["doctor", str(folder), "--target", "t"])
    out, err = capsys.readouterr()
    assert code in (0, 1) and "Traceback" not in err and "\x1b" not in out + err
    assert "check" in out and ("found" in out)


@pytest.mark.parametrize(
    "recipe",
    ["[]", "a: &x [1]\nb: *x", "drafter: [", "loss: 5", "drafter: {block_size: " + ESC + "}"],
    ids=["list", "alias", "cut", "number", "escape"],
)
def test_a_recipe_that_cannot_be_read_is_no_trap(recipe, folder, tmp_path, capsys):
    (folder / "recipe.yaml").write_text(recipe)
    assert main(["doctor", str(folder), "--target", "t"]) in (0, 1)
    args = ["export", str(folder), "--target", "t", "--to", "zlab", "--output", str(tmp_path / "o")]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "Traceback" not in err


def test_doctor_reads_responses_and_leaves_them(folder, tmp_path, capsys):
    """Also a file that is still being written, and one that is nothing of the kind."""
    path = tmp_path / "mine.jsonl"
    for text in ('{"id": "a"', '{"a": 1}\n{"b"', "no JSON at all\nmore\n", "\xff\n", '{"id": 5, "token_ids": "x"}\n'):
        path.write_bytes(text.encode("latin-1"))
        assert main(["doctor", str(folder), "--target", "t", "--responses", str(path)]) in (0, 1)
        assert path.read_bytes() == text.encode("latin-1")
    assert "Traceback" not in capsys.readouterr().err


# --- GGUF -------------------------------------------------------------------------------------------------------------


GGUF = {
    "another magic": lambda data: b"GGML" + data[4:],
    "version 99": lambda data: data[:4] + struct.pack("<I", 99) + data[8:],
    "endless tensors": lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:],
    "a giant key": lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:],
    "an endless array": lambda data: data[:8] + struct.pack("<QQQcIIQ", 0, 1, 1, b"x", 9, 4, 2**40),
    "an array of many": lambda data: data[:8] + struct.pack("<QQQcIIQ", 0, 1, 1, b"x", 9, 0, 9999) + bytes(9999),
    **{f"cut at {share} %": lambda data, share=share: data[: len(data) * share // 100] for share in (0, 1, 60)},
    "other bytes": lambda data: data[:200] + bytes(byte ^ 0x5A for byte in data[200:2000]) + data[2000:],
}


@pytest.mark.parametrize("fault", GGUF)
def test_damaged_gguf_files_are_refused(
    fault, random_drafter_gguf, language_folder, random_drafter_folder, target_gguf, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dpace.engines.gguf.MAX_READS", 9000)
    path = tmp_path / "d.gguf"
    path.write_bytes(GGUF[fault](random_drafter_gguf))
    refused(["import", str(path), "--output", str(tmp_path / "a"), "--target", str(language_folder)], capsys)
    path.write_bytes(GGUF[fault](target_gguf.read_bytes()))
    args = ["export", str(random_drafter_folder), "--target", "t", "--to", "gguf", "--output", str(tmp_path / "b")]
    if fault not in ("cut at 60 %", "other bytes"):  # its header is whole: only it is read
        refused([*args, "--target-gguf", str(path)], capsys)
        assert not (tmp_path / "b").exists()
    assert not (tmp_path / "a").exists()


# --- folders of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["export", "import"])
@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors", "the target", "its own", "a file"])
def test_folders_of_others_are_left_alone(verb, name, folder, language_folder, tmp_path, capsys):
    out = tmp_path / "theirs"
    if name == "the target":
        shutil.copytree(language_folder, out)
    elif name == "its own":
        out = folder
    elif name == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / name).write_text("mine")
    before = tree(out) if out.is_dir() else out.read_text()
    args = [verb, str(folder), "--output", str(out), "--target", str(out if name == "the target" else language_folder)]
    refused([*args, *(["--to", "zlab"] if verb == "export" else [])], capsys, "--output")
    assert (tree(out) if out.is_dir() else out.read_text()) == before


LATE = {
    "--to zlab --dtype q8_0": "--dtype is q8_0",
    "--to zlab --plain": "has no head",
    "--to gguf": "name one with --target-gguf",
    "--to gguf --target-gguf nothing.gguf": "there is no file",
    "--to vllm --target-gguf {gguf}": "--target-gguf is for --to gguf",
    "--to speculators --output {trained}": "holds a drafter that dpace trained",
    "--to speculators": "is_causal is true",
}


@pytest.mark.parametrize("flags", LATE)
def test_an_export_that_is_refused_loads_no_target(
    flags, folder, language_drafter_folder, target_gguf, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dpace.verbs.export.load_target", lambda *_, **__: pytest.fail("it was loaded"))
    change_config(folder, is_causal=True)
    words = flags.format(gguf=target_gguf, trained=language_drafter_folder).split()
    refused(["export", str(folder), "--target", "t", "--output", str(tmp_path / "out"), *words], capsys, LATE[flags])
    assert not (tmp_path / "out").exists()


def test_a_failed_comparison_leaves_what_was_there(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    args = ["export", str(folder), "--target", "t", "--to", "zlab", "--output", str(out)]
    for before in ({}, None):
        if before is None:
            assert main(args) == 0
            before = tree(out)
        with monkeypatch.context() as patch:
            patch.setattr("torch.equal", lambda *_: False)
            refused(args, capsys, "does not read back")
        assert (tree(out) if before else out.exists()) == (before or False)
    assert main(args) == 0 and tree(out) == before
