"""Options and features that a page shows together, run together through the command line on tiny models.

A pair is its commands, and the file that they leave, or what it or the last command says; or the words with which it is
refused.
"""

import re
import shlex
import shutil
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from dpace.cli import main
from tests.support.cases import wide
from tests.support.files import change_config, changed_weights, write_prompts, write_rows
from tests.support.models import BYTE_TOKENIZER, BYTE_TOKENS, make_target, write_target_gguf
from tests.unit.respond.test_respond import Stub
from tests.unit.target.test_target_files import write_adapter, write_fp8


class Pair(NamedTuple):
    """Commands with names of the files in braces, and what comes of them; texts are regular expressions."""

    commands: str
    written: str = ""
    refused: str = ""
    printed: str = ""


RECIPE = "{recipe} --output {out}"
TARGET = "--target {target} --drafter {drafter}"
FROM = "--drafter.init {drafter} --target {target} --prompts.path {prompts} --output {out} --respond.max-new-tokens 12"
TOO_LONG = "of up to 300 new tokens it passes the target's limit of 256"
CELL = "--output {out}/new --objectives dpace --baseline dpace --seeds 0 --bench.num-prompts 0"
SMALL = r"drafter: 0\.0\d+ M parameters"
"""One of a single layer."""
PAIRS = {
    "compare, from another drafter": Pair(
        f"compare {RECIPE} --drafter.init {{drafter}} --objectives dpace --seeds 0 --bench.num-prompts 0",
        "dflash/seed-0/heldout.json",
    ),
    "compare again, other held-out prompts": Pair(
        f"compare {{recipe}} --prompts.heldout-path {{first}} {CELL}; "
        f"compare {{recipe}} --prompts.heldout-path {{second}} {CELL}",
        "new/dpace/seed-0/heldout.json",
        printed=r'"ids": \[\s*"b"\s*\]',
    ),
    "compare, growing blocks, hidden states on disk, soft labels": Pair(
        f"compare {RECIPE} --train.grow-blocks --train.feature-files {{out}}/states --objectives dpace+kl --seeds 0 "
        "--bench.num-prompts 0",
        "dpace+kl/seed-0/heldout.json",
    ),
    "compare where bench measured": Pair(
        f"bench {RECIPE} --drafters {{drafter}}; compare {RECIPE}",
        refused="results.json holds what another verb measured; name another folder with --output",
    ),
    "prompts that moved after they were answered": Pair(
        f"train {RECIPE} --prompts.path {{moved}}",
        refused="has an answer with the id .*, but to another text",
    ),
    "prompts that were added after they were answered": Pair(
        f"plan {RECIPE} --prompts.path {{more}}", printed="[34] prompts left out: no answer;"
    ),
    "replies that were corrected after they were taken": Pair(
        "respond {recipe} --output {out}/a --prompts.path {own} --respond.source own; "
        "respond {recipe} --output {out}/a --prompts.path {corrected} --respond.source own",
        refused="has an answer with the id .*, but to another text",
    ),
    "bench, held-out prompts that were trained on": Pair(
        "train {recipe} --output {out} --prompts.num-heldout 1; bench {recipe} --output {out} --prompts.num-heldout 1; "
        "bench {recipe} --output {out}",
        refused="holds a run with other .*; the held-out prompts may be among them",
    ),
    "the recipe of a drafter that started from another": Pair(
        f"train {RECIPE} --drafter.init {{drafter}}; train {{out}}/drafter/recipe.yaml", "drafter/provenance.json"
    ),
    "compare, soft labels of the recipe": Pair(
        f"compare {RECIPE} --loss.token-loss kl",
        refused="--loss.token-loss and --loss.confidence are taken from the names of --objectives",
    ),
    "a selector, soft labels, compare": Pair(
        f"compare {RECIPE} --drafter.selector lilicorr --objectives dpace dpace+kl",
        refused=r"objectives such as dpace\+kl",
    ),
    "from a causal drafter, and not causal": Pair(
        "respond {recipe} --output {out}/a; train {recipe} --output {out}/a --drafter.causal; "
        "train {recipe} --output {out}/a --drafter.init {out}/a/drafter --drafter.no-causal",
        refused="--drafter.causal is False, but .* has True; leave --drafter.causal out",
    ),
    "convolutions, draft vocabulary, export": Pair(
        f"train {RECIPE} --drafter.conv-kernel-size 2; "
        "export {out}/drafter --target {target} --to zlab --output {out}/zlab; "
        "generate --target {target} --drafter {out}/zlab --prompt w1 --max-new-tokens 8",
        "zlab/README.md",
    ),
    "windows, causal blocks, mixed layers, bench, export, generate": Pair(
        f"train {RECIPE} --drafter.num-layers 2 --drafter.sliding-window 9 --drafter.full-layers 1 --drafter.causal; "
        f"bench {RECIPE} --drafters {{out}}/drafter; "
        "export {out}/drafter --target {target} --to vllm --output {out}/vllm; "
        "generate --target {target} --drafter {out}/vllm --prompt w1 --width 3 --max-new-tokens 8",
        "vllm/README.md",
    ),
    "a selector, windows, growing blocks, export, doctor": Pair(
        f"train {RECIPE} --drafter.selector lilicorr --drafter.selector-candidates 4 --drafter.sliding-window 9 "
        "--train.grow-blocks; "
        "generate --target {target} --drafter {out}/drafter --prompt w1 --stream --max-new-tokens 8; "
        "export {out}/drafter --target {target} --to vllm --output {out}/vllm; "
        "doctor {out}/vllm --target {target} --engine vllm",
        "vllm/README.md",
    ),
    "a selector, servers of hidden states": Pair(
        f"train {RECIPE} --drafter.selector lilicorr --train.feature-files {{out}}/states "
        "--train.feature-servers http://127.0.0.1:9",
        refused="--loss.selector-penalty 0",
    ),
    "plan, sizes of the drafter to start from": Pair(f"plan {FROM} --device cpu", printed=SMALL),
    "several drafters in folders of one name, several sets, report": Pair(
        f"bench {RECIPE} --bench.drafters {{drafter}} {{other}} --bench.sets one two --bench.sets-dir {{sets}}; "
        "report {out}",
        "report.html",
    ),
    "servers, hidden states on disk": Pair(
        "respond {recipe} --output {out}/new --respond.server {server}; "
        "train {recipe} --output {out}/new --train.feature-files {out}/states",
        "new/drafter/provenance.json",
        printed=r"\n100% of the tokens of the given answers, in a sample",
    ),
    "own answers, train": Pair(
        "respond {recipe} --prompts.path {own} --output {out}/new --respond.source own; "
        "train {recipe} --prompts.path {own} --output {out}/new",
        "new/drafter/provenance.json",
        printed=r"\n\d{1,2}% of the tokens of the given answers, in a sample",
    ),
    "stream, sampling": Pair(
        f"generate {TARGET} --prompt 'w3 w51' --stream --temperature 0.8 --seed 1 --max-new-tokens 8",
        printed=r"w\d+",
    ),
    "several widths, verify rules and drafters, report": Pair(
        f"bench {RECIPE} --drafters {{drafter}} {{other}} --verify-rules speculative equality --temperatures 0.7 "
        "--widths 4 auto; report {out}",
        "report.html",
    ),
    "servers of hidden states, soft labels": Pair(
        f"train {RECIPE} --loss.token-loss kl --train.feature-files {{out}}/states "
        "--train.feature-servers http://127.0.0.1:9",
        refused="give no input of the LM head",
    ),
}
TURNS = "{recipe} --output {out}/t --prompts.path {turns}"
THINKING = "{recipe} --output {out}/t --thinking"
LIMIT = "{recipe} --output {out}/l --prompts.limit 12 --prompts.num-validation 2"
LAPTOP = (
    "laptop --target {target} --prompts.path {prompts} --output {out}/l --respond.max-new-tokens 24 "
    "--drafter.num-features 3"
)
LILICORR = "--drafter.selector lilicorr --drafter.selector-candidates 4"
ADAPTER = "{recipe} --target {adapter} --output {out}/new"
SERVED = "{recipe} --target {served} --output {out}/new"
QUANTIZED = "{recipe} --target {quantized} --output {out}/new"
CHECK = "--drafter {out}/new/drafter --prompts {prompts} --num-prompts 1 --max-new-tokens 6"
PAIRS |= {
    "turns, messages, every verb": Pair(
        f"respond {TURNS}; train {TURNS}; bench {TURNS} --num-prompts 2; "
        "check --target {target} --drafter {out}/t/drafter --prompts {turns} --num-prompts 1 --max-new-tokens 6; "
        f"plan {TURNS}",
        "t/results.json",
    ),
    "thinking, every verb": Pair(
        f"respond {THINKING}; train {THINKING}; bench {THINKING}; "
        "doctor {out}/t/drafter --target {target} --thinking; "
        "generate --target {target} --drafter {out}/t/drafter --prompt 'w3 w51' --thinking --max-new-tokens 4",
        printed=r"w\d+",
    ),
    "a limit, a number of validation prompts": Pair(
        f"respond {LIMIT}; train {LIMIT}; bench {LIMIT}", "l/drafter/provenance.json"
    ),
    "the recipe of docs/laptop.md, whose blocks grow": Pair(
        f"respond {LAPTOP}; plan {LAPTOP} --minutes 60; train {LAPTOP} --train.max-steps 3 --train.eval-steps 3; "
        f"bench {LAPTOP} --bench.num-prompts 1",
        "l/drafter/provenance.json",
    ),
    "the same with short blocks": Pair(
        f"respond {LAPTOP}; train {LAPTOP} --drafter.block-size 3",
        refused="take --train.no-grow-blocks, or blocks of 4",
    ),
    "public sets": Pair(
        f"plan {RECIPE} --prompts.decontaminate {{sets}}/one.jsonl",
        printed="2 prompts left out: in the public sets\n",
    ),
    "from a drafter with a selector": Pair(
        f"train {RECIPE} {LILICORR}; respond {{recipe}} --output {{out}}/b; "
        "train {recipe} --output {out}/b --drafter.init {out}/drafter; "
        "generate --target {target} --drafter {out}/b/drafter --prompt 'w3 w51' --max-new-tokens 4",
        printed=r"w\d+",
    ),
    "DFlash2, out and in again": Pair(
        f"train {RECIPE} --drafter.conv-kernel-size 2 --drafter.selector candidate_selector "
        "--drafter.selector-candidates 4; "
        "doctor {out}/drafter --target {target} --engine zlab; respond {recipe} --output {out}/c; "
        "export {out}/drafter --target {target} --to gguf --target-gguf {gguf} --output {out}/g; "
        "train {recipe} --output {out}/c --drafter.init {out}/g/{file}",
        "c/drafter/provenance.json",
    ),
    "DSpark, out and in again": Pair(
        f"train {RECIPE} --drafter.selector markov_head --drafter.selector-width 16 --drafter.causal "
        "--drafter.num-features 3 --drafter.intermediate-size 32 --train.grow-blocks; "
        "doctor {out}/drafter --target {target} --engine vllm; respond {recipe} --output {out}/c; "
        "export {out}/drafter --target {target} --to gguf --target-gguf {gguf} --output {out}/g; "
        "train {recipe} --output {out}/c --drafter.init {out}/g/{dspark} --drafter.num-features 3",
        "c/drafter/provenance.json",
    ),
    "from a GGUF file": Pair(
        "export {drafter} --target {target} --to gguf --target-gguf {gguf} --output {out}/g; "
        f"train {RECIPE} --drafter.init {{out}}/g/{{file}}",
        "drafter/provenance.json",
    ),
    "compare, own answers": Pair(
        "compare {recipe} --output {out}/a --prompts.path {own} --respond.source own",
        refused="--respond.source is own, and `dpace compare` measures tau on what the target answers",
    ),
    "compare, answers of another length": Pair(
        f"compare {RECIPE} --respond.max-new-tokens 8", refused="max_new_tokens 12, not 8"
    ),
    "own answers, servers": Pair(
        "respond {recipe} --output {out}/a --prompts.path {own} --respond.source own --respond.server http://x",
        refused="--respond.server asks servers for answers, and --respond.source own takes those of the file",
    ),
    "held-out prompts of a file, all others like public ones": Pair(
        "respond {recipe} --output {out}/a --prompts.heldout-path {sets}/one.jsonl --prompts.path {sets}/two.jsonl "
        "--prompts.decontaminate {sets}/two.jsonl",
        refused="two.jsonl has no prompt left to train on",
    ),
    "bench, a later turn that is too long": Pair(
        f"bench {RECIPE} --drafters {{drafter}} --sets later --sets-dir {{sets}}",
        refused="prompt later/1 has .* tokens; with 2 answers of up to 8 new tokens it passes the target's limit",
    ),
    "respond, more tokens than the target reads": Pair(
        f"respond {RECIPE}/new --respond.max-new-tokens 300", refused=TOO_LONG
    ),
    "bench, no drafter": Pair("bench {recipe} --output {out}/off", refused="there is no drafter"),
    "bench, a folder of sets, no sets": Pair(
        f"bench {RECIPE} --drafters {{drafter}} --sets-dir {{sets}}", refused="name those to measure on"
    ),
    "plan, an option of another selector": Pair(
        f"plan {RECIPE} --drafter.selector candidate_selector --loss.selector-penalty 0.5",
        refused="--loss.selector-penalty is 0.5, and --drafter.selector is candidate_selector, which does not read it",
    ),
    "bench, no prompts": Pair(f"bench {RECIPE} --num-prompts 0", refused="--bench.num-prompts is 0"),
    "bench in another dtype, card": Pair(
        "export {drafter} --target {target} --to zlab --output {out}/drafter; "
        f"bench {RECIPE} --dtype bfloat16; "
        "export {out}/drafter --target {target} --to zlab --output {out}/zlab",
        "zlab/README.md",
        printed="with dpace.decode in bfloat16",
    ),
    "bench, sets whose ids are equal": Pair(
        f"bench {RECIPE} --drafters {{drafter}} --num-prompts 3 --sets one two --sets-dir {{sets}}",
        "results.json",
        printed=r'(?s)"set": "one".{,999}"num_responses": 2,.*"set": "two".{,999}"num_responses": 3,',
    ),
    "from another drafter, card": Pair(
        f"train {RECIPE} --drafter.init {{drafter}}; "
        "export {out}/drafter --target {target} --to vllm --output {out}/vllm",
        "vllm/README.md",
        printed="num_layers: 1",
    ),
    "a quantized target, every verb": Pair(
        f"respond {QUANTIZED}; train {QUANTIZED} --drafter.init {{drafter}}; bench {QUANTIZED}; "
        f"check --target {{quantized}} {CHECK}; doctor {{out}}/new/drafter --target {{quantized}}; "
        "generate --target {quantized} --drafter {out}/new/drafter --prompt w1 --max-new-tokens 4; "
        "export {out}/new/drafter --target {quantized} --to vllm --output {out}/vllm",
        "vllm/README.md",
    ),
    "a GGUF file as target, every verb": Pair(
        f"plan {SERVED}; respond {SERVED}; train {SERVED}; bench {SERVED}; "
        f"compare {SERVED}-compared --objectives dpace --baseline dpace --seeds 0 --bench.num-prompts 0; "
        f"check --target {{served}} {CHECK}; doctor {{out}}/new/drafter --target {{served}} --engine gguf; "
        "generate --target {served} --drafter {out}/new/drafter --prompt w1 --max-new-tokens 4; "
        "export {out}/new/drafter --target {served} --to gguf --output {out}/gguf; "
        "import {out}/gguf/dflash-served-BF16.gguf --target {served} --output {out}/ours",
        "gguf/README.md",
        printed="llama-server -m served.gguf -md .*dflash-served-BF16.gguf --spec-type draft-dflash",
    ),
    "an adapter, every verb": Pair(
        f"plan {ADAPTER}; respond {ADAPTER}; train {ADAPTER}; bench {ADAPTER}; "
        "respond {recipe} --target {adapter} --output {out}/served --respond.server {server}; "
        "bench {recipe} --target {adapter} --output {out}/before --bench.drafters {drafter}; "
        "respond {recipe} --target {adapter} --output {out}/init; "
        "train {recipe} --target {adapter} --output {out}/init --drafter.init {drafter}; "
        f"compare {ADAPTER}-compared --objectives dpace --baseline dpace --seeds 0 --bench.num-prompts 0; "
        f"check --target {{adapter}} {CHECK}; doctor {{out}}/new/drafter --target {{adapter}} --engine vllm; "
        "generate --target {adapter} --drafter {out}/new/drafter --prompt w1 --max-new-tokens 4; "
        "export {out}/new/drafter --target {adapter} --to speculators --output {out}/theirs; "
        "import {out}/theirs --target {adapter} --output {out}/ours",
        "ours/config.json",
    ),
}


