"""What is said before a run starts: memory, steps, time and disk, and that nothing starts with `--dry-run`."""

import json
import re
from dataclasses import asdict, replace
from shutil import disk_usage
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from dpace.cli import main
from dpace.config import DrafterConfig, LossConfig, Recipe, RespondConfig, TrainConfig
from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh
from dpace.plan.lines import answer_bytes, answering_seconds, disk_line
from dpace.plan.speed import Machine, Speed, measure_speed
from dpace.plan.training import TrainingPlan, known_lengths, plan_recipe
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response, known_settings
from dpace.system.provenance import hash_file
from dpace.target import Target
from dpace.train.loop import TrainingLoop
from dpace.train.run import choose_conversations
from tests.conftest import make_tokenizer
from tests.support.files import make_prompts, write_prompts, write_rows
from tests.support.memory import peak_bytes

SHAPES = {
    "soft labels, checkpointing": (
        LlamaConfig(
            vocab_size=3000, hidden_size=256, intermediate_size=700, num_hidden_layers=7, num_attention_heads=8,
            tie_word_embeddings=True,
        ),
        DrafterConfig(num_layers=2, block_size=10),
        LossConfig(token_loss="kl"),
        TrainConfig(batch_size=3, num_anchors=40, max_steps=2, gradient_checkpointing=True),
    ),
    "a head, bf16, tokens that were seen": (
        Qwen3Config(
            vocab_size=2000, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        ),
        DrafterConfig(num_layers=2, block_size=8, num_features=3, head="lilicorr"),
        LossConfig(vocabulary="seen"),
        TrainConfig(
            optimizer="muon", batch_size=2, gradient_accumulation_steps=2, num_anchors=16, max_steps=2,
            products="bfloat16",
        ),
    ),
}  # fmt: skip
SOFT, HEAD = SHAPES
NUM_TOKENS, NUM_ANSWERED = 120, 80
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
    plan = TrainingPlan(target, machine, recipe, made, known_lengths(datasets[0]))
    return plan, TrainingLoop(made, target, *datasets, recipe, weigh=weigh, checkpoints=folder)


@pytest.mark.parametrize("name", SHAPES)
def test_memory_and_operations_of_a_step_are_near_the_measured_ones(name, tmp_path):
    plan, loop = make_loop(name, tmp_path)
    batches = next(loop.batches_of_steps())
    head = loop.scorer.rows.head.weight
    loop.save = lambda **_: None
    held = {p.untyped_storage()._cdata: p.nbytes for p in [*plan.target.model.parameters(), *loop.drafter.parameters()]}
    held[head.untyped_storage()._cdata] = head.nbytes
    measured = sum(held.values()) + peak_bytes(loop.run)
    planned = plan.memory(plan.batch())
    for part in ("its copies for speed", "hidden states that are kept"):  # which this loop lacks
        del planned[part]
    assert measured / 1.5 < sum(planned.values()) < 1.5 * measured
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loop.take_step(batches)
    assert sum(plan.flops(plan.batch()).values()) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_weights_and_moments_of_a_plan_are_those_of_the_files(tmp_path):
    plan, loop = make_loop(SOFT, tmp_path)
    SHAPES[SOFT][0].save_pretrained(tmp_path / "target")
    on_paper = plan_recipe(replace(plan.recipe, target=str(tmp_path / "target")), plan.lengths)
    assert on_paper.target.head.weight.is_meta
    assert on_paper.memory(plan.batch()) == plan.memory(plan.batch())
    loop.take_step(next(loop.batches_of_steps()))
    loop.save()
    (folder,) = tmp_path.glob("checkpoint-*")
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    parts = plan.memory(plan.batch())
    weights = parts["drafter"] + parts["optimizer's moments"]
    assert weights < written["model.safetensors"] + written["optimizer.safetensors"] < weights + 2**14
    assert sum(written.values()) < plan.disk_bytes / 3


