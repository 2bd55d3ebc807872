"""What is said before a run starts: memory, steps, time and disk, and that nothing starts with `--dry-run`."""

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from dpace.batches.dataset import ResponseDataset
from dpace.cli import main
from dpace.config import DrafterConfig, LossConfig, PromptsConfig, Recipe, RespondConfig, TrainConfig
from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh
from dpace.measure.heldout import heldout_acceptance
from dpace.plan.lines import answer_lines, answering_seconds
from dpace.plan.speed import Machine, Speed, measure_speed
from dpace.plan.training import START_SECONDS, TrainingPlan, known_lengths, mean_answer, paper_target, plan_recipe
from dpace.prompts.prompts import split_prompts
from dpace.respond.responses import AnswerLengths, Response, known_settings
from dpace.target import Target
from dpace.train.loop import TrainingLoop
from dpace.train.run import choose_conversations
from tests.conftest import make_tokenizer
from tests.support.cases import wide
from tests.support.families import make_sharp_target
from tests.support.files import make_prompts, write_prompts, write_rows
from tests.support.memory import peak_bytes

SHAPES = {
    "many small blocks": (
        Qwen3Config(
            vocab_size=4000, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        ),
        DrafterConfig(num_layers=2, block_size=8, num_features=3),
        LossConfig(vocabulary="seen"),
        TrainConfig(optimizer="muon", batch_size=6, num_anchors=16, max_steps=2),
    ),
    "soft labels, checkpointing": (
        LlamaConfig(
            vocab_size=3000, hidden_size=256, intermediate_size=700, num_hidden_layers=7, num_attention_heads=8,
            num_key_value_heads=8, tie_word_embeddings=True,
        ),
        DrafterConfig(num_layers=2, block_size=10),
        LossConfig(token_loss="kl"),
        TrainConfig(batch_size=3, num_anchors=40, max_steps=2, gradient_checkpointing=True),
    ),
    "a head, bf16": (
        Qwen3Config(
            vocab_size=2000, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        ),
        DrafterConfig(num_layers=2, block_size=8, num_features=3, head="lilicorr"),
        LossConfig(),
        TrainConfig(
            optimizer="muon", batch_size=2, gradient_accumulation_steps=2, num_anchors=16, max_steps=2,
            products="bfloat16",
        ),
    ),
}  # fmt: skip
NUM_TOKENS, NUM_ANSWERED = 120, 80
NOTHING = np.zeros((2, 0))
SPEED = Speed(1e7, 1e6)


def make_loop(name: str, folder) -> tuple[TrainingPlan, TrainingLoop]:
    """A loop of two steps on conversations of the same length, and its plan."""
    config, drafter, loss, train = SHAPES[name]
    recipe = Recipe(drafter=drafter, loss=loss, train=train)
    target = Target(AutoModelForCausalLM.from_config(config))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 380, (12, NUM_TOKENS), generator=generator).tolist()
    spans = [[NUM_TOKENS - NUM_ANSWERED, NUM_TOKENS]]
    responses = [Response(str(i), "set", [], row, spans) for i, row in enumerate(ids)]
    datasets = choose_conversations(responses, [], recipe)
    made = Drafter.from_target(target, **vars(recipe.drafter))
    weigh = make_weigh(recipe.loss, made.block_size)
    machine = Machine(True, 2**34, torch.float32, getattr(torch, train.products), SPEED, SPEED)
    plan = TrainingPlan(target, machine, recipe, made, known_lengths(datasets[0]), NOTHING)
    return plan, TrainingLoop(made, target, *datasets, recipe, weigh=weigh, checkpoints=folder)


DEFAULT = "soft labels, checkpointing", "a head, bf16"


@pytest.mark.parametrize("name", wide(SHAPES, *DEFAULT))
def test_the_memory_of_a_step_is_near_the_measured_peak(name, tmp_path):
    plan, loop = make_loop(name, tmp_path)
    head = loop.scorer.rows.head.weight
    loop.save = lambda **_: None
    held = {p.untyped_storage()._cdata: p.nbytes for p in [*plan.target.model.parameters(), *loop.drafter.parameters()]}
    held[head.untyped_storage()._cdata] = head.nbytes
    measured = sum(held.values()) + peak_bytes(loop.run)
    planned = plan.memory(plan.shape())
    for part in ("its copies for speed", "hidden states that are kept"):  # which this loop lacks
        del planned[part]
    assert measured / 1.5 < sum(planned.values()) < 1.5 * measured


