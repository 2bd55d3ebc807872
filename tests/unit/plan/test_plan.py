"""What is said before a run starts: memory, steps and disk, and that nothing starts with `--dry-run`."""

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from dpace.batches.dataset import ResponseDataset
from dpace.cli import main
from dpace.config import DrafterConfig, LossConfig, PromptsConfig, Recipe, RespondConfig, TrainConfig
from dpace.loss.objective import make_weigh
from dpace.measure.heldout import heldout_acceptance
from dpace.plan.lines import answer_lines
from dpace.plan.speed import START_SECONDS, Speed, measure_speed
from dpace.plan.step import BatchShape, PaperStep, make_drafter, make_target
from dpace.plan.training import Machine, expected_conversations, mean_answer, num_steps, plan_training
from dpace.prompts.prompts import split_prompts
from dpace.respond.responses import Response, known_settings
from dpace.target import Target
from dpace.train.loop import TrainingLoop
from dpace.train.run import choose_conversations
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
    "long blocks, AdamW": (
        Qwen3Config(
            vocab_size=9000, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
        ),
        DrafterConfig(num_layers=3, block_size=16),
        LossConfig(objective="dflash"),
        TrainConfig(batch_size=2, num_anchors=64, max_steps=2, feature_cache_gib=0.0),
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
}  # fmt: skip
NUM_TOKENS, NUM_ANSWERED = 120, 80


def measured_bytes(target: Target, recipe: Recipe, folder) -> tuple[int, int]:
    """Peak in bytes of what torch's allocator gave while the real loop took two steps, and rows of the head."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, target.config.vocab_size - 1, (12, NUM_TOKENS), generator=generator).tolist()
    spans = [[NUM_TOKENS - NUM_ANSWERED, NUM_TOKENS]]
    responses = [Response(str(i), "set", [], row, spans) for i, row in enumerate(ids)]
    datasets = choose_conversations(responses, [], recipe)
    drafter = make_drafter(target, recipe.drafter)
    weigh = make_weigh(recipe.loss, drafter.block_size)
    loop = TrainingLoop(drafter, target, *datasets, recipe, weigh=weigh, checkpoints=folder)
    loop.save = lambda **_: None
    held = {p.untyped_storage()._cdata: p.nbytes for p in [*target.model.parameters(), *drafter.parameters()]}
    held[loop.scorer.head.weight.untyped_storage()._cdata] = loop.scorer.head.weight.nbytes
    return sum(held.values()) + peak_bytes(loop.run), len(loop.scorer.head.weight)


@pytest.mark.parametrize(
    "name", [name if name == "many small blocks" else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_the_plan_is_near_the_measured_peak(name, tmp_path):
    config, drafter, loss, train = SHAPES[name]
    recipe = Recipe(drafter=drafter, loss=loss, train=train)
    target = Target(AutoModelForCausalLM.from_config(config))
    measured, num_rows = measured_bytes(target, recipe, tmp_path)
    shape = BatchShape(train.batch_size, NUM_TOKENS, min(train.num_anchors, NUM_ANSWERED - 1))
    if loss.vocabulary == "seen":
        shape = shape._replace(num_head_rows=num_rows)
    step = PaperStep(make_target(config, torch.float32), recipe, is_cuda=False)
    step.take(shape)  # makes the moments
    assert step.take(shape).peak_bytes == pytest.approx(measured, rel=0.15)


def test_a_heads_work_grows_with_the_blocks():
    config, drafter, _, train = SHAPES["many small blocks"]
    recipe = Recipe(drafter=replace(drafter, head="lilicorr"), loss=LossConfig(chunk_mib=1), train=train)
    step = PaperStep(make_target(config, torch.float32), recipe, is_cuda=False)
    one, four = (step.take(BatchShape(batch, NUM_TOKENS, 200)).flops["drafter"] for batch in (2, 8))
    assert four / one == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("changes", [{"num_epochs": 2.5}, {"max_steps": 7}, {"gradient_accumulation_steps": 4}])
def test_steps_are_counted_as_the_loop_counts_them(changes, tmp_path):
    recipe = Recipe(train=TrainConfig(**{"num_epochs": 1.0, "batch_size": 3, **changes}))
    target = Target(AutoModelForCausalLM.from_config(SHAPES["many small blocks"][0]))
    for conversations in (1, 2, 13, 24, 25):
        rows = [Response(str(i), "set", [], [5, 6, 7], [[0, 3]]) for i in range(conversations)]
        datasets = choose_conversations(rows, [], recipe)
        drafter = make_drafter(target, recipe.drafter)
        weigh = make_weigh(recipe.loss, drafter.block_size)
        loop = TrainingLoop(drafter, target, *datasets, recipe, weigh=weigh, checkpoints=tmp_path)
        assert num_steps(recipe.train, conversations) == loop.state.max_steps


def write_answered(folder, config) -> list[str]:
    """A recipe's folder with answers, and a target of which there is only the config."""
    config.save_pretrained(folder / "target")
    prompts = make_prompts(f"question {i}" for i in range(20))
    path = write_rows(folder / "prompts.jsonl", ({"messages": one.turns[0], "id": one.id} for one in prompts))
    rows = (asdict(Response(one.id, "prompts", one.turns[0], list(range(5, 45)), [[10, 40]])) for one in prompts)
    out = folder / "out"
    out.mkdir()
    write_rows(out / "responses.jsonl", rows)
    meta = known_settings(RespondConfig(), thinking=False) | {"complete": True, "num_prompts": 20}
    (out / "responses.meta.json").write_text(json.dumps(meta))
    return ["--target", str(folder / "target"), "--output", str(out), "--prompts.path", path]


