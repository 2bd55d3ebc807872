"""Let the target write prompts, for users who have none, or none of a kind that will come.

A chat model was trained on what users write too: after the words with which its template opens the user's turn, it
writes as a user would.

Source: Magpie (arXiv 2406.08464).
"""

import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from dpace.config import PromptsWriterConfig, RespondConfig
from dpace.prompts.formats import Prompt, read_prompts
from dpace.respond.in_process import generate_responses
from dpace.system.ledger import (
    append_lines,
    cut_unfinished_line,
    lock_folder,
    read_object,
    register_files,
    write_json,
)
from dpace.system.progress import progress_bar
from dpace.system.provenance import same_run
from dpace.target import Target
from dpace.target.chat import encode_chat, tokenizer_hashes

FILE = "prompts.jsonl"
META_FILE = "prompts.meta.json"
SET = "written"
"""Dataset that results report the prompts under."""
PLACEHOLDER = "dpace asks"
"""Stands for the user's text, to find where the template puts it."""
MOST_FRUITLESS = 256
"""Texts in a row that give no prompt, after which the target is taken to have no more."""


def user_turn(target: Target) -> tuple[list[int], str]:
    """Find the tokens that open a user's turn, and what ends the user's text: a special token, or all ordinary words.

    Raises:
        ValueError: the target has no chat template, one that fails, or one that says neither.
    """
    tokenizer = target.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(f"{target.name} has no chat template, so it does not write as a user; name a chat model")
    messages = [{"role": "user", "content": PLACEHOLDER}]
    encode_chat(target, messages)  # says what is wrong where the template fails
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=target.thinking,
    )
    before, _, after = text.rpartition(PLACEHOLDER)
    # A word brings its own space in most vocabularies, so the one before it would be read as a token of its own.
    opening = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    closing = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if not opening or not closing:
        raise ValueError(
            f"the chat template of {target.name} has nothing before or after the user's text, so nothing says where "
            "that begins and ends; name another chat model"
        )
    words = list(takewhile(lambda token_id: token_id not in tokenizer.added_tokens_decoder, closing))
    return opening, tokenizer.decode(words or closing[:1]).strip()


def write_prompts(target: Target, config: PromptsWriterConfig) -> tuple[Path, int]:
    """Let the target write prompts, appending whole lines to a file.

    Each text is drawn with a seed of its own. Left out are those without an end, without a word, and those that are
    there already. An interrupted call continues where it was.

    Memory: as of `generate_responses`, and the prompts.

    Args:
        target: writes them.
        config: how many, how long, temperature, batch size, seed, and the folder.

    Returns:
        The file, as `--prompts.path` reads it, and the number of its prompts.

    Raises:
        ValueError: see `user_turn`; a file that was made in another way, or not by dpace; or nothing new comes.
        OSError: the disk is full; the same call goes on when there is room.
    """
    opening, end = user_turn(target)
    path = Path(config.output) / FILE
    with lock_folder(path.parent):
        register_files(path.parent, FILE, META_FILE)
        cut_unfinished_line(path)
        written = read_prompts(path) if path.exists() and path.stat().st_size else []
        _note_settings(target, config, path, written)
        texts = {str(prompt.turns[0][-1].get("content")) for prompt in written}
        newest = num_drawn = _count_drawn(config, written)
        with progress_bar() as bar:
            task = bar.add_task("writing prompts", total=config.count, completed=min(len(texts), config.count), info="")
            while len(texts) < config.count:
                draws = range(num_drawn, num_drawn + min(config.batch_size, config.count))
                rows = []
                for draw, text in zip(draws, _draw_texts(target, config, opening, end, draws), strict=True):
                    if text and text not in texts and len(texts) < config.count:
                        texts.add(text)
                        newest = draw
                        messages = [{"role": "user", "content": text}]
                        rows.append({"id": f"{_prefix(config)}{draw}", "set": SET, "messages": messages})
                append_lines(path, rows)
                num_drawn = draws.stop
                if num_drawn - newest > MOST_FRUITLESS:
                    raise ValueError(
                        f"{target.name} wrote {len(texts)} prompts, and {num_drawn - newest} texts after them gave "
                        "none that is new; raise --max-new-tokens or --temperature, or lower --count"
                    )
                bar.update(task, completed=len(texts), info=f"{num_drawn} drawn")
    return path, len(texts)


def _prefix(config: PromptsWriterConfig) -> str:
    """Return how the ids of prompts begin; the number of the draw follows."""
    return f"{SET}/{config.seed}/"


def _draw_texts(
    target: Target, config: PromptsWriterConfig, opening: list[int], end: str, draws: Sequence[int]
) -> list[str]:
    """Draw texts that a user might write; one without an end comes back empty."""
    answering = RespondConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    seeds = [random.Random(f"{config.seed}/{draw}").getrandbits(31) for draw in draws]
    decode = target.tokenizer.decode
    texts = []
    for token_ids in generate_responses(target, [opening] * len(draws), answering, seeds):
        # The fewest first tokens whose text has the end; one more than there are where none has.
        num_tokens = bisect_left(range(len(token_ids) + 1), True, key=lambda count: end in decode(token_ids[:count]))
        text = ""
        if num_tokens <= len(token_ids):
            # Without special tokens, of which the end may be one.
            text, *_ = decode(token_ids[:num_tokens], skip_special_tokens=True).partition(end)
        texts.append(text.strip())
    return texts


def _note_settings(target: Target, config: PromptsWriterConfig, path: Path, written: Sequence[Prompt]) -> None:
    """Write down what the prompts depend on.

    Raises:
        ValueError: some are written already, in another way.
    """
    meta_path = path.parent / META_FILE
    facts = {"target_sha256": target.sha256, **tokenizer_hashes(target)}
    facts |= {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    if written:
        way_out = "set this as it was, or name another folder with --output"
        same_run(read_object(meta_path, way_out), facts, f"{path} holds prompts", way_out)
    write_json(meta_path, {"target": target.name} | facts)  # its name is for people


def _count_drawn(config: PromptsWriterConfig, written: Sequence[Prompt]) -> int:
    """Return how many texts an earlier call drew, as the ids of its prompts say."""
    num_drawn = 0
    for prompt in written:  # the user may have removed some lines, or added others
        number = prompt.id.removeprefix(_prefix(config))
        if number != prompt.id and number.isdecimal():
            num_drawn = max(num_drawn, int(number) + 1)
    return num_drawn
