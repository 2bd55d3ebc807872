"""The model card, the verbs that write it, and the command of each engine."""

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import transformers
import yaml

from dpace.config import EngineName
from dpace.decode.loop import generate_plain
from dpace.drafter.spec import DrafterSpec, read_folder
from dpace.engines import engine_of
from dpace.measure.results import write_results
from dpace.publish.card import engine_sections
from dpace.system.ledger import MARKER
from dpace.system.provenance import Hardware, fingerprint, hash_file
from tests.support.families import make_sharp_target
from tests.support.files import change_config, read_json
from tests.support.models import make_drafter, make_target, make_tokenizer, write_target_gguf
from tests.support.rows import make_bench, make_row, make_served, make_servers
from tests.unit.engines.conftest import MARKOV, quiet

BESIDE = ("README.md", "speculation_profile.json")
"""What stands beside the files of each engine."""


def test_commands_and_cards_say_what_the_engine_must_know(folders):
    """Engines count slots in ways of their own; not all read tables of the drafter's own, or a scaled rotation."""
    spec, anchored, own = (read_folder(folders[kind])[0] for kind in ("trained", "anchored", "own"))

    def command(name: EngineName, spec: DrafterSpec = spec) -> str:
        return engine_of(name).command(spec, "d", "t")

    assert command("sglang").endswith("--speculative-dflash-block-size 6")
    assert "--spec-type draft-dflash --spec-draft-n-max 5" in command("gguf")
    assert "--spec-type draft-dspark --spec-draft-n-max 5" in command("gguf", anchored)
    markov, from_anchor = (read_folder(folders[kind])[0] for kind in MARKOV)
    for each in (markov, from_anchor):
        assert "--spec-type draft-dspark --spec-draft-n-max 5" in command("gguf", each)
        assert json.loads(shlex.split(command("vllm", each))[-1]).items() >= {
            "method": "dspark", "num_speculative_tokens": 5
        }.items()  # fmt: skip
    assert "max_draft_len: 5" in command("tensorrt")
    for each in (spec, anchored):
        assert json.loads(shlex.split(command("vllm", each))[-1])["num_speculative_tokens"] == 5
    for name in ("transformers", "zlab"):
        compile(command(name), name, "eval")
    assert "num_assistant_tokens=5" in command("openvino")
    assert "input_embedding_scale is 2.0" in engine_of("openvino").fault(replace(spec, input_embedding_scale=2.0))
    published = {"vllm", "sglang", "tensorrt", "transformers", "openvino"}
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
        make_row(
            drafter=name,
            set="language",
            tau=(tau, None, None),
            block_size=6,
            histogram=[1, 0, 0, 0, 0, 1],
            reach_rate=[0.5] * 5,
        )
        for name, tau in (("mine", 2.34), ("other", 3.45))
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
    profile = read_json(tmp_path / "zlab" / "speculation_profile.json")
    assert profile["per_category"] == {"language": 3.5} and profile["target_model"] == {"path": "some/target"}
    assert str(tmp_path) not in text and "feature_servers" not in text
    for path in (tmp_path / "run" / "results.json", source / "recipe.yaml"):
        path.write_text("[]")
    text = (do_export("zlab", folder=source) / "README.md").read_text()
    assert "2.34" not in text and "max_steps" not in text
    assert read_json(tmp_path / "zlab" / "speculation_profile.json")["measured"] is False
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
    assert f"`{language_folder.name}` is a place on the machine that wrote this card: elsewhere, put" in text
    assert "base_model" not in text and f"vllm serve {language_folder.name} " in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    capsys.readouterr()
    exec(compile(code.replace('"..."', '"w3 w51"').replace(": 256", ": 20"), "README.md", "exec"), {})
    ids = language_target.tokenizer("ask w3 w51 answer")["input_ids"]
    plain = generate_plain(language_target, ids, max_new_tokens=20).token_ids
    expected = language_target.tokenizer.decode(plain, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_doctor_says_what_an_export_is(do_export, language_folder, run_line):
    path = do_export("speculators")
    (line,) = run_line(f"doctor {path} --target {language_folder}", 1).err.splitlines()
    assert f"{path} is for speculators, not in the published layout; convert it" in line


def test_a_folder_holds_the_last_export_only(folder, language_folder, target_gguf, run_line, tmp_path):
    """What dpace wrote of an earlier one is removed and named; files of others stay.

    A name of the target keeps its place on this machine out of all files.
    """
    (out := tmp_path / "out").mkdir()
    (out / "own.gguf").write_text("mine")
    command = f"export {folder} --output {out} --target {language_folder} --name me/x"
    assert f"the target {language_folder} is a place on this machine" in run_line(f"{command} --to zlab", 1).err
    exports = {
        "zlab": {"config.json", "model.safetensors", "modeling_dflash.py"},
        f"gguf --dtype float16 --target-gguf {target_gguf}": {"dflash-t-F16.gguf"},
        "speculators": {"config.json", "model.safetensors"},
    }
    before: set[str] = set()
    for to, names in exports.items():
        printed, said = run_line(f"{command} --target-name me/t --to {to}")
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."}
        assert files.keys() == {*names, *BESIDE, "own.gguf"}
        assert not any(str(language_folder.parent).encode() in content for content in files.values())
        assert b'base_model: "me/t"' in files["README.md"] and b"\n# x\n" in files["README.md"]
        removed = before - names
        assert all(name in said for name in removed) and ("earlier drafter" in said) == bool(removed)
        assert "tensors read back bit for bit" in printed
        before = names
    assert set(read_json(out / MARKER)["files"]) == {*before, *BESIDE}


ENDED = "of which llama.cpp (b11549) hands out no inputs of layers"


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "llama", "gpt-oss"])
def test_a_target_whose_layers_llamacpp_does_not_hand_out_is_refused(
    architecture, folder, language_folder, language_target, run_line, tmp_path
):
    """By the architecture of its file; the card of the others names that file."""
    file = write_target_gguf(language_target, tmp_path / "my-target.gguf", architecture)
    command = f"export {folder} --target {language_folder} --to gguf --target-gguf {file} --output {tmp_path / 'out'}"
    is_known = architecture in ("llama", "gpt-oss")
    said = run_line(command, 0 if is_known else 1).err
    if is_known:
        assert "\nllama-server -m my-target.gguf -md dflash-" in (tmp_path / "out" / "README.md").read_text()
    else:
        (line,) = said.splitlines()
        assert f"the target is a {architecture}, {ENDED}" in line and "serve this drafter with vLLM" in line
        assert not (tmp_path / "out").exists()