def test_the_time_of_a_training_is_that_of_its_steps_and_of_hidden_states(tmp_path):
    """Of 12 conversations, 3 in a step; hidden states that are kept are read once, and else in each of 5 steps."""
    plan, _ = make_loop(SOFT, tmp_path)
    flops = plan.flops(plan.batch())
    target = flops.pop("target") / SPEED.flops
    steps = 5 * sum(flops.values()) / SPEED.flops
    for cache_gib, num_read in ((4.0, 4), (0.0, 5)):
        train = replace(plan.recipe.train, max_steps=5, feature_cache_gib=cache_gib)
        planned = replace(plan, recipe=replace(plan.recipe, train=train))
        assert planned.seconds == pytest.approx(steps + num_read * target)


def test_a_gpu_that_is_not_at_hand_holds_no_copies_and_no_kept_features(tmp_path):
    plan, _ = make_loop(SOFT, tmp_path)
    on_gpu = replace(plan, machine=plan.machine._replace(is_cpu=False))
    parts = on_gpu.memory(plan.batch())
    assert parts["its copies for speed"] == parts["hidden states that are kept"] == 0 < parts["CUDA's context"]
    assert on_gpu.flops(plan.batch())["drafter"] < plan.flops(plan.batch())["drafter"]


@pytest.fixture
def answered(tmp_path) -> list[str]:
    """A recipe's folder with answers, and a target of which there are only config and tokenizer."""
    SHAPES[HEAD][0].save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    prompts = make_prompts(f"question {i}" for i in range(20))
    path = write_rows(tmp_path / "prompts.jsonl", ({"messages": one.turns[0], "id": one.id} for one in prompts))
    rows = (asdict(Response(one.id, "prompts", one.turns[0], list(range(5, 45)), [[10, 40]])) for one in prompts)
    (out := tmp_path / "out").mkdir()
    write_rows(out / "responses.jsonl", rows)
    state = {"target": "x", "complete": True, "responses_sha256": hash_file(out / "responses.jsonl")}
    meta = known_settings(RespondConfig(), thinking=False) | state
    (out / "responses.meta.json").write_text(json.dumps(meta))
    return ["--target", str(tmp_path / "target"), "--output", str(out), "--prompts.path", path]


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TELLS = {
    "respond": "answers: 4 kept, 16 to come\ntime: about ",
    "train": "goes on at step 900,001\n",
    "compare": "drafters: 1 kept, 8 to come\n",
    "bench": "answers: ",
    "check": "answers: ",
}


