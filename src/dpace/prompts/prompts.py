"""Read the prompts that the target answers, and split them into parts."""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dpace.config import PromptsConfig
from dpace.prompts.formats import Prompt, read_prompts
from dpace.prompts.overlap import find_repeats
from dpace.system.groups import group_by
from dpace.system.ledger import JsonObject
from dpace.system.progress import count, note


def demo_path(part: str) -> Path:
    """Return the file of the demo's prompts, `train` or `heldout`."""
    return Path(__file__).parents[1] / "studies" / f"{part}.jsonl"


class PromptParts(NamedTuple):
    """Prompts by their purpose; no prompt is in two parts."""

    train: list[Prompt]
    validation: list[Prompt]
    """Prompts that choose the best checkpoint; may be empty."""
    heldout: list[Prompt]
    """Prompts that reported numbers are measured on; nothing is chosen by them."""


def split_prompts(config: PromptsConfig) -> PromptParts:
    """Read the prompts and split them into three parts.

    Without a file of held-out prompts, a fixed random tenth (at most `num_heldout`) is taken out of the training
    prompts. Then a tenth of the remaining ones (at most `num_validation`) is taken out for validation. Prompts that
    begin with the same turn count as one, since the target's answer to it is the same. It prints how many prompts are
    left out, and why.

    Raises:
        ValueError: see `read_prompts`; also a held-out prompt that is in the training file too, or nothing left to
            train on.
    """
    path = config.path
    heldout_path = config.heldout_path
    if path == "demo":
        path = demo_path("train")
        heldout_path = heldout_path or demo_path("heldout")
    prompts = read_prompts(path)
    groups = group_by(prompts, hash_text)  # prompts that say the same
    if heldout_path is None:
        measured = _take_out(groups, config.num_heldout, seed=0)
        if not measured:
            raise ValueError(
                f"--prompts.num-heldout {config.num_heldout} and {path} with {len(prompts)} prompts give no "
                "held-out ones, expected 1 or more and at least 10 different prompts; add prompts, or name a file of "
                "held-out prompts with --prompts.heldout-path"
            )
    else:
        heldout = []
        ids = {prompt.id for prompt in prompts}
        for prompt in read_prompts(heldout_path):
            if same := groups.get(hash_text(prompt)):
                raise ValueError(
                    f"the held-out prompt {prompt.id!r} of {heldout_path} is also a training prompt, {same[0].id!r} of "
                    f"{path}; remove it from one of the files"
                )
            new_id = prompt.id
            while new_id in ids:  # it is another prompt's
                new_id = f"heldout/{new_id}"
            ids.add(new_id)
            heldout.append(replace(prompt, id=new_id))
        measured = list(group_by(heldout, hash_text).values())
    chosen = _take_out(groups, config.num_validation, seed=1)
    # What is measured or chosen by counts each text once; training keeps the copies that its file has.
    num_copies = sum(len(group) - 1 for group in (*measured, *chosen))
    validation = [group[0] for group in chosen]
    left = {prompt.id for prompt in itertools.chain.from_iterable(groups.values())}
    train = [prompt for prompt in prompts if prompt.id in left]
    in_public_sets = set()
    if config.decontaminate:
        in_public_sets = find_repeats([*validation, *train], config.decontaminate)
    parts = PromptParts(
        [prompt for prompt in train if prompt.id not in in_public_sets][: config.limit],
        [prompt for prompt in validation if prompt.id not in in_public_sets],
        [group[0] for group in measured],
    )
    left_out = {"copies of held-out or validation prompts": num_copies, "in the public sets": len(in_public_sets)}
    for reason, number in left_out.items():
        if number:
            note(f"{count(number, 'prompt')} left out: {reason}")
    if not parts.train:
        raise ValueError(f"{config.path} has no prompt left to train on; add some, or leave fewer out")
    return parts


def hash_text(prompt: Prompt) -> bytes:
    """Hash what a prompt's first turn says.

    The order of keys and white space around the contents do not count.
    """
    said = [message | {"content": message["content"].strip()} for message in prompt.turns[0]]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()


def _take_out(groups: dict[bytes, list[Prompt]], limit: int, *, seed: int) -> list[list[Prompt]]:
    """Take a random tenth of the groups out, at most `limit`, and return them in their order."""
    keys = list(groups)
    # Of the groups and not of the prompts, so that a prompt and its copies always go together.
    chosen = random.Random(seed).sample(range(len(keys)), min(limit, len(keys) // 10))
    return [groups.pop(keys[number]) for number in sorted(chosen)]


def prompts_line(parts: PromptParts) -> str:
    """Write how many prompts each part has."""
    train, validation, heldout = map(len, parts)
    return f"prompts: {train:,} to train, {validation:,} to choose by, {heldout:,} held out"


def first_of_each_set(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Choose the first `limit` prompts of each dataset, in their order; all of them for None."""
    chosen = []
    num_chosen = Counter()
    for prompt in prompts:
        if limit is None or num_chosen[prompt.set] < limit:
            num_chosen[prompt.set] += 1
            chosen.append(prompt)
    return chosen


def find_prompt(text: str) -> list[JsonObject]:
    """Find the messages that a text stands for.

    `FILE#ID` is the first turn of a prompt of a file, and `demo#ID` one of the demo's held-out prompts. Other text is
    the user's message, also one of several words that ends in the name of a file.

    Raises:
        ValueError: the file has no prompt of that id; the message names one that it has.
    """
    name, _, prompt_id = text.partition("#")
    # A message may end in the name of a file, which then comes after a space and without an id.
    is_file = name.endswith(".jsonl") and ("#" in text or " " not in text)
    if name != "demo" and not is_file:
        return [{"role": "user", "content": text}]
    prompts = read_heldout_prompts(name)
    for prompt in prompts:
        if prompt_id in (prompt.id, f"heldout/{prompt.id}"):  # as `split_prompts` may have called it
            return prompt.turns[0]
    raise ValueError(f"{name} has no prompt with the id {prompt_id!r}; name one that it has, such as {prompts[0].id!r}")


def read_heldout_prompts(name: str) -> list[Prompt]:
    """Read a file of prompts as `read_prompts` does, or for `demo` the demo's held-out prompts."""
    return read_prompts(demo_path("heldout") if name == "demo" else name)