@quiet
def test_of_such_a_target_no_page_speaks_of_llamacpp(run_line, tmp_path):
    """Where only its config is known, that of a Qwen2."""
    target = make_sharp_target("qwen2", num_hidden_layers=6)
    target.model.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).save_pretrained(tmp_path / "drafter")
    names = f"{tmp_path / 'drafter'} --target {tmp_path / 'target'}"
    printed, said = run_line(f"doctor {names} --engine gguf", 1)
    assert "engine: gguf" in said and "qwen2" in printed and "llama-server" not in printed
    run_line(f"export {names} --to vllm --output {tmp_path / 'out'}")
    assert "llama.cpp" not in (tmp_path / "out" / "README.md").read_text()


SLOWER = "**Measured slower than without it: do not serve.**"


@pytest.mark.parametrize(
    ("rates", "speeds", "speedup", "number", "is_slower"),
    [
        ([0.5, 0.2, 0.1, 0.05, 0.0], (10.0, 20.0), (0.5, 0.4, 0.6), 1, True),  # 3.7 tokens' time: 0.54 for each
        ([0.9, 0.5, 0.4, 0.1, 0.05], (20.0, 12.0), (1.7, 1.6, 1.8), 3, False),  # 1.77: 0.154 for each
        ([0.5, 0.2, 0.1, 0.05, 0.0], (10.0, 11.0), (0.9, 0.7, 1.2), 1, False),  # not clear
        (None, (), (), 3, False),  # no whole drafts: accepted in a tenth of the verifications of the training
    ],
)
def test_the_card_recommends_as_many_drafts_as_pay(
    rates,
    speeds,
    speedup,
    number,
    is_slower,
    language_drafter,
    language_drafter_folder,
    language_folder,
    run_line,
    tmp_path,
):
    """By reach rate and break-even, of whole drafts with these weights; a measured loss is the card's first line."""
    source = shutil.copytree(language_drafter_folder, tmp_path / "run" / "drafter")
    assert len(read_json(source / "config.json")["dpace"]["reach_rate"]) == 5
    change_config(source, dpace={"reach_rate": [0.6, 0.3, 0.1, 0.09, 0.0]})
    row = make_row(width="auto", decode_speedup=(2.0, 1.9, 2.1))
    hashes = {"dpace": fingerprint(language_drafter)}
    write_results(tmp_path / "run" / "results.json", make_bench(row, replace(row, width="copies"), drafters=hashes))
    most = language_drafter.config.block_size - 1
    assert most == 5
    if rates:
        row = make_row(
            block_size=6,
            histogram=[1] * 6,
            reach_rate=rates,
            decode_speedup=speedup,
            tokens_per_second=speeds[0],
            plain_tokens_per_second=speeds[1],
        )
        copied = replace(row, width="auto", reach_rate=[1.0] * 5, decode_speedup=(2.0, 1.9, 2.1))
        write_results(tmp_path / "run" / "results.json", make_bench(row, copied, drafters=hashes))
    out = tmp_path / "out"
    run_line(f"export {source} --target {language_folder} --to vllm --output {out}")
    text = (out / "README.md").read_text()
    assert f'"num_speculative_tokens": {number}' in text and f"--speculative-dflash-block-size {number + 1}" in text
    first = text.split("\n# out\n\n")[1].splitlines()[0]
    assert first.startswith(SLOWER) == is_slower and text.count(SLOWER) == is_slower
    assert (f"draft {number} of the 5 draft tokens" in text) == (number < 5)
    assert ("in training, these were accepted in a tenth" in text) == (rates is None)
    assert "was not measured" not in text
    assert f"`dpace export {out} --target" in text and "--output out-gguf`" in text