@pytest.mark.parametrize("verb", TELLS)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(verb, answered, tmp_path, capsys):
    """There are no weights, so that any work would fail."""
    out = tmp_path / "out"
    for name in ("checkpoint-900000", "checkpoint-900000-of-the-user"):
        (out / "drafter" / "checkpoints" / name).mkdir(parents=True)
    (finished := out / "dflash" / "seed-1").mkdir(parents=True)
    (finished / "provenance.json").write_text("{}")
    options = answered
    if verb == "respond":
        lines = (out / "responses.jsonl").read_text().splitlines(keepends=True)
        (out / "responses.jsonl").write_text("".join(lines[:4]))
    if verb == "check":
        options = ["--prompts", answered[-1], "--target", answered[1], "--drafter", str(out)]
    before = files(tmp_path)
    assert main([verb, *options, "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert 1 <= len(lines) <= 7 and all(len(line.replace(str(tmp_path), "")) <= 80 for line in lines), lines
    assert "disk: up to " in said or verb in ("bench", "check")
    assert "time: about " in said and TELLS[verb] in said and files(tmp_path) == before


def test_plan_needs_no_weights_and_says_what_to_change(answered, tmp_path, capsys):
    def plan(*options: str) -> str:
        assert main(["plan", *answered, *options]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    said = plan("--memory", "20MiB", "--device", "cpu")
    assert "does not fit in 20.0 MiB" in said and "largest --train.batch-size that fits: 0" in said
    assert "makes it fit: a lower --train.num-anchors" in said and "time: about " in said
    assert "17 conversations of 40 tokens" in said and "not all answers are there" not in said
    assert said.endswith(f"next: dpace train {' '.join(answered)} --device cpu\n")
    other = ["--output", str(tmp_path / "other"), "--memory=80GB"]
    said = plan(*other)
    assert "17 conversations of 2,0" in said and "not all answers are there" in said and "next: dpace respond" in said
    said = plan(*other, "--prompts.path", str(tmp_path / "none.jsonl"))
    assert "prompts are not on this machine" in said and "fits in 74.5 GiB" in said
    assert "2 conversations of 3,072 tokens" in said
    assert "makes it fit" not in said and "--memory" not in said.splitlines()[-1]


def test_answers_compute_each_token_once_or_read_the_copies_of_weights_in_each_step(tmp_path):
    plan, _ = make_loop(SOFT, tmp_path)
    recipe = replace(plan.recipe, respond=RespondConfig(max_new_tokens=10, batch_size=2))
    prompts = make_prompts(["x" * 400] * 3)

    def seconds(**speed: float) -> float:
        machine = plan.machine._replace(speed=SPEED._replace(**speed))
        return answering_seconds(recipe, replace(plan, machine=machine), prompts)

    num_tokens = sum(len(str(prompt.turns)) for prompt in prompts) / 4 + 3 * 10
    work = num_tokens * 2 * plan.target.model.num_parameters()
    assert seconds(bytes_per_second=1e30) == pytest.approx(work / SPEED.flops)
    assert seconds(flops=1e30) == pytest.approx(2 * 10 * plan.target_bytes / 2 / SPEED.bytes_per_second)


def test_the_speed_follows_from_the_least_time(monkeypatch):
    times = SimpleNamespace(times=[0.05, 0.02, 0.03])
    monkeypatch.setattr("dpace.plan.speed.Timer.blocked_autorange", lambda *_, **__: times)
    speed = measure_speed.__wrapped__(torch.device("cpu"), torch.float32)
    assert speed == pytest.approx((2 * 512 * 1024 * 1024 * 50, 4 * 2**25 * 50))


@pytest.mark.wide
def test_the_announced_disk_is_a_bound(language_folder, language_prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpace.plan.speed.measure_speed", lambda *_: SPEED)
    path = write_prompts(tmp_path / "prompts.jsonl", language_prompts)
    args = ["compare", "--target", str(language_folder), "--output", str(tmp_path / "out"), "--seeds", "0"]
    args += ["--prompts.path", path, "--respond.max-new-tokens", "8", "--drafter.num-layers", "1"]
    args += ["--objectives", "dpace", "--train.max-steps", "2", "--train.num-anchors", "4", "--bench.num-prompts", "1"]
    args += ["--bench.max-new-tokens", "8", "--bench.temperatures", "0"]
    assert main(args) == 0
    said = capsys.readouterr().err
    assert re.search("time: about .*start .*, answers .*, training .*, decoding ", said)
    (needed,) = re.findall(r"disk: up to ([\d.]+) MiB", said)
    written = sum(each.stat().st_size for each in (tmp_path / "out").rglob("*") if each.is_file())
    assert written < float(needed) * 2**20


def test_answers_take_no_more_disk_than_announced(language_target, tmp_path):
    """Where prompts are longer than answers too, and while the file is put in order."""
    recipe = Recipe(respond=RespondConfig(max_new_tokens=2))
    prompts = make_prompts(f"w{i} " * 90 for i in range(12))
    write_responses(language_target, prompts, tmp_path / "responses.jsonl", recipe.respond)
    written = sum(path.stat().st_size for path in tmp_path.glob("responses*"))
    assert 2 * written < answer_bytes(recipe, prompts)


def test_a_full_disk_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1000))
    free = disk_usage(tmp_path).free
    assert disk_line(tmp_path, 1000).startswith(f"disk: up to 1000 B in {tmp_path}, ")
    with pytest.raises(ValueError, match="make room, or name another"):
        disk_line(tmp_path / "new" / "folder", 2 * free)
