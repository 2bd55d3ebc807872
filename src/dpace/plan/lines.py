"""Write a plan in lines of at most 80 columns: what a verb will do, and what it takes.

Recipes, prompts and plans come in; lines go out, which a verb prints before it starts. A disk with too little room is
refused here.
"""

import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpace.config import BenchConfig, CheckConfig, CompareConfig, Recipe
from dpace.plan.speed import START_SECONDS, Number, TargetSpeed
from dpace.plan.step import BatchShape
from dpace.plan.training import (
    Conversations,
    TrainingPlan,
    expected_lengths,
    find_conversations,
    find_speed,
    mean_answer,
    plan_recipe,
    steps_done,
)
from dpace.prompts.prompts import Prompt, PromptParts, first_of_each_set
from dpace.respond.conversation import own_messages
from dpace.respond.responses import Response, responses_by_id

ANSWER_BYTES = 12
"""Bytes of a token in `responses.jsonl`: its number, and its text."""
NUM_WAYS = 18
"""Ways in which `dpace check` answers a prompt."""
LARGEST_BATCH = 64
"""Largest batch that is tried."""
SMALLER = "a smaller target, more memory, or several GPUs with --train.target-shard fsdp"
MAKE_ROOM = "make room, or name another folder with --output"


def size(num_bytes: Number) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def duration(seconds: Number) -> str:
    """Write a time in its largest unit that fits, such as 12 min."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{max(1, seconds):.0f} s"


def count(number: int, noun: str) -> str:
    """Write a number of things, such as 1 prompt or 2,000 prompts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def time_line(seconds: Mapping[str, Number], *, is_bound: bool = False) -> str:
    """Write how long work takes altogether, with the start of the command, and its parts."""
    total = duration(START_SECONDS + sum(seconds.values()))
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if value >= 1)
    return f"time: {'up to' if is_bound else 'about'} {total}{': ' if parts else ''}{parts}"


def prompts_line(parts: PromptParts) -> str:
    """Write how many prompts each part has."""
    return (
        f"prompts: {len(parts.train):,} to train, {len(parts.validation):,} to choose by, "
        f"{len(parts.heldout):,} held out"
    )