@pytest.fixture
def answered(tmp_path) -> list[str]:
    return write_answered(tmp_path, SHAPES["many small blocks"][0])


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
    assert "does not fit in 20 MiB" in said and "makes it fit:" in said
    assert main(["plan", *answered, "--memory", "4 furlongs"]) == 1
    assert "24GiB" in capsys.readouterr().err
    path = tmp_path / "plan.yaml"
    path.write_text("memory: 20MiB\n")
    assert main(["plan", str(path), *answered, "--device", "cpu"]) == 1
    assert capsys.readouterr().out == "", "the other verbs would not read this recipe"


@pytest.mark.parametrize("head", [None, "lilicorr"])
def test_measuring_a_block_takes_the_planned_operations(head):
    config, shape, _, _ = SHAPES["many small blocks"]
    recipe = Recipe(drafter=replace(shape, head=head), train=TrainConfig(num_anchors=16, max_steps=2))
    target = Target(AutoModelForCausalLM.from_config(config))
    drafter = make_drafter(target, recipe.drafter)
    text = torch.randint(5, 3999, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    response = Response("0", "set", [], text, [[NUM_TOKENS - NUM_ANSWERED, NUM_TOKENS]])
    dataset = ResponseDataset([response], max_length=NUM_TOKENS, num_anchors=None, seed=0)
    dataset.keep_features(target, drafter.target_layer_ids, limit_bytes=1e9)
    with FlopCounterMode(display=False) as counter:
        heldout_acceptance(drafter, target, dataset)
    conversations = expected_conversations(recipe, None, NUM_ANSWERED)
    machine = Machine(False, torch.float32, 2**34)
    planned = plan_training(recipe, config, conversations=conversations, machine=machine).flops["block"]
    taken = counter.get_total_flops() / (NUM_ANSWERED - 1)
    assert planned / 1.5 < taken < 1.5 * planned


def test_answers_that_are_kept_tell_how_long_others_take(answered, tmp_path, capsys):
    """A batch takes as long as its longest answer."""
    responses = [Response(str(i), "set", [], [0] * n, [[0, n]]) for i, n in enumerate([3, 9, 1, 1, 5])]
    assert mean_answer(responses, 8, 2) == (9 + 1 + 5) / 3 and mean_answer([], 8) == 8
    path = tmp_path / "out" / "responses.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    prompts = PromptsConfig(path=str(tmp_path / "prompts.jsonl"))
    recipe = Recipe(target=str(tmp_path / "target"), output=str(tmp_path / "out"), prompts=prompts)
    lines = answer_lines(recipe, split_prompts(recipe.prompts))
    assert lines[1].startswith("answers: 4 kept, 16 answers to write") and lines[2].startswith("time: about ")
    path.unlink()
    assert main(["plan", *answered]) == 0
    printed = capsys.readouterr().out
    assert "time: up to " in printed and "no answers yet" in printed and "fits in " in printed


def test_the_speed_follows_from_the_least_time(monkeypatch):
    times = SimpleNamespace(times=[0.05, 0.02, 0.03])
    monkeypatch.setattr("dpace.plan.speed.Timer.blocked_autorange", lambda *_, **__: times)
    speed = measure_speed.__wrapped__(torch.device("cpu"), torch.float32)
    assert speed == pytest.approx((2 * 512 * 1024 * 1024 * 50, 4 * 2**25 * 50))


def seconds_of(line: str) -> float:
    """The time that a line announces."""
    number, unit = re.match(r"time: (?:about|up to) ([\d.]+) (s|min|h|days)", line).groups()  # pyright: ignore
    return float(number) * {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]


def test_the_announced_time_counts_what_is_left(language_folder, language_prompts, tmp_path, capsys, monkeypatch):
    """Tokens are bounded by prompt and answer, not by the longest conversation; what is finished takes no time."""
    monkeypatch.setattr("dpace.plan.training.measure_speed", lambda *_: Speed(1e7, 1e6))
    path = write_prompts(tmp_path / "prompts.jsonl", language_prompts)
    args = ["compare", "--target", str(language_folder), "--output", str(tmp_path / "out"), "--seeds", "0", "1"]
    args += ["--prompts.path", path, "--respond.max-new-tokens", "8", "--drafter.num-layers", "1"]
    args += ["--objectives", "dpace", "--train.max-steps", "2", "--train.num-anchors", "4", "--bench.num-prompts", "1"]
    args += ["--bench.max-new-tokens", "8", "--bench.temperatures", "0"]

    def announced(*more: str) -> float:
        assert main([*args, *more, "--dry-run"]) == 0, capsys.readouterr().err
        return seconds_of(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")))

    first = announced()
    assert announced("--train.max-length", "100000") == first > 4 * START_SECONDS
    assert announced("--train.max-steps", "4") > first
    assert main(args) == 0
    capsys.readouterr()
    assert announced() == START_SECONDS
    for name in ("dpace", "dflash"):  # as a drafter is left that was interrupted before its last step
        (tmp_path / "out" / name / "seed-1" / "provenance.json").unlink()
        (tmp_path / "out" / name / "seed-1" / "heldout.json").unlink()
    assert START_SECONDS < announced() < first / 2


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