def test_weights_and_moments_of_a_plan_are_those_of_the_files(tmp_path):
    plan, loop = make_loop("many small blocks", tmp_path)
    config, drafter, _, _ = SHAPES["many small blocks"]
    config.save_pretrained(tmp_path / "target")
    target = paper_target(str(tmp_path / "target"), torch.float32)
    recipe = replace(plan.recipe, target=str(tmp_path / "target"))
    on_paper = plan_recipe(recipe, plan.trained, NOTHING)
    assert target.head.weight.is_meta and on_paper.target_bytes == plan.target_bytes
    assert on_paper.memory(plan.shape()) == plan.memory(plan.shape())
    for batches in loop.batches_of_steps():
        loop.take_step(batches)
    loop.save()
    (folder,) = tmp_path.glob("checkpoint-*")
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    parts = plan.memory(plan.shape())
    weights = parts["drafter"] + parts["optimizer's moments"]
    files = sum(written[name] for name in ("model.safetensors", "optimizer.safetensors"))
    assert weights < files < weights + 2**14
    assert sum(written.values()) < plan.disk_bytes / 3


@pytest.mark.parametrize("name", wide(SHAPES, *DEFAULT))
def test_the_operations_of_a_step_are_those_that_torch_counts(name, tmp_path):
    plan, loop = make_loop(name, tmp_path)
    batches = next(loop.batches_of_steps())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loop.take_step(batches)
    planned = sum(plan.flops(plan.shape()).values())
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.parametrize("head", [None, "lilicorr"])
def test_measuring_a_block_takes_the_planned_operations(head, tmp_path):
    plan, _ = make_loop("a head, bf16" if head else "many small blocks", tmp_path)
    text = torch.randint(5, 1999, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    response = Response("0", "set", [], text, [[NUM_TOKENS - NUM_ANSWERED, NUM_TOKENS]])
    dataset = ResponseDataset([response], max_length=NUM_TOKENS, num_anchors=None, seed=0)
    dataset.keep_features(plan.target, plan.drafter.target_layer_ids, limit_bytes=1e9)
    with FlopCounterMode(display=False) as counter:
        heldout_acceptance(plan.drafter, plan.target, dataset)
    planned = plan.measuring_seconds(NUM_ANSWERED - 1) * SPEED.flops
    assert planned / 1.5 < counter.get_total_flops() < 1.5 * planned


@pytest.fixture
def answered(tmp_path) -> list[str]:
    """A recipe's folder with answers, and a target of which there are only config and tokenizer."""
    SHAPES["many small blocks"][0].save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    prompts = make_prompts(f"question {i}" for i in range(20))
    path = write_rows(tmp_path / "prompts.jsonl", ({"messages": one.turns[0], "id": one.id} for one in prompts))
    rows = (asdict(Response(one.id, "prompts", one.turns[0], list(range(5, 45)), [[10, 40]])) for one in prompts)
    (out := tmp_path / "out").mkdir()
    write_rows(out / "responses.jsonl", rows)
    meta = known_settings(RespondConfig(), thinking=False) | {"target": "x", "complete": True, "num_prompts": 20}
    (out / "responses.meta.json").write_text(json.dumps(meta))
    return ["--target", str(tmp_path / "target"), "--output", str(out), "--prompts.path", path]


def files(folder) -> dict:
    """What is written, but for the answers in the form in which they are read fast."""
    names = ("corpus.arrow", ".dpace.json", ".dpace.corpus.lock")
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in names}


