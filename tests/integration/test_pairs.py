"""Options and features that a page shows together, run together through the command line on tiny models.

A pair is its commands, and the file that they leave or what the last one prints; or the words with which it is refused.
"""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

import dpace.train.loop
from dpace.cli import main
from dpace.decode import generate_plain
from dpace.prompts.prompts import find_prompt
from dpace.respond.responses import read_responses
from dpace.target import Target
from dpace.target.chat import encode_chat
from tests.support.cases import wide
from tests.support.files import (
    change_config,
    change_json,
    changed_weights,
    make_prompts,
    read_json,
    write_prompts,
    write_rows,
)
from tests.unit.respond.test_respond import Stub
from tests.unit.target.test_target_files import QUERY, write_adapter, write_fp8


class Pair(NamedTuple):
    """Commands, with names of the files in braces, and what comes of them."""

    commands: str
    written: str = ""
    refused: str = ""
    printed: str = ""


RECIPE = "{recipe} --output {out}"
TARGET = "--target {target} --drafter {drafter}"
PAIRS = {
    "compare, from another drafter": Pair(
        f"compare {RECIPE} --drafter.init {{drafter}} --objectives dpace --seeds 0 --bench.num-prompts 0",
        "dflash/seed-0/heldout.json",
    ),
    "compare, growing blocks, hidden states on disk, soft labels": Pair(
        f"compare {RECIPE} --train.grow-blocks --train.feature-files {{out}}/states --objectives dpace+kl --seeds 0 "
        "--bench.num-prompts 0",
        "dpace+kl/seed-0/heldout.json",
    ),
    "compare where bench measured": Pair(
        f"bench {RECIPE} --drafters {{drafter}}; compare {RECIPE} --dry-run",
        refused="results.json holds what `dpace bench` measured; name another folder with --output",
    ),
    "bench where compare measured": Pair(
        f"compare {RECIPE} --objectives dpace --baseline dpace --seeds 0 --bench.num-prompts 0; "
        f"bench {RECIPE} --drafters {{drafter}} --dry-run",
        refused="results.json holds what `dpace compare` or `dpace demo` measured; name another folder with --output",
    ),
    "prompts that moved after they were answered": Pair(
        f"train {RECIPE} --prompts.path {{moved}} --dry-run",
        refused="has an answer with the id .*, but to another text",
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
    "check, replies that the prompts came with": Pair(
        "respond {recipe} --output {out}/a --prompts.path {own} --respond.source own; "
        f"check {TARGET} --responses {{out}}/a/responses.jsonl",
        refused="has source own .* only the target's greedy answers can be read again; leave --responses out",
    ),
    "compare, soft labels of the recipe": Pair(
        f"compare {RECIPE} --loss.token-loss kl --dry-run",
        refused="--loss.token-loss and --loss.confidence are taken from the names of --objectives",
    ),
    "the largest seed, several steps": Pair(f"train {RECIPE} --train.seed 4294967295", "drafter/provenance.json"),
    "a head, soft labels, compare": Pair(
        f"compare {RECIPE} --drafter.head lilicorr --objectives dpace dpace+kl",
        refused=r"objectives such as dpace\+kl",
    ),
    "from a causal drafter, and not causal": Pair(
        "respond {recipe} --output {out}/a; train {recipe} --output {out}/a --drafter.causal; "
        "train {recipe} --output {out}/a --drafter.init {out}/a/drafter --drafter.no-causal --dry-run",
        refused="--drafter.causal is False, but .* has True; leave --drafter.causal out",
    ),
    "a head, another drafter to start from": Pair(
        f"train {RECIPE} --drafter.init {{drafter}} --drafter.head lilicorr",
        refused="--drafter.head is lilicorr, but .* has None",
    ),
    "from another drafter, hidden states on disk in 8 bits": Pair(
        f"train {RECIPE} --drafter.init {{drafter}} --train.feature-files {{out}}/states --train.feature-dtype float8",
        "drafter/provenance.json",
    ),
    "accumulation, division by the weights, seen tokens": Pair(
        f"train {RECIPE} --train.gradient-accumulation-steps 2 --loss.reduction weights --loss.vocabulary seen",
        "drafter/provenance.json",
    ),
    "Muon, checkpointing, soft labels": Pair(
        f"train {RECIPE} --train.optimizer muon --train.gradient-checkpointing --loss.token-loss kl",
        "drafter/provenance.json",
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
    "a head, windows, growing blocks, export, doctor": Pair(
        f"train {RECIPE} --drafter.head lilicorr --drafter.head-candidates 4 --drafter.sliding-window 9 "
        "--train.grow-blocks; "
        "generate --target {target} --drafter {out}/drafter --prompt w1 --stream --max-new-tokens 8; "
        "export {out}/drafter --target {target} --to vllm --output {out}/vllm; "
        "doctor {out}/vllm --target {target} --engine vllm",
        "vllm/README.md",
    ),
    "a head, compare, decoding": Pair(
        f"compare {RECIPE} --drafter.head lilicorr --drafter.head-candidates 4 --objectives dpace --seeds 0",
        "decode/bench-*.jsonl",
    ),
    "a head, servers of hidden states": Pair(
        f"train {RECIPE} --drafter.head lilicorr --train.feature-files {{out}}/states "
        "--train.feature-servers http://127.0.0.1:9",
        refused="--loss.head-penalty 0",
    ),
    "plan, another drafter, other blocks": Pair(
        f"plan {RECIPE} --drafter.init {{drafter}} --drafter.block-size 4", refused="--drafter.block-size is 4, but"
    ),
    "several drafters in folders of one name, several sets, report": Pair(
        f"bench {RECIPE} --bench.drafters {{drafter}} {{other}} --bench.sets one two --bench.sets-dir {{sets}}; "
        "report {out}",
        "report.html",
    ),
    "servers, hidden states on disk": Pair(
        "respond {recipe} --output {out}/new --respond.server {server}; "
        "train {recipe} --output {out}/new --train.feature-files {out}/states",
        "new/drafter/provenance.json",
    ),
    "own answers, data, train": Pair(
        "data {recipe} --prompts.path {own} --output {out}/new; "
        "respond {recipe} --prompts.path {own} --output {out}/new --respond.source own; "
        "train {recipe} --prompts.path {own} --output {out}/new",
        "new/drafter/provenance.json",
    ),
    "sampled answers, batches, train": Pair(
        "respond {recipe} --output {out}/new --respond.temperature 0.7 --respond.seed 3 --respond.batch-size 7; "
        "train {recipe} --output {out}/new",
        "new/drafter/provenance.json",
    ),
    "stream, speculative sampling": Pair(
        f"generate {TARGET} --prompt 'w3 w51' --stream --temperature 0.8 --seed 1 --verify-rule speculative "
        "--max-new-tokens 8",
        printed=r"w\d+",
    ),
    "several widths, verify rules and drafters, report": Pair(
        f"bench {RECIPE} --drafters {{drafter}} {{other}} --verify-rules speculative equality --temperatures 0.7 1 "
        "--widths 4 auto; report {out}",
        "report.html",
    ),
    "stream, compile": Pair(
        f"generate {TARGET} --prompt w1 --stream --compile", refused="--compile .*cannot be combined with --stream"
    ),
    "servers of hidden states, soft labels, dry run": Pair(
        f"train {RECIPE} --loss.token-loss kl --train.feature-files {{out}}/states "
        "--train.feature-servers http://127.0.0.1:9 --dry-run",
        refused="give no input of the LM head",
    ),
    "a head, answers shorter than a block": Pair(
        f"train {RECIPE} --drafter.head lilicorr --drafter.block-size 200 --dry-run",
        refused="no answer fills a block of 200 tokens",
    ),
}
TURNS = "{recipe} --output {out}/t --prompts.path {turns}"
THINKING = "{recipe} --output {out}/t --thinking"
LIMIT = "{recipe} --output {out}/l --prompts.limit 12 --prompts.num-validation 2"
HEAD = "--drafter.head lilicorr --drafter.head-candidates 4"
PAIRS |= {
    "turns, messages, every verb": Pair(
        f"respond {TURNS}; train {TURNS}; bench {TURNS} --num-prompts 2; "
        "check --target {target} --drafter {out}/t/drafter --prompts {turns} --num-prompts 1 --max-new-tokens 6; "
        f"data {TURNS}",
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
    "public sets": Pair(
        f"data {RECIPE} --prompts.decontaminate {{sets}}/one.jsonl",
        printed="left out: 2 in the public sets",
    ),
    "check, two dtypes": Pair(
        f"check {TARGET} --prompts {{prompts}} --num-prompts 1 --max-new-tokens 6 --dtypes float32 bfloat16",
        printed="passed",
    ),
    "check, kept answers": Pair(
        f"check {TARGET} --prompts {{prompts}} --num-prompts 1 --max-new-tokens 6 --responses {{out}}/responses.jsonl",
        printed="passed",
    ),
    "soft labels, overlap, options of the loss and of memory": Pair(
        f"train {RECIPE} --loss.token-loss lk --loss.confidence overlap --loss.alpha 0 --loss.alpha-end 0.1 "
        "--loss.chunk-mib 256 --train.no-group-by-length --train.save-steps 1 --train.max-grad-norm 0.5 "
        "--train.feature-cache-gib 0",
        "drafter/provenance.json",
    ),
    "options of a head": Pair(
        f"train {RECIPE} {HEAD} --drafter.head-width 16 --loss.head-weights walk --loss.head-penalty 0",
        "drafter/provenance.json",
    ),
    "from a drafter with a head": Pair(
        f"train {RECIPE} {HEAD}; respond {{recipe}} --output {{out}}/b; "
        "train {recipe} --output {out}/b --drafter.init {out}/drafter; "
        "generate --target {target} --drafter {out}/b/drafter --prompt 'w3 w51' --max-new-tokens 4",
        printed=r"w\d+",
    ),
    "from a GGUF file": Pair(
        "export {drafter} --target {target} --to gguf --target-gguf {gguf} --output {out}/g; "
        f"train {RECIPE} --drafter.init {{out}}/g",
        "drafter/provenance.json",
    ),
    "compare, own answers": Pair(
        "compare {recipe} --output {out}/a --prompts.path {own} --respond.source own --dry-run",
        refused="--respond.source is own, and `dpace compare` measures tau on what the target answers",
    ),
    "compare, answers of another length": Pair(
        f"compare {RECIPE} --respond.max-new-tokens 8 --dry-run", refused="max_new_tokens 12, not 8"
    ),
    "own answers, servers": Pair(
        "respond {recipe} --output {out}/a --prompts.path {own} --respond.source own "
        "--respond.server http://x --dry-run",
        refused="--respond.server asks servers for answers, and --respond.source own takes those of the file",
    ),
    "held-out prompts of a file, all others like public ones": Pair(
        "respond {recipe} --output {out}/a --prompts.heldout-path {sets}/one.jsonl --prompts.path {sets}/two.jsonl "
        "--prompts.decontaminate {sets}/two.jsonl --dry-run",
        refused="two.jsonl has no prompt left to train on",
    ),
    "bench, a later turn that is too long": Pair(
        f"bench {RECIPE} --drafters {{drafter}} --sets later --sets-dir {{sets}}",
        refused="prompt later/1 has .* tokens; with 2 answers of up to 8 new tokens it passes the target's limit",
    ),
    "bench, no drafter, a dry run": Pair("bench {recipe} --output {out}/off --dry-run", refused="there is no drafter"),
    "bench, a folder of sets, no sets": Pair(
        f"bench {RECIPE} --drafters {{drafter}} --sets-dir {{sets}}", refused="name those to measure on"
    ),
    "plan, an option of a head, no head": Pair(
        f"plan {RECIPE} --loss.head-weights walk",
        refused="--loss.head-weights is walk, and the drafter has no head; add --drafter.head",
    ),
    "bench, no prompts": Pair(f"bench {RECIPE} --num-prompts 0", refused="--bench.num-prompts is 0"),
}


@pytest.fixture(scope="module")
def files(language_folder, language_prompts, target_gguf, tmp_path_factory) -> dict[str, str]:
    """A recipe, its answers and a drafter, and other files that commands name."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = ("prompts.jsonl", "own.jsonl", "corrected.jsonl", "moved.jsonl", "tools.jsonl", "turns.jsonl")
    names = ("recipe.yaml", "out", "sets", *rows)
    paths = {name.partition(".")[0]: folder / name for name in names}
    write_prompts(paths["prompts"], language_prompts[:30])
    answer = {"role": "assistant", "content": "w1 w2 w3 w4 w5 w6"}
    replies = [{"messages": [*prompt.turns[0], answer]} for prompt in make_prompts(language_prompts[:30])]
    write_rows(paths["own"], replies)
    corrected = [{"messages": [*row["messages"][:-1], answer | {"content": "w7 w8 w9"}]} for row in replies]
    write_rows(paths["corrected"], corrected)
    write_prompts(paths["moved"], ["w1 w2 w3", *language_prompts[:30]])  # ids are line numbers
    turns = [{"turns": [text, "w5 w52"]} for text in language_prompts[:15]]
    write_rows(paths["turns"], [row for both in zip(turns, replies[15:], strict=False) for row in both])
    tool = {"role": "tool", "content": "w9 w8"}
    write_rows(paths["tools"], [{"messages": [*replies[0]["messages"], tool]}])
    paths["sets"].mkdir()
    for name, texts in {"one": language_prompts[:2], "two": language_prompts[2:5]}.items():
        write_prompts(paths["sets"] / f"{name}.jsonl", texts)  # ids in both are line numbers
    write_rows(paths["sets"] / "later.jsonl", [{"turns": ["w1 w2", "w1 " * 5000]}])
    recipe = {
        "target": str(language_folder),
        "output": str(paths["out"]),
        "prompts": {"path": str(paths["prompts"])},
        "respond": {"max_new_tokens": 12},
        "drafter": {"num_layers": 1, "num_features": 2, "block_size": 8},  # two sizes where blocks grow
        "train": {"max_steps": 3, "batch_size": 4, "num_anchors": 4, "eval_steps": 3, "max_length": 64},
        "bench": {"max_new_tokens": 8, "temperatures": [0.0], "num_prompts": 1, "widths": ["full"]},
    }
    paths["recipe"].write_text(yaml.safe_dump(recipe))
    assert main(["respond", str(paths["recipe"])]) == main(["train", str(paths["recipe"])]) == 0
    drafter = (paths["out"] / "drafter").rename(folder / "drafter")
    other = shutil.copytree(drafter, folder / "other" / "drafter")
    return {name: str(path) for name, path in paths.items()} | {
        "target": str(language_folder),
        "drafter": str(drafter),
        "other": str(other),
        "gguf": str(target_gguf),
    }


@pytest.fixture
def out(files, tmp_path) -> Path:
    """A copy of the answers and of what they gave, which the test changes."""
    return shutil.copytree(files["out"], tmp_path / "out")


def run(command: str, names: dict[str, str]) -> None:
    """A command with names of files in braces, which ends well."""
    assert main(shlex.split(command.format(**names))) == 0, command


COVER = (
    "a head, windows, growing blocks, export, doctor",
    "windows, causal blocks, mixed layers, bench, export, generate",
    "convolutions, draft vocabulary, export",
    "turns, messages, every verb",
    "own answers, data, train",
    "from a GGUF file",
    "check, kept answers",
    "several widths, verify rules and drafters, report",
    "stream, speculative sampling",
)
"""Pairs that run by default, beside those that are refused at once."""
AT_ONCE = [name for name, pair in PAIRS.items() if pair.refused and ";" not in pair.commands]


@pytest.mark.parametrize("name", wide(PAIRS, *COVER, *AT_ONCE))
def test_what_a_page_shows_together_works_together(name, files, out, language_target, capsys):
    pair = PAIRS[name]
    server = Stub(language_target, "vllm") if "{server}" in pair.commands else None
    values = files | {"out": str(out), "server": server.url if server else ""}
    *before, last = [shlex.split(command.format(**values)) for command in pair.commands.split(";")]
    try:
        for command in before:
            assert main(command) == 0, capsys.readouterr().err
        capsys.readouterr()
        code = main(last)
    finally:
        if server:
            server.close()
    printed = capsys.readouterr()
    if pair.refused:
        assert code in (1, 2)
        assert re.search(pair.refused, printed.err), printed.err
    else:
        assert code == 0, printed.err
        assert list(out.glob(pair.written or "*"))
        assert re.search(pair.printed, printed.out), printed.out


def test_prompts_that_were_added_after_they_were_answered_are_told(files, out, language_prompts, tmp_path, capsys):
    write_prompts(tmp_path / "more.jsonl", language_prompts[:34])
    command = f"train {{recipe}} --output {out} --prompts.path {tmp_path}/more.jsonl --dry-run"
    run(command, files)
    assert re.search(r"^[34] prompts left out: no answer;", capsys.readouterr().err, re.MULTILINE)


def test_a_plan_of_answers_that_are_not_all_there_has_the_disk_and_the_next_command(files, out, capsys):
    answers, meta = out / "responses.jsonl", out / "responses.meta.json"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:9]))
    change_json(meta, complete=False)
    assert main(["plan", files["recipe"], "--output", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "disk: up to" in printed and "next: dpace respond" in printed and "not all answers are there" in printed


def test_training_says_how_many_given_tokens_are_the_targets_choice(files, tmp_path, capsys):
    options = f"{{recipe}} --output {tmp_path}/new --prompts.path {{own}}"
    run(f"respond {options} --respond.source own", files)
    run(f"train {options} --train.max-steps 1", files)
    assert re.search(
        r"^\d{1,2}% of the tokens of the given answers, in a sample", capsys.readouterr().err, re.MULTILINE
    )


def test_a_finished_training_reads_no_hidden_states_and_its_card_names_no_place(files, out, tmp_path, capsys):
    train = f"train {{recipe}} --output {out} --drafter.init {{drafter}}"
    export = f"export {out}/drafter --target {{target}} --to vllm --output {tmp_path}/vllm"
    for command in (train, export, train):
        capsys.readouterr()
        run(command, files)
    assert "reading hidden states" not in capsys.readouterr().err
    card = (tmp_path / "vllm" / "README.md").read_text()
    assert "num_layers: 1" in card and files["drafter"] not in card


@pytest.mark.wide
def test_comparing_again_measures_other_held_out_prompts(files, language_prompts, tmp_path):
    """Also where their ids are the same; the answers to the old ones were deleted, as the refusal says."""
    heldout = tmp_path / "heldout.jsonl"
    hashes = []
    for names, chosen in (((30, 31), (30, 31)), ((32, 33), (32, 33)), ((32, 33), (34, 35))):
        (tmp_path / "out" / "responses.jsonl").unlink(missing_ok=True)
        rows = zip(names, chosen, strict=True)
        write_rows(heldout, [{"id": f"row {name}", "prompt": language_prompts[number]} for name, number in rows])
        command = f"compare {{recipe}} --prompts.heldout-path {heldout} --output {tmp_path}/out --objectives dpace "
        command += "--baseline dpace --seeds 0 --bench.num-prompts 0"
        run(command, files)
        (row,) = read_json(tmp_path / "out" / "results.json")["rows"]
        assert row["num_prompts"] == 2
        measured = read_json(tmp_path / "out" / "dpace" / "seed-0" / "heldout.json")
        assert measured["ids"] == [f"row {name}" for name in names]
        hashes.append(measured["responses_sha256"])
    assert len(set(hashes)) == 3


def test_the_order_of_keys_does_not_change_a_prompt(files, out, tmp_path):
    texts = [json.loads(line)["prompt"] for line in Path(files["prompts"]).read_text().splitlines()]
    for name, order in (("a", ("role", "content")), ("b", ("content", "role"))):
        messages = [{"role": "user", "content": text} for text in texts]
        rows = [{"messages": [{key: message[key] for key in order}]} for message in messages]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        (out / "corpus.arrow").unlink(missing_ok=True)
        command = f"train {{recipe}} --output {out} --prompts.path {tmp_path}/{name}.jsonl --dry-run"
        run(command, files)


QUANTIZED = """
respond {recipe} --target {quantized} --output {out}
train {recipe} --target {quantized} --output {out} --drafter.init {drafter}
bench {recipe} --target {quantized} --output {out}
check --target {quantized} --drafter {out}/drafter --prompts {prompts} --num-prompts 1 --max-new-tokens 6
doctor {out}/drafter --target {quantized}
generate --target {quantized} --drafter {out}/drafter --prompt w1 --max-new-tokens 4
export {out}/drafter --target {quantized} --to vllm --output {out}/vllm
"""


@pytest.mark.wide
def test_every_verb_takes_a_quantized_target(files, tmp_path):
    write_fp8((None, files["target"]), tmp_path / "fp8")
    values = files | {"quantized": str(tmp_path / "fp8"), "out": str(tmp_path / "out")}
    for command in QUANTIZED.strip().splitlines():
        run(command, values)


@pytest.mark.wide
def test_a_compiled_training_gives_the_same_weights(files, tmp_path, monkeypatch):
    """The loop and its options; what the compiler does is torch's."""
    make = dpace.train.loop.Accelerator

    def eager(**options):
        return make(**options | {"dynamo_backend": options["dynamo_backend"] and "eager"})

    monkeypatch.setattr("dpace.train.loop.Accelerator", eager)
    weights = []
    for name, more in (("plain", ""), ("compiled", " --train.torch-compile")):
        out = shutil.copytree(files["out"], tmp_path / name)
        run(f"train {{recipe}} --output {out}{more}", files)
        weights.append(load_file(out / "drafter" / "checkpoints" / "checkpoint-3" / "model.safetensors"))
    torch.testing.assert_close(*weights)


def test_the_objective_of_the_page_is_the_example_and_trains(files, out, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/reference/api.md").read_text(), flags=re.DOTALL)
    (printed,) = (block for block in blocks if "def weigh" in block)
    assert printed in (root / "examples" / "objective.py").read_text()
    (tmp_path / "of_the_page.py").write_text(printed)
    monkeypatch.chdir(tmp_path)
    run(f"train {{recipe}} --output {out} --loss.objective of_the_page:weigh", files)


def test_an_interrupted_bench_goes_on(files, tmp_path):
    command = f"bench {{recipe}} --drafters {{drafter}} --num-prompts 2 --output {tmp_path}"
    run(command, files)
    whole = read_json(tmp_path / "results.json")["rows"][0]
    (path,) = tmp_path.glob("bench-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:10])
    run(command, files)
    again = read_json(tmp_path / "results.json")["rows"][0]
    assert again["histogram"] == whole["histogram"]
    kept, fresh = (row["responses"][0]["decode_seconds"] for row in (whole, again))
    assert kept == fresh


def test_a_chat_that_ends_in_a_tools_result_is_answered(files, endless_folder, capsys):
    """With what the target says, and it does not wait for what the user types."""
    template = endless_folder / "chat_template.jinja"
    template.write_text(
        "{% if messages[-1].role == 'tool' %}w3 {{ messages[-1].content }} {% endif %}" + template.read_text()
    )
    run(f"generate {TARGET} --stream --prompt {{tools}}#1 --max-new-tokens 3", files | {"target": str(endless_folder)})
    target = Target.load(str(endless_folder))
    prompt = encode_chat(target, find_prompt(f"{files['tools']}#1"))
    answer = generate_plain(target, prompt, max_new_tokens=3)
    assert capsys.readouterr().out == target.tokenizer.decode(answer.token_ids, skip_special_tokens=True) + "\n"


def test_the_card_has_what_was_measured_in_another_dtype(files, tmp_path):
    out = shutil.copytree(files["drafter"], tmp_path / "out" / "drafter").parent
    commands = (
        f"bench {{recipe}} --output {out} --dtype bfloat16",
        f"export {out}/drafter --target {{target}} --to zlab --output {tmp_path}/zlab",
    )
    for command in commands:
        run(command, files)
    assert "with dpace.decode in bfloat16" in (tmp_path / "zlab" / "README.md").read_text()


def test_sets_whose_ids_are_equal_are_all_measured(files, tmp_path):
    flags = "--widths full --num-prompts 3 --sets one two --sets-dir {sets}"
    run(f"bench {{recipe}} --drafters {{drafter}} {flags} --output {tmp_path}", files)
    rows = read_json(tmp_path / "results.json")["rows"]
    assert [(row["set"], row["num_responses"]) for row in rows] == [("one", 2), ("two", 3)]


def test_a_plan_takes_its_sizes_from_the_drafter_to_start_from(files, tmp_path, capsys):
    recipe = yaml.safe_load(Path(files["recipe"]).read_text())
    del recipe["drafter"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    start = [str(tmp_path / "recipe.yaml"), "--drafter.init", files["drafter"]]
    lines = []
    for command in (["plan", *start, "--device", "cpu"], ["train", *start, "--dry-run"]):
        assert main(command) == 0
        printed = capsys.readouterr()
        (line,) = re.findall(r"drafter: [\d.]+ M parameters", printed.out + printed.err)
        lines.append(line)
    assert lines[0] == lines[1]


ADAPTER = "--target {adapter} --output {out}/new"
OF_ADAPTERS = f"""
plan {{recipe}} {ADAPTER}
respond {{recipe}} {ADAPTER}
respond {{recipe}} --target {{adapter}} --output {{out}}/served --respond.server {{server}}
data {{recipe}} {ADAPTER}
train {{recipe}} {ADAPTER}
bench {{recipe}} {ADAPTER}
bench {{recipe}} --target {{adapter}} --output {{out}}/before --bench.drafters {{drafter}}
respond {{recipe}} --target {{adapter}} --output {{out}}/init
train {{recipe}} --target {{adapter}} --output {{out}}/init --drafter.init {{drafter}}
compare {{recipe}} {ADAPTER}-compared --objectives dpace --baseline dpace --seeds 0 --bench.num-prompts 0
check --target {{adapter}} --drafter {{out}}/new/drafter --prompts {{prompts}} --num-prompts 1 --max-new-tokens 6
doctor {{out}}/new/drafter --target {{adapter}} --engine vllm
generate --target {{adapter}} --drafter {{out}}/new/drafter --prompt w1 --max-new-tokens 4
export {{out}}/new/drafter --target {{adapter}} --to speculators --output {{out}}/theirs
import {{out}}/theirs --target {{adapter}} --output {{out}}/ours
"""


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")  # of peft
@pytest.mark.wide
def test_every_verb_takes_an_adapter(files, language_target, tmp_path):
    """Also where it has no tokenizer of its own; a run names the weights that it was merged to."""
    pytest.importorskip("peft")
    lora = write_adapter(shutil.copytree(files["target"], tmp_path / "base"), width=48)
    down, up = (load_file(lora / "adapter_model.safetensors")[f"{QUERY}{name}.weight"] for name in "AB")
    server = Stub(language_target, "vllm")
    values = files | {"out": str(tmp_path), "adapter": str(tmp_path / "lora"), "server": server.url}
    try:
        for command in OF_ADAPTERS.strip().splitlines():
            run(command, values)
    finally:
        server.close()
    merged = Target.load(files["target"])
    merged.layers[1].self_attn.q_proj.weight.data += 2 * up @ down  # lora_alpha / r
    facts = read_json(tmp_path / "new" / "drafter" / "run.json")
    assert facts["target_sha256"] == merged.sha256


WITH_TOOLS = """
data {recipe} --target {target} --prompts.path {prompts} --output {out}
respond {recipe} --target {target} --prompts.path {prompts} --output {out}
respond {recipe} --target {target} --prompts.path {prompts} --output {served} --respond.server {server}
train {recipe} --target {target} --prompts.path {prompts} --output {out}
bench {recipe} --target {target} --prompts.path {prompts} --output {out}
check --target {target} --drafter {out}/drafter --prompts {prompts} --num-prompts 1 --max-new-tokens 6
"""


@pytest.mark.wide
def test_tools_reach_the_template_of_every_verb(files, language_target, tmp_path):
    """Answers of this process and of a server are those behind the tools."""
    target = shutil.copytree(files["target"], tmp_path / "target")
    tools = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    template = target / "chat_template.jinja"
    template.write_text(tools + template.read_text())
    tool = {"type": "function", "function": {"name": "w30", "parameters": {"type": "object"}}}
    questions = [[{"role": "user", "content": f"w{number} w5"}] for number in range(1, 25)]
    write_rows(tmp_path / "prompts.jsonl", [{"messages": question, "tools": [tool]} for question in questions])
    server = Stub(language_target, "vllm")
    values = files | {"target": str(target), "prompts": str(tmp_path / "prompts.jsonl"), "server": server.url}
    values |= {"out": str(tmp_path / "out"), "served": str(tmp_path / "served")}
    try:
        for command in WITH_TOOLS.strip().splitlines():
            run(command, values)
    finally:
        server.close()
    here, there = (read_responses(tmp_path / name / "responses.jsonl") for name in ("out", "served"))
    assert {row.id: row.token_ids for row in here} == {row.id: row.token_ids for row in there}
    word = language_target.tokenizer("w30")["input_ids"][0]
    assert {row.token_ids[0] for row in here} == {word}


def test_a_log_of_few_validation_prompts_is_json(files, out):
    """Without an interval of tau; NaN is none of JSON's numbers."""
    run(f"train {{recipe}} --output {out} --prompts.num-validation 2", files)
    log = json.loads((out / "drafter" / "trainer_state.json").read_text(), parse_constant=pytest.fail)["log_history"]
    assert any("eval_tau" in entry for entry in log)


def test_the_users_folders_beside_checkpoints_stay(files, out):
    run(f"train {{recipe}} --output {out}", files)
    mine = out / "drafter" / "checkpoints" / "checkpoint-3-copy4"
    shutil.copytree(mine.with_name("checkpoint-3"), mine)
    (out / "drafter" / "provenance.json").unlink()
    run(f"plan {{recipe}} --output {out} --device cpu", files)
    run(f"train {{recipe}} --output {out}", files)
    assert (mine / "model.safetensors").exists()


def test_tables_of_the_target_are_left_out_of_an_export(files, language_target, tmp_path):
    folder = shutil.copytree(files["drafter"], tmp_path / "own")
    with changed_weights(folder) as tensors:
        tensors["embed_tokens.weight"] = language_target.model.get_input_embeddings().weight
    change_config(folder, has_own_embed_tokens=True)
    run(f"export {folder} --target {{target}} --to sglang --output {tmp_path}/sglang", files)
    assert "embed_tokens.weight" not in load_file(tmp_path / "sglang" / "model.safetensors")
