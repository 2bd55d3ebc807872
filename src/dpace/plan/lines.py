"""A plan in lines of at most 80 columns.

What answering and decoding prompts will take: tokens, disk and time.

Sizes and times in words, and the room on a disk; imports no torch.

Find the largest training that fits into a memory, and say it in a sentence.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dpace.config import CompareConfig, Recipe, TrainConfig
from dpace.plan.step import BatchShape, StepPlan, make_target, on_paper, read_shape
from dpace.plan.training import (
    Conversations,
    TrainingPlan,
    find_conversations,
    find_place,
    measure_speed,
    plan_training,
)
from dpace.prompts.prompts import Prompt, PromptParts, split_prompts
from dpace.respond.responses import Response, read_responses
from dpace.system.device import find_device
from dpace.target.locate import find_target

BYTES_PER_TOKEN = 12
"""Bytes of a token in `responses.jsonl`: its number, and its text."""


def size(num_bytes: int | float) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def duration(seconds: int | float) -> str:
    """Write a time in its largest unit that fits, such as 12 min."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{max(1, seconds):.0f} s"


def count(number: int, noun: str) -> str:
    """Write a number of things, such as 1 prompt or 2,000 prompts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def prompts_line(parts: PromptParts) -> str:
    """Say how many prompts each part has."""
    numbers = (len(part) for part in (parts.train, parts.validation, parts.heldout))
    return "prompts: {:,} to train, {:,} to choose by, {:,} held out".format(*numbers)


def free_disk(folder: str | Path) -> int:
    """Give the free bytes of the disk that a folder is on or will be on."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def written_bytes(folder: str | Path) -> int:
    """Give the bytes of all files in a folder; 0 where it is missing."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def check_disk(folder: str | Path, needed: int, fix: str) -> str:
    """Refuse a folder whose disk has too little room, and say how much it takes and has.

    Args:
        folder: that will be written to.
        needed: bytes that it will have at most; what it has already counts.
        fix: what makes it smaller, for the message.

    Raises:
        ValueError: there is less room.
    """
    free = free_disk(folder)
    more = max(0, needed - written_bytes(folder))
    if more > free:
        raise ValueError(f"{folder} will take {size(more)} more, and its disk has {size(free)} free; {fix}")
    return f"disk: up to {size(needed)} in {folder}, {size(free)} free"


def say_training(recipe: Recipe, conversations: Conversations, folder: str | Path, *, drafters: int = 1) -> list[str]:
    """Say what the training of a recipe takes, before the target is loaded.

    Args:
        recipe: every setting.
        conversations: as far as they are known.
        folder: that is written to.
        drafters: number of drafters that are trained with the same settings.

    Raises:
        ValueError: the disk has no room for it, or the drafter cannot work with this target.
    """
    plan = plan_training(recipe, read_shape(find_target(recipe.target)), conversations, find_place(recipe))
    disk = check_disk(folder, drafters * plan.disk_bytes, "make room, or name another folder with --output")
    lines = training_lines(plan, recipe.train)
    if drafters > 1 and plan.seconds is not None:
        lines[0] = f"{drafters} x {lines[0]}"
        lines.append(f"all {drafters} drafters: about {duration(drafters * plan.seconds)}")
    if not plan.fits:
        lines.append("it may not fit in memory: `dpace plan` says what to lower")
    return [*lines, disk]


def comparison_lines(config: CompareConfig, num_drafters: int) -> list[str]:
    """Say what will be answered, trained and measured."""
    parts = split_prompts(config.prompts)
    lines = say_training(config, find_conversations(config), config.output, drafters=num_drafters)
    return [prompts_line(parts), *lines]


def training_lines(plan: TrainingPlan, train: TrainConfig) -> list[str]:
    """Say in three lines what a training takes."""
    step, known, place = plan.step, plan.conversations, plan.place
    steps = "steps unknown: no prompts yet" if plan.num_steps is None else count(plan.num_steps, "step")
    batch = train.batch_size * train.gradient_accumulation_steps * place.ranks
    tokens = known.shape.num_tokens
    of = "an unknown number of conversations"
    if known.number is not None:
        tokens = int(known.number * known.mean_tokens)
        of = f"{count(known.number, 'conversation')} ({'' if known.is_known else 'up to '}{tokens:,} tokens)"
    kept = f"kept ({size(plan.kept_bytes)})" if plan.is_kept else "computed in every step"
    if plan.stored_bytes:
        kept = f"on disk ({size(plan.stored_bytes)})"
    rate = f"{plan.flops_per_second / 1e12:.3g} TFLOP/s{'' if place.is_here else ', assumed'}"
    about = "about" if known.is_known else "up to"  # all conversations are then as long as they may be
    time = "time unknown" if plan.seconds is None else f"{about} {duration(plan.seconds)} at {rate}"
    return [
        f"training: {steps} of {batch}, {of}",
        f"drafter: {step.drafter_parameters / 1e6:.4g} M parameters, {size(plan.drafter_bytes)}; hidden states {kept}",
        f"memory: {size(plan.peak_bytes)} at the peak, {size(place.memory)} free ({place.name}); {time}",
    ]


def memory_lines(step: StepPlan) -> list[str]:
    """Write the memory of a step by part, and its operations."""
    lines = ["memory at the peak of a training step, computed:"]
    lines += [f"  {part:<28} {size(number):>10}" for part, number in step.parts.items()]
    lines.append(f"  {'sum':<28} {size(step.step_bytes):>10}")
    if step.validation_bytes:
        lines.append(f"memory while a validation response is scored: {size(step.validation_bytes)}")
    total = sum(step.flops.values())
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in step.flops.items())
    lines.append(f"operations of the largest step: {total / 1e12:.3g} TFLOP ({shares})")
    return lines


def say_answers(recipe: Recipe, parts: PromptParts, path: Path) -> list[str]:
    """Say what `dpace respond` will do.

    Raises:
        ValueError: the disk has no room for the answers.
    """
    prompts = [*parts.train, *parts.validation, *parts.heldout]
    done = {response.id: response for response in read_responses(path)} if path.exists() else {}
    waiting = [prompt for prompt in prompts if prompt.id not in done]
    if recipe.respond.source == "own":
        return [prompts_line(parts), f"answers: {len(done):,} kept, {len(waiting):,} taken from the prompts"]
    turns, config = sum(len(prompt.turns) for prompt in waiting), recipe.respond
    tokens = turns * config.max_new_tokens
    where, time = "", []
    if config.server:
        where = f" at each of {count(len(config.server), 'server')}"
    else:
        seconds = decoding_seconds(recipe, turns, config.max_new_tokens, config.batch_size)
        time = [f"time: up to {duration(seconds)} if all are that long"]
        if typical := typical_tokens(list(done.values()), config.batch_size):
            seconds = decoding_seconds(recipe, turns, typical, config.batch_size)
            time = [f"{time[0]}, about {duration(seconds)} if like those kept"]
    disk = check_disk(path.parent, BYTES_PER_TOKEN * tokens, "make room, or name another folder with --output")
    return [
        prompts_line(parts),
        f"answers: {len(done):,} kept, {count(turns, 'answer')} to write, up to {config.max_new_tokens} tokens each; "
        f"{config.batch_size} at once{where}",
        *time,
        disk,
    ]


def say_decoding(recipe: Recipe, prompts: Sequence[Prompt], *, max_new_tokens: int, ways: int, what: str) -> list[str]:
    """Say what decoding prompts one by one, in several ways, will take.

    Args:
        recipe: names the target and where it runs.
        prompts: that are decoded.
        max_new_tokens: longest answer in tokens.
        ways: number of times that each prompt is decoded.
        what: says what the ways are.
    """
    turns = sum(len(prompt.turns) for prompt in prompts) * ways
    seconds = decoding_seconds(recipe, turns, max_new_tokens, 1)
    return [
        f"prompts: {len(prompts):,}, each decoded {count(ways, 'time')}",
        f"ways: {what}",
        f"answers: {turns:,} of up to {max_new_tokens} tokens; at most about {duration(seconds)}",
    ]


def typical_tokens(responses: Sequence[Response], batch_size: int) -> float:
    """Give the mean length in tokens of the longest answer of each batch, which takes its time.

    It is 0 without answers.

    Args:
        responses: in the order in which they were answered.
        batch_size: answered at once.
    """
    lengths = [end - start for response in responses for start, end in response.response_spans]
    longest = [max(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    return sum(longest) / max(1, len(longest))


def decoding_seconds(recipe: Recipe, answers: int, num_tokens: int | float, batch_size: int) -> float:
    """Estimate the seconds of plain decoding, by the weights that a step reads and its products.

    All answers have `num_tokens` tokens.
    """
    place = find_place(recipe)
    with on_paper():
        model = make_target(read_shape(find_target(recipe.target)), place.dtype).model
        sizes = [(parameter.numel(), parameter.nbytes) for parameter in model.parameters()]
    flops, bandwidth = measure_speed(find_device(recipe.device), place.dtype)
    step = sum(nbytes for _, nbytes in sizes) / bandwidth + 2 * batch_size * sum(n for n, _ in sizes) / flops
    return -(-answers // batch_size) * num_tokens * step


LARGEST = {"batch_size": 64, "num_anchors": 4096}
"""Largest values that are tried."""
SMALLEST = {"batch_size": 1, "num_anchors": 1, "max_length": 64}
NEAR = 16
"""The largest value that fits is found to one part in this number."""


MOST_LOOKS = 14
"""Most steps that are looked at between the smallest and the largest value."""


def find_largest(peak: Callable[[int], int], room: int, low: int, high: int) -> int:
    """Find about the largest number from `low` to `high` whose peak fits, 0 for none.

    It looks along the chord of the peaks and in the middle, in turn.

    Args:
        peak: gives the bytes for a number; grows with it.
        room: bytes that there are.
        low: the smallest number.
        high: the largest number.
    """
    at_low, at_high = peak(low), peak(high)
    if at_low > room:
        return 0
    if at_high <= room:
        return high
    for look in range(MOST_LOOKS):
        if high - low <= max(1, low // NEAR):
            break
        share = 0.5 if look % 2 else (room - at_low) / (at_high - at_low)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        at_middle = peak(middle)
        if at_middle > room:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return low


def reshape(shape: BatchShape, option: str, value: int) -> BatchShape:
    """Give the largest micro-batch after an option of training was set."""
    if option == "batch_size":
        return shape._replace(batch_size=value)
    if option == "num_anchors":
        return shape._replace(num_blocks=value)
    length, validation = min(shape.num_tokens, value), min(shape.validation_tokens, value)
    return shape._replace(
        num_tokens=length,
        num_blocks=min(shape.num_blocks, length - 1),
        validation_tokens=validation,
        validation_blocks=min(shape.validation_blocks, max(0, validation - 1)),
    )


def say_what_fits(plan: TrainingPlan, train: TrainConfig) -> list[str]:
    """Say the largest batch and number of anchors that fit, or what to change where none does."""
    memory, shape = size(plan.place.memory), plan.conversations.shape

    def largest(option: str, at: BatchShape = shape, checkpointing: bool | None = None) -> int:
        def peak(value: int) -> int:
            return plan.paper.look(reshape(at, option, value), checkpointing=checkpointing).peak_bytes

        now = shape.num_tokens if option == "max_length" else getattr(train, option)
        low, high = (now, max(now, LARGEST[option])) if plan.fits else (SMALLEST[option], now)
        return find_largest(peak, plan.room, low, high)

    if plan.fits:
        batch, anchors = largest("batch_size"), largest("num_anchors")
        return [
            f"fits in {memory}: also --train.batch-size {batch}, or --train.num-anchors {anchors}",
            f"the loss computes logits in chunks of {size(plan.step.chunk_bytes)} (--loss.chunk-mib)",
        ]
    chunk = plan.step.chunk_bytes
    while chunk >= 2**21 and plan.paper.look(shape, chunk_bytes=chunk).peak_bytes > plan.room:
        chunk //= 4
    found = {option: largest(option) for option in SMALLEST}
    ways = [
        f"--train.{option.replace('_', '-')} {value} instead of {getattr(train, option)}"
        for option, value in found.items()
        if value
    ]
    if plan.paper.look(shape, chunk_bytes=chunk).peak_bytes <= plan.room:
        ways.append(f"--loss.chunk-mib {chunk // 2**20} instead of {plan.step.chunk_bytes // 2**20}")
    if not train.gradient_checkpointing and plan.paper.look(shape, checkpointing=True).peak_bytes <= plan.room:
        ways.append("--train.gradient-checkpointing, which costs time")
    if not ways:
        anchors = largest("num_anchors", reshape(shape, "batch_size", 1), checkpointing=True)
        together = f"--train.batch-size 1 --train.gradient-checkpointing --train.num-anchors {anchors}"
        other = "a smaller target, more memory, or several GPUs with --train.target-shard fsdp"
        ways = [together if anchors else other]
    needed = size(plan.peak_bytes)
    return [f"does not fit in {memory}: it needs {needed}. Each of these makes it fit:", *(f"  {way}" for way in ways)]