@pytest.mark.parametrize(("to", "engine"), [("gguf", "llama.cpp"), ("vllm", "vllm")])
def test_the_card_has_the_depth_that_an_engine_measured(
    to, engine, language_drafter_folder, language_folder, target_gguf, run_line, tmp_path
):
    """With these weights, and only for that engine: the smallest that is the best of a set."""
    source = shutil.copytree(language_drafter_folder, tmp_path / "run" / "drafter")
    speedups = [(0.9, 0.8, 0.95), (1.5, 1.4, 1.6), (1.3, 1.2, 1.4)]
    rows = [
        make_served(set=name, depth=depth, decode_speedup=speedup)
        for name, order in (("code", speedups), ("notes", speedups[:1] * 3))
        for depth, speedup in zip(("1", "3@0.5+ngram-simple", "4"), order, strict=True)
    ]
    results = make_servers(*rows)
    servers = {depth: replace(at, engine=engine, version="b7") for depth, at in results.servers.items()}
    hardware = Hardware(device="a processor", cores=2, torch_threads=1)
    digest = hash_file(source / "model.safetensors")
    flags = f"--target-gguf {target_gguf}" if to == "gguf" else ""

    def card(**changes) -> str:
        write_results(tmp_path / "run" / "servers.json", replace(results, servers=servers, **changes))
        run_line(f"export {source} --target {language_folder} --to {to} {flags} --output {tmp_path / 'out'}")
        return " ".join((tmp_path / "out" / "README.md").read_text().split())

    assert "times as fast" not in card(drafter_sha256="1" * 64)
    text = card(drafter_sha256=digest, hardware=hardware)
    said = "code (T=0) 3@0.5+ngram-simple, 1.50 [1.40, 1.60] times as fast; notes (T=0) none: do not draft."
    assert f"with {engine} b7 on a processor (2 cores), best number" in text and said in text
    if to == "gguf":
        assert (
            "flash,ngram-simple --spec-draft-n-max 3 --spec-draft-p-min 0.5 ```" in text
            and "was not measured. Try" not in text
        )
    else:
        assert '"num_speculative_tokens": 3}' in text and "--speculative-dflash-block-size 6" in text
    assert "on another machine than dpace" in card(drafter_sha256=digest)