@pytest.mark.parametrize("verb", ["respond", "train", "compare", "bench", "check"])
def test_a_dry_run_says_what_would_be_done_and_does_nothing(verb, answered, tmp_path, capsys):
    """There are no weights, so that any work would fail."""
    (tmp_path / "out" / "drafter").mkdir()
    before = files(tmp_path)
    options = answered if verb != "respond" else [*answered, "--output", str(tmp_path / "other")]
    if verb == "check":
        options = ["--prompts", answered[-1], "--target", answered[1], "--drafter", str(tmp_path / "out")]
    assert main([verb, *options, "--dry-run"]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 6 and all(len(line.replace(str(tmp_path), "")) <= 80 for line in lines), lines
    assert any(line.startswith("time: ") for line in lines) and files(tmp_path) == before


@pytest.mark.parametrize("verb", ["respond", "compare", "bench"])
def test_a_dry_run_refuses_prompts_that_the_target_would_refuse(verb, answered, tmp_path, capsys):
    (tmp_path / "out" / "drafter").mkdir()
    output = ["--output", str(tmp_path / "other")] if verb != "bench" else []
    group = "bench" if verb == "bench" else "respond"
    command = [verb, *answered, *output, "--dry-run"]
    assert main([*command, f"--{group}.max-new-tokens", "40000"]) == 1
    assert re.search("with 40000 new tokens it passes the target's limit of 32768", capsys.readouterr().err)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    rows = [{"messages": [{"role": "user", "content": f"w{i}"}], "tools": tools} for i in range(20)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    assert main(command) == 1
    assert "knows no `tools`" in capsys.readouterr().err


def test_a_training_says_where_it_goes_on(answered, tmp_path, capsys):
    times = []
    for _ in range(2):
        assert main(["train", *answered, "--dry-run", "--train.max-steps", "1000000"]) == 0, capsys.readouterr().err
        lines = capsys.readouterr().out.splitlines()
        times.append(seconds_of(next(line for line in lines if line.startswith("time: "))))
        (tmp_path / "out" / "drafter" / "checkpoints" / "checkpoint-900000").mkdir(parents=True, exist_ok=True)
    assert "goes on at step 900,001" in lines and times[1] < times[0] / 5


def test_plan_needs_no_weights_and_says_what_to_change(answered, tmp_path, capsys):
    assert main(["plan", *answered, "--memory", "20MiB", "--device", "cpu"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "does not fit in 20.0 MiB" in said and "largest --train.batch-size that fits: 0" in said
    assert "makes it fit: a lower --train.num-anchors" in said
    assert main(["plan", *answered, "--memory", "80GB", "--prompts.path", str(tmp_path / "none.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "no prompts yet" in said and "fits in 74.5 GiB" in said and "time: " not in said
    assert main(["plan", *answered, "--memory", "4 furlongs"]) == 1
    assert "24GiB" in capsys.readouterr().err
    path = tmp_path / "plan.yaml"
    path.write_text("memory: 20MiB\n")
    assert main(["plan", str(path), *answered, "--device", "cpu"]) == 1
    assert capsys.readouterr().out == "", "the other verbs would not read this recipe"


def test_a_target_that_reads_images_is_planned_for(tmp_path, capsys):
    make_sharp_target("qwen2.5-vl").model.config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    command = ["respond", "--target", str(tmp_path), "--prompts.path", "demo", "--output", str(tmp_path / "out")]
    assert main([*command, "--respond.max-new-tokens", "8", "--dry-run"]) == 0, capsys.readouterr().err


def test_answers_that_are_kept_tell_how_long_others_take(answered, tmp_path, capsys):
    kept = {str(i): AnswerLengths(n, [n]) for i, n in enumerate([3, 9, 1, 1, 5])}
    recipe = Recipe(respond=RespondConfig(max_new_tokens=8))
    assert mean_answer(kept, recipe) == 19 / 5 and mean_answer({}, recipe) == 8
    path = tmp_path / "out" / "responses.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    prompts = PromptsConfig(path=str(tmp_path / "prompts.jsonl"))
    recipe = Recipe(target=str(tmp_path / "target"), output=str(tmp_path / "out"), prompts=prompts)
    lines = answer_lines(recipe, split_prompts(recipe.prompts))
    assert lines[1].startswith("answers: 4 kept, 16 answers to write") and lines[2].startswith("time: about ")
    path.unlink()
    assert main(["plan", *answered]) == 0
    printed = capsys.readouterr().out
    assert "time: about " in printed and "no answers yet" in printed and "fits in " in printed


def test_answers_compute_each_token_once_or_read_the_copies_of_weights_in_each_step(tmp_path):
    plan, _ = make_loop("many small blocks", tmp_path)
    recipe = replace(plan.recipe, respond=RespondConfig(max_new_tokens=10, batch_size=2))
    prompts = make_prompts(["x" * 400] * 3)
    tokens = sum(len(str(prompt.turns)) for prompt in prompts) / 4 + 3 * 10
    fast = SPEED._replace(bytes_per_second=1e30)
    on = plan.machine._replace(speed=fast)
    each = 2 * plan.target.model.num_parameters() / fast.flops
    assert answering_seconds(recipe, replace(plan, machine=on), prompts, {}) == pytest.approx(tokens * each)
    on = plan.machine._replace(speed=SPEED._replace(flops=1e30))
    step = plan.target_bytes / 2 / SPEED.bytes_per_second
    assert answering_seconds(recipe, replace(plan, machine=on), prompts, {}) == pytest.approx(2 * 10 * step)


def test_the_speed_follows_from_the_least_time(monkeypatch):
    times = SimpleNamespace(times=[0.05, 0.02, 0.03])
    monkeypatch.setattr("dpace.plan.speed.Timer.blocked_autorange", lambda *_, **__: times)
    speed = measure_speed.__wrapped__(torch.device("cpu"), torch.float32)
    assert speed == pytest.approx((2 * 512 * 1024 * 1024 * 50, 4 * 2**25 * 50))


def seconds_of(line: str, name: str = "time:") -> float:
    """The time that a line announces, or a part of it."""
    number, unit = re.search(rf"{name} (?:about |up to )?([\d.]+) (s|min|h|days)", line).groups()  # pyright: ignore
    return float(number) * {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]


@pytest.mark.wide
def test_the_announced_time_counts_what_is_left_and_the_disk_is_a_bound(
    language_folder, language_prompts, tmp_path, capsys, monkeypatch
):
    """Tokens are bounded by prompt and answer, not by the longest conversation; what is finished takes no time."""
    monkeypatch.setattr("dpace.plan.speed.measure_speed", lambda *_: SPEED)
    path = write_prompts(tmp_path / "prompts.jsonl", language_prompts)
    out = tmp_path / "out"
    args = ["compare", "--target", str(language_folder), "--output", str(out), "--seeds", "0"]
    args += ["--prompts.path", path, "--respond.max-new-tokens", "8", "--drafter.num-layers", "1"]
    args += ["--objectives", "dpace", "--train.max-steps", "2", "--train.num-anchors", "4", "--bench.num-prompts", "1"]
    args += ["--bench.max-new-tokens", "8", "--bench.temperatures", "0"]

    def announced(*more: str) -> float:
        assert main([*args, *more, "--dry-run"]) == 0, capsys.readouterr().err
        (line,) = re.findall("time: .*", capsys.readouterr().out)
        parts = re.findall(r"(start|answers|training|measuring|decoding) ", line)
        total = seconds_of(line)
        assert total == pytest.approx(sum(seconds_of(line, part) for part in parts), rel=0.05, abs=5)
        return total

    first = announced()
    assert announced("--train.max-length", "100000") == first > 4 * START_SECONDS
    assert announced("--train.max-steps", "4") > first
    assert main(args) == 0
    (needed,) = re.findall(r"disk: up to ([\d.]+) MiB", capsys.readouterr().err)
    assert sum(each.stat().st_size for each in out.rglob("*") if each.is_file()) < float(needed) * 2**20
    assert announced() == START_SECONDS
    for name in ("provenance.json", "heldout.json"):  # as a drafter is left that was interrupted before its last step
        (out / "dpace" / "seed-0" / name).unlink()
    assert START_SECONDS < announced() < first / 2


def test_answers_take_no_more_disk_than_announced(language_folder, tmp_path, capsys):
    """Where prompts are longer than answers too, and while the file is put in order."""
    rows = ({"messages": [{"role": "user", "content": f"w{i} " * 90}], "id": str(i)} for i in range(12))
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "out"
    args = ["respond", "--target", str(language_folder), "--output", str(out), "--prompts.path", path]
    assert main([*args, "--respond.max-new-tokens", "2"]) == 0
    (needed,) = re.findall(r"disk: up to ([\d.]+) KiB", capsys.readouterr().err)
    written = sum(each.stat().st_size for each in out.glob("responses*"))
    assert 2 * written < float(needed) * 2**10


@pytest.mark.parametrize(("tracker", "fix"), [("wandb", "pip install wandb"), ("abacus", "does not know")])
def test_a_tracker_is_missed_before_any_work(tracker, fix, answered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpace.train.progress.get_available_trackers", list)
    assert main(["train", *answered, "--train.report-to", tracker]) == 1
    assert fix in capsys.readouterr().err and not (tmp_path / "out" / "drafter").exists()


def test_a_full_disk_is_seen_before_any_work(answered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpace.plan.lines.free_disk", lambda _: 1000)
    for verb in ("train", "compare"):
        assert main([verb, *answered]) == 1
        assert "make room" in capsys.readouterr().err
    assert not (tmp_path / "out" / "drafter").exists()