def free_disk(folder: str | Path) -> int:
    """Return the free bytes of the disk that a folder is on or will be on."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_line(folder: str | Path, needed: int) -> str:
    """Write how much of a disk a folder takes and has, and refuse one with too little room.

    Args:
        folder: that will be written to, or a file that will grow.
        needed: bytes that a folder will have at most, what it has already counts; or that the file will grow by.

    Raises:
        ValueError: there is less room.
    """
    free = free_disk(folder)
    written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    more = max(0, needed - written)
    if more > free:
        raise ValueError(f"{folder} will take {size(more)} more, and its disk has {size(free)} free; {MAKE_ROOM}")
    return f"disk: up to {size(needed)} in {folder}, {size(free)} free"


def kept_answers(recipe: Recipe) -> dict[str, Response]:
    """Read the answers that a recipe's folder has, by the prompt's id."""
    return responses_by_id(Path(recipe.output) / "responses.jsonl")


def answering_seconds(
    recipe: Recipe, target: TargetSpeed, prompts: Sequence[Prompt], kept: Mapping[str, Response]
) -> Number:
    """Estimate the seconds in which the target reads prompts and writes answers, in batches, like those it wrote."""
    turns = sum(len(prompt.turns) for prompt in prompts)
    num_read = expected_lengths(prompts, recipe, 0)[0].sum()
    batch_size = recipe.respond.batch_size
    longest = mean_answer(kept.values(), recipe.respond.max_new_tokens, batch_size)
    return target.reading_seconds(num_read) + target.decoding_seconds(turns, longest, batch_size)


def answer_lines(recipe: Recipe, parts: PromptParts) -> list[str]:
    """Write what `dpace respond` will do.

    Raises:
        ValueError: the disk has no room for the answers, or a prompt has no reply to train on.
    """
    kept = kept_answers(recipe)
    waiting = [prompt for part in parts for prompt in part if prompt.id not in kept]
    lines = [prompts_line(parts)]
    respond = recipe.respond
    if respond.source == "own":
        for prompt in waiting:
            own_messages(prompt)
        return [*lines, f"answers: {len(kept):,} kept, {len(waiting):,} taken from the prompts"]
    limit = respond.max_new_tokens
    turns = sum(len(prompt.turns) for prompt in waiting)
    servers = respond.server
    where = f" at each of {count(len(servers), 'server')}" if servers else ""
    lines.append(
        f"answers: {len(kept):,} kept, {count(turns, 'answer')} to write, up to {limit} tokens each; "
        f"{respond.batch_size} at once{where}"
    )
    if not servers:
        seconds = answering_seconds(recipe, find_speed(recipe), waiting, kept)
        lines.append(time_line({"answers": seconds}, is_bound=not kept))
    return [*lines, disk_line(Path(recipe.output) / "responses.jsonl", ANSWER_BYTES * turns * limit)]


def num_decodings(bench: BenchConfig, prompts: Sequence[Prompt], num_drafters: int) -> int:
    """Count the answers that `dpace.measure.benchmark.bench` decodes."""
    turns = sum(len(prompt.turns) for prompt in prompts)
    return turns * len(bench.temperatures) * (1 + num_drafters * len(bench.widths) * len(bench.verify_rules))


def decoding_lines(recipe: Recipe, prompts: Sequence[Prompt], *, num_drafters: int) -> list[str]:
    """Write what `dpace bench` will decode, one prompt at a time, and how long it takes."""
    bench = recipe.bench
    prompts = first_of_each_set(prompts, bench.num_prompts)
    kept = kept_answers(recipe)
    like_kept = [kept[prompt.id] for prompt in prompts if prompt.id in kept]
    answers = num_decodings(bench, prompts, num_drafters)
    left = max(0, answers - records_of(Path(recipe.output)))
    seconds = find_speed(recipe).decoding_seconds(left, mean_answer(like_kept, bench.max_new_tokens))
    return [
        f"prompts: {len(prompts):,}, each at {count(len(bench.temperatures), 'temperature')}, plain and "
        f"{count(num_drafters, 'drafter')} x {count(len(bench.widths), 'width')} x "
        f"{count(len(bench.verify_rules), 'rule')}",
        f"answers: {answers:,} of up to {bench.max_new_tokens} tokens, {left:,} left",
        time_line({"decoding": seconds}, is_bound=not like_kept),
    ]


def checking_lines(config: CheckConfig, num_prompts: int) -> list[str]:
    """Write what `dpace check` will decode, and how long it takes."""
    speeds = [find_speed(Recipe(target=config.target, dtype=dtype)) for dtype in config.dtypes]
    seconds = sum(speed.decoding_seconds(NUM_WAYS * num_prompts, config.max_new_tokens) for speed in speeds)
    return [
        f"prompts: {num_prompts}, each in {' and '.join(config.dtypes)}",
        f"answers: {NUM_WAYS} to each, of up to {config.max_new_tokens} tokens",
        time_line({"decoding": seconds}, is_bound=True),
    ]


def records_of(folder: Path) -> int:
    """Count the answers that a benchmark has kept in a folder; of several, the one that has kept most."""
    return max((path.read_bytes().count(b"\n") - 1 for path in folder.glob("bench-*.jsonl")), default=0)


def train_lines(recipe: Recipe, conversations: Conversations, folder: Path) -> list[str]:
    """Write what the training of a drafter takes.

    Raises:
        ValueError: the disk has no room for it, or the drafter cannot work with this target.
    """
    plan = plan_recipe(recipe, conversations)
    return [
        *training_lines(plan, [folder]),
        time_line(plan.seconds([folder]), is_bound=not conversations.is_known),
        disk_line(folder, plan.disk_bytes),
    ]


def comparison_lines(config: CompareConfig, parts: PromptParts, folders: Sequence[Path]) -> list[str]:
    """Write what `dpace compare` or `dpace demo` takes; what is finished takes no time.

    Raises:
        ValueError: the disk has no room for it, or the drafter cannot work with this target.
    """
    kept = kept_answers(config)
    waiting = [prompt for part in parts for prompt in part if prompt.id not in kept]
    answer_tokens = mean_answer(kept.values(), config.respond.max_new_tokens)
    plan = plan_recipe(config, find_conversations(config, parts, kept))
    target = plan.target
    answers = measuring = 0.0
    if config.respond.source == "target" and not config.respond.server:
        answers = answering_seconds(config, target, waiting, kept)
    if unmeasured := [folder for folder in folders if not (folder / "heldout.json").exists()]:
        tokens, blocks = expected_lengths(parts.heldout, config, answer_tokens).sum(1)
        measuring = target.reading_seconds(tokens)
        measuring += target.seconds_of(len(unmeasured) * blocks * plan.flops["block"])
    decoded = first_of_each_set(parts.heldout, config.bench.num_prompts)
    decodings = num_decodings(config.bench, decoded, len(folders) // len(config.seeds))
    decodings -= records_of(Path(config.output) / "decode")
    measuring += target.decoding_seconds(decodings, min(config.bench.max_new_tokens, answer_tokens))
    training = sum(plan.seconds(folders).values())
    seconds = {"answers": answers, "training": training, "measuring": measuring}
    lines = training_lines(plan, folders)
    if len(folders) > 1:
        lines[0] = f"{len(folders)} x {lines[0]}"
    if not plan.fits:
        lines.append("it may not fit in memory: `dpace plan` says what to lower")
    return [
        prompts_line(parts),
        *lines,
        time_line(seconds, is_bound=not kept),
        disk_line(config.output, len(folders) * plan.disk_bytes),
    ]


def training_lines(plan: TrainingPlan, folders: Sequence[Path]) -> list[str]:
    """Write what the training of drafters is, and at which step one goes on."""
    train = plan.paper.recipe.train
    known = plan.conversations
    machine = plan.machine
    num_steps = plan.num_steps or 0
    going_on = [done + 1 for folder in folders if 0 < (done := steps_done(folder)) < num_steps]
    batch = train.batch_size * train.gradient_accumulation_steps * machine.ranks
    conversations = "no prompts yet"
    if known.number is not None:
        tokens = int(known.number * known.mean_tokens)
        about = "" if known.is_known else "about "
        conversations = f"{count(known.number, 'conversation')} ({about}{tokens:,} tokens)"
    features: str = plan.features
    if features != "computed in every step":
        features += f" ({size(plan.feature_bytes)})"
    device = "GPU" if machine.is_cuda else "CPU"
    rate = f"{device}, {plan.target.speed.flops / 1e12:.3g} TFLOP/s{'' if machine.is_here else ', assumed'}"
    peak_bytes = plan.step.peak_bytes + machine.memory - plan.room  # with CUDA's context
    return [
        f"training: {count(num_steps, 'step') if num_steps else 'steps'} of {batch}, {conversations}",
        *(f"goes on at step {step:,}" for step in going_on),
        f"drafter: {plan.drafter_parameters / 1e6:.4g} M parameters, {size(2 * plan.drafter_parameters)}; "
        f"hidden states {features}",
        f"memory: {size(peak_bytes)} at the peak, {size(machine.memory)} free ({rate})",
    ]


def memory_lines(plan: TrainingPlan) -> list[str]:
    """Write the memory of a step by part, and its operations."""
    flops = sum(plan.step.flops.values())
    shares = ", ".join(f"{name} {number / flops:.0%}" for name, number in plan.step.flops.items() if number)
    return [
        "memory at the peak of a training step, computed:",
        *(f"  {part:<28} {size(number):>10}" for part, number in plan.step.parts.items()),
        f"  {'sum':<28} {size(plan.step.peak_bytes):>10}",
        f"operations of the largest step: {flops / 1e12:.3g} TFLOP ({shares})",
    ]


def fit_lines(plan: TrainingPlan) -> list[str]:
    """Write the largest batch that fits, or what to change where the recipe's does not."""
    shape = plan.conversations.shape
    memory = size(plan.machine.memory)

    def num_fitting(shapes: Sequence[BatchShape], *, checkpointing: bool = False) -> int:
        """Count the shapes, from small to large ones, with which a step fits."""
        return bisect_right(
            shapes, plan.room, key=lambda shape: plan.paper.take(shape, checkpointing=checkpointing).peak_bytes
        )

    most = max(LARGEST_BATCH, shape.batch_size) if plan.fits else shape.batch_size
    batches = [shape._replace(batch_size=number) for number in range(1, most + 1)]
    fewer = num_fitting(batches)
    if plan.fits:
        return [f"fits in {memory}: also --train.batch-size {fewer}"]
    ways = [f"--train.batch-size {fewer}"] if fewer else []
    slower = num_fitting(batches, checkpointing=True)
    if slower > fewer:
        ways.append(f"--train.batch-size {slower} --train.gradient-checkpointing, which costs time")
    blocks = [2**power for power in range(shape.num_blocks.bit_length())]
    few_blocks = [batches[0]._replace(num_blocks=number) for number in blocks]
    if not ways and (number := num_fitting(few_blocks, checkpointing=True)):
        ways = [f"--train.batch-size 1 --train.gradient-checkpointing --train.num-anchors {blocks[number - 1]}"]
    return [
        f"does not fit in {memory}: a step needs {size(plan.step.peak_bytes)}. Each of these makes it fit:",
        *(f"  {way}" for way in ways or [SMALLER]),
    ]
