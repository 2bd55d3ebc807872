"""What answering and decoding prompts will take: tokens, disk and time."""

from collections.abc import Sequence
from pathlib import Path

from dpace.config import Recipe
from dpace.data.answers import Response, read_responses
from dpace.data.prompts import Prompt, PromptParts
from dpace.device import find_device
from dpace.locate import find_target
from dpace.plan.facts import BYTES_PER_TOKEN, check_disk, count, duration, prompts_line
from dpace.plan.paper import make_target, on_paper, read_shape
from dpace.plan.speed import measure_speed
from dpace.plan.training import find_place


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