@pytest.fixture(scope="module")
def files(language_folder, language_prompts, target_gguf, tmp_path_factory) -> dict[str, str]:
    """A recipe, its answers and a drafter, and other files that commands name."""
    folder = tmp_path_factory.mktemp("pairs")
    asked = language_prompts[:30]

    def replies(reply: str) -> list[dict]:
        answer = {"role": "assistant", "content": reply}
        return [{"messages": [{"role": "user", "content": text}, answer]} for text in asked]

    rows = {
        "own": replies("w1 w2 w3 w4 w5 w6"),
        "corrected": replies("w7 w8 w9"),
        "turns": [*({"turns": [text, "w5 w52"]} for text in asked[:15]), *replies("w1 w2 w3")[15:]],
        "first": [{"id": "a", "prompt": language_prompts[30]}],
        "second": [{"id": "b", "prompt": language_prompts[31]}],
        "later": [{"turns": ["w1 w2", "w1 " * 5000]}],
    }
    texts = {
        "prompts": asked,
        "more": language_prompts[:34],
        "moved": ["w1 w2 w3", *asked],  # ids are line numbers
        "one": language_prompts[:2],
        "two": language_prompts[2:5],
    }
    names = {name: write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()}
    names |= {name: write_prompts(folder / f"{name}.jsonl", each) for name, each in texts.items()}
    recipe = {
        "target": str(language_folder),
        "output": str(folder / "out"),
        "prompts": {"path": names["prompts"]},
        "respond": {"max_new_tokens": 12},
        "drafter": {"num_layers": 1, "num_features": 2, "block_size": 8},  # two sizes where blocks grow
        "train": {"max_steps": 3, "batch_size": 4, "num_anchors": 4, "eval_steps": 3, "max_length": 64},
        "bench": {"max_new_tokens": 8, "temperatures": [0.0], "num_prompts": 1, "widths": ["full"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["respond", str(path)]) == main(["train", str(path)]) == 0
    drafter = (folder / "out" / "drafter").rename(folder / "drafter")
    more = {
        "recipe": path,
        "out": folder / "out",
        "sets": folder,
        "target": language_folder,
        "drafter": drafter,
        "other": shutil.copytree(drafter, folder / "other" / "drafter"),
        "gguf": target_gguf,
        "served": write_target_gguf(
            make_target("qwen3", vocab_size=len(BYTE_TOKENS)), folder / "served.gguf", **BYTE_TOKENIZER
        ),
        "file": f"dflash-{language_folder.name}-BF16.gguf",
        "dspark": f"dspark-{language_folder.name}-BF16.gguf",
        "quantized": write_fp8(language_folder, folder / "quantized"),
        "adapter": write_adapter(shutil.copytree(language_folder, folder / "base"), width=48),
    }
    return names | {name: str(path) for name, path in more.items()}


@pytest.fixture
def out(files, tmp_path, monkeypatch) -> Path:
    """A copy of the answers and of what they gave, which the test changes; dpace's cache is empty."""
    monkeypatch.chdir(tmp_path)  # some commands choose a folder for their output
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(files["out"], tmp_path / "out")


def run(command: str, names: dict[str, str]) -> None:
    """A command with names of files in braces, which ends well."""
    assert main(shlex.split(command.format(**names))) == 0, command


COVER = (
    "a selector, windows, growing blocks, export, doctor",
    "windows, causal blocks, mixed layers, bench, export, generate",
    "convolutions, draft vocabulary, export",
    "turns, messages, every verb",
    "own answers, train",
    "from a GGUF file",
    "a GGUF file as target, every verb",
    "several widths, verify rules and drafters, report",
    "stream, sampling",
    "bench in another dtype, card",
    "bench, sets whose ids are equal",
    "from another drafter, card",
)
"""Pairs that run by default, beside those that end at once."""
AT_ONCE = [
    name
    for name, pair in PAIRS.items()
    if ";" not in pair.commands and (pair.refused or pair.commands.startswith("plan"))
]


@pytest.mark.parametrize("name", wide(PAIRS, *COVER, *AT_ONCE))
def test_what_a_page_shows_together_works_together(name, files, out, language_target, capsys):
    pair = PAIRS[name]
    with closing(Stub(language_target, "vllm")) as server:
        *before, last = pair.commands.format(**files | {"out": str(out), "server": server.url}).split(";")
        for command in before:
            assert main(shlex.split(command)) == 0, capsys.readouterr().err
        capsys.readouterr()
        code = main(shlex.split(last))
    printed = capsys.readouterr()
    if pair.refused:
        assert code in (1, 2)
        assert re.search(pair.refused, printed.err), printed.err
    else:
        assert code == 0, printed.err
        written = list(out.glob(pair.written or "*"))
        texts = [*printed, *(path.read_text() for path in written if pair.written and pair.printed)]
        assert written and any(re.search(pair.printed, text) for text in texts), texts
        assert not any(
            files["drafter"] in card.read_text() for card in out.rglob("README.md")
        )  # a place of this machine


@pytest.mark.wide
def test_a_compiled_training_gives_the_same_weights(files, out, monkeypatch):
    """The loop and its options; what the compiler does is torch's."""

    def eager(dynamo_backend, **options):
        assert dynamo_backend == "inductor"
        return Accelerator(dynamo_backend="eager", **options)

    monkeypatch.setattr("dpace.training.loop.Accelerator", eager)
    run(f"train {{recipe}} --output {out} --train.torch-compile", files)
    folders = (out / "drafter", Path(files["drafter"]))
    found, plain = (load_file(folder / "checkpoints" / "checkpoint-3" / "model.safetensors") for folder in folders)
    torch.testing.assert_close(found, plain)


def test_tables_of_the_target_are_left_out_of_an_export(files, language_target, tmp_path):
    folder = shutil.copytree(files["drafter"], tmp_path / "own")
    with changed_weights(folder) as tensors:
        tensors["embed_tokens.weight"] = language_target.model.get_input_embeddings().weight
    change_config(folder, has_own_embed_tokens=True)
    run(f"export {folder} --target {{target}} --to sglang --output {tmp_path}/sglang", files)
    assert "embed_tokens.weight" not in load_file(tmp_path / "sglang" / "model.safetensors")
