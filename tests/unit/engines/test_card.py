"""The model card, the verbs that write it, and the command of each engine."""

import json
import re
import shlex
import shutil

import pytest
import transformers
import yaml

from dpace.cli import main
from dpace.decode.loop import generate_plain
from dpace.drafter.spec import DrafterSpec, read_folder
from dpace.engines import EngineName, engine_of
from dpace.engines.card import engine_sections
from dpace.measure.results import write_results
from dpace.system.ledger import MARKER
from dpace.system.provenance import fingerprint
from tests.conftest import make_drafter, make_target
from tests.support.files import read_json
from tests.support.rows import make_bench, make_row
from tests.unit.engines.conftest import quiet
from tests.unit.target.test_target_files import write_adapter


def test_commands_and_cards_say_what_the_engine_must_know(folders):
    """Engines count slots in ways of their own; not all read tables of the drafter's own, or a scaled rotation."""
    spec, anchored, own = (read_folder(folders[kind])[0] for kind in ("trained", "anchored", "own"))

    def command(name: EngineName, spec: DrafterSpec = spec) -> str:
        return engine_of(name).command(spec, "d", "t")

    assert command("sglang").endswith("--speculative-dflash-block-size 6")
    assert "--spec-type draft-dflash --spec-draft-n-max 5" in command("gguf")
    assert "--spec-type draft-dspark --spec-draft-n-max 5" in command("gguf", anchored)
    assert "max_draft_len: 5" in command("tensorrt")
    for each in (spec, anchored):
        assert json.loads(shlex.split(command("vllm", each))[-1])["num_speculative_tokens"] == 5
    for name in ("transformers", "zlab"):
        compile(command(name), name, "eval")
    published = {"vllm", "sglang", "tensorrt", "transformers"}
    scaled = make_drafter(make_target("llama3.1")).spec
    for each, names in ((spec, published), (own, {"vllm"}), (scaled, published)):
        first, *others = engine_sections("published", each, "d", "t")
        assert first == "vllm" and {first, *others} == names


def test_the_card_has_measured_rows_of_these_weights_and_the_recipe(
    do_export, language_drafter, language_drafter_folder, tmp_path, capsys
):
    """Not those of another drafter, and nothing of files that cannot be read."""
    source = shutil.copytree(language_drafter_folder, tmp_path / "run" / "drafter")
    rows = [
        make_row(drafter=name, set="language", tau=(tau, None, None)) for name, tau in (("mine", 2.34), ("other", 3.45))
    ]
    hashes = {"mine": fingerprint(language_drafter), "other": "0" * 64}
    write_results(tmp_path / "run" / "results.json", make_bench(*rows, drafters=hashes))
    text = (do_export("zlab", folder=source, name="me/tiny-DFlash", license="mit") / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert (front["base_model"], front["license"], front["library_name"]) == ("some/target", "mit", "transformers")
    assert {"dflash", "vllm"} <= set(front["tags"])
    for part in ("objective `dpace` ([D-PACE]", "max_steps: 120", '"num_speculative_tokens": 5', "not run by us"):
        assert part in text
    assert re.search(r"\| language .*\| 2.34", text) and "3.45" not in text
    assert str(tmp_path) not in text and "feature_servers" not in text
    for path in (tmp_path / "run" / "results.json", source / "recipe.yaml"):
        path.write_text("[]")
    text = (do_export("zlab", folder=source) / "README.md").read_text()
    assert "2.34" not in text and "max_steps" not in text
    said = capsys.readouterr().err
    assert all(f"the model card has nothing of {name}: " in said for name in ("results.json", "recipe.yaml"))


@quiet
def test_the_card_of_a_target_in_a_folder_has_commands_that_run_here(
    language_folder, language_target, do_export, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(language_folder.parent)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = do_export("zlab", target=language_folder.name, name=None)
    text = (path / "README.md").read_text()
    assert f"`{language_folder.name}` is a folder: elsewhere, put the target's Hub id" in text
    assert "base_model" not in text and f"vllm serve {language_folder.name} " in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    capsys.readouterr()
    exec(compile(code.replace('"..."', '"w3 w51"').replace(": 256", ": 20"), "README.md", "exec"), {})
    ids = language_target.tokenizer("ask w3 w51 answer")["input_ids"]
    plain = generate_plain(language_target, ids, max_new_tokens=20).token_ids
    expected = language_target.tokenizer.decode(plain, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_folder_holds_the_last_export_only(folder, language_folder, target_gguf, tmp_path, capsys):
    """What dpace wrote of an earlier one is removed and named; files of others stay.

    A name of the target keeps its place on this machine out of all files.
    """
    (out := tmp_path / "out").mkdir()
    (out / "own.gguf").write_text("mine")
    command = f"export {folder} --output {out} --target {language_folder} --name me/x"
    assert main(f"{command} --to zlab".split()) == 1
    assert f"the target {language_folder} is a place on this machine" in capsys.readouterr().err
    exports = {
        "zlab": {"config.json", "model.safetensors", "modeling_dflash.py"},
        f"gguf --dtype float16 --target-gguf {target_gguf}": {"dflash-t-float16.gguf"},
        "speculators": {"config.json", "model.safetensors"},
    }
    before: set[str] = set()
    for to, names in exports.items():
        assert main(f"{command} --target-name me/t --to {to}".split()) == 0
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."}
        assert files.keys() == {*names, "README.md", "own.gguf"}
        assert not any(str(language_folder.parent).encode() in content for content in files.values())
        assert b'base_model: "me/t"' in files["README.md"] and b"\n# x\n" in files["README.md"]
        printed, said = capsys.readouterr()
        removed = before - names
        assert all(name in said for name in removed) and ("earlier drafter" in said) == bool(removed)
        assert "tensors read back bit for bit" in printed
        before = names
    assert set(read_json(out / MARKER)["files"]) == {*before, "README.md"}


@quiet
def test_an_adapter_is_to_be_merged(folder, language_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    write_adapter(shutil.copytree(language_folder, tmp_path / "base"), width=48)
    command = f"export {folder} --target lora --to vllm --output out"
    assert main(command.split()) == 0
    assert "lora is a LoRA adapter, which engines do not serve as a model; merge it with" in capsys.readouterr().err
    assert main(f"{command} --target-name me/merged".split()) == 0
    assert "LoRA" not in capsys.readouterr().err
