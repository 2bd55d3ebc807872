"""Write the prompts of `smollm2-135m`, the drafter that comes with dpace, or those of the demo.

    python benchmarks/box_prompts.py DATA FOLDER
    cp src/dpace/target/drafters/smollm2-135m/recipe.yaml recipe.yaml
    dpace respond recipe.yaml
    dpace train recipe.yaml

DATA has JSONL files with `turns`: `gsm8k_train`, `math_train` and `mbpp_train`; prompts like those of `mbpp` and
`humaneval` in it are left out. FOLDER gets `prompts.jsonl`, 6,005 prompts, which `study.py --prompts` reads too: word
problems, mathematics, tasks of programming and the demo's notes. Most tasks are put together from pools, because there
are only 370 others. They are in ten parts; a third argument is another number of parts.

    python benchmarks/box_prompts.py demo FOLDER

writes the demo's: `train.jsonl` and `heldout.jsonl` (the files of `src/dpace/studies`), and `tuning.jsonl`. They are
maintenance notes to turn into JSON tickets, and word problems. Training and held-out parts draw from disjoint pools of
machines, places, faults, names, numbers, objects and sentence patterns, so no note and no value of a held-out prompt is
in the training part. The tuning part has other prompts from the held-out pools: the demo's settings were first found on
it, so that nothing was chosen on the held-out part.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
import yaml

POOLS: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(Path(__file__).with_name("prompt_pools.yaml").read_text())
"""Values and patterns of notes and problems by part, and things and actions of tasks."""
INSTRUCTION = "Turn each maintenance note into a JSON ticket.\n\n"
TICKET_KEYS = ("machine", "location", "problem", "reported_by", "day")
EXAMPLES = (
    (
        "The glue gun in the studio does not heat up. Greta Holm told us on Tuesday.",
        ("glue gun", "studio", "does not heat up", "Greta Holm", "Tuesday"),
    ),
    (
        "Monday: treadmill in room 118 stops suddenly, reported by Bruno Kaya.",
        ("treadmill", "room 118", "stops suddenly", "Bruno Kaya", "Monday"),
    ),
)
"""Shown in every prompt, before the note: a small model keeps to a form that it sees."""
COUNTS = {
    "notes": {"train": 180, "heldout": 60, "tuning": 24},
    "problems": {"train": 40, "heldout": 40, "tuning": 8},
}
SEEDS = {"train": "train", "heldout": "test", "tuning": "heldout"}
"""What seeds the draw of each part; changing one changes the prompts."""
MAX_CHARACTERS = 700
"""Longest prompt of the files."""
SHARES = {"problems": 220, "mathematics": 200, "code": 130, "notes": 90}
"""Prompts of each kind in a part. Each part has all kinds, so answers may be cut off after any of them."""
NUMBERS = [2, 3, 4, 5, 6, 8, 10, 12]
LEADS = ["Write a python function to", "Write a function to", "Write a Python function to", "Implement a function to"]
SMALL_WORDS = set("write a an the python function to of given implement from in for by using is or not that".split())
"""What two wordings of one task may differ in."""


def fill_pattern(kind: str, part: str, rng: random.Random) -> str:
    """Write a note or a word problem: even numbers for training, odd ones for the held-out part."""
    pools = POOLS[kind]["train" if part == "train" else "heldout"]
    values = {name: rng.choice(pool.split(" | ")) for name, pool in pools.items()}
    shift = 0 if part == "train" else 1
    if kind == "notes":
        values["location"] = values["location"].format(n=2 * rng.randrange(100, 250) + shift)
        values["person"] = f"{values['first']} {values['last']}"
        numbers = {}
    else:
        a, b, d = rng.sample([2 * n + shift for n in range(2, 12)], 3)
        numbers = {"a": a, "b": b, "d": d, "c": 2 * rng.randrange(40, 90) + shift}  # c is larger than the others
    text = values["pattern"].format(**values, **numbers)
    return text[0].upper() + text[1:]


def note_messages(note: str) -> list[dict[str, str]]:
    """Make the conversation that ends with a note, after the worked examples."""
    messages = []
    for example, values in EXAMPLES:
        ticket = dict(zip(TICKET_KEYS, values, strict=True)) | {"status": "open"}
        messages.append({"role": "user", "content": example})
        messages.append({"role": "assistant", "content": json.dumps(ticket, indent=2)})
    messages[0]["content"] = INSTRUCTION + messages[0]["content"]
    return [*messages, {"role": "user", "content": note}]


def demo_rows(kind: str, part: str, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield distinct prompts of one kind and part: as many as the demo has, or the first of a longer list."""
    count = count or COUNTS[kind][part]
    rng = random.Random(f"{kind}/{SEEDS[part]}")
    seen: set[str] = set()
    tuned_on: set[str] = set()
    if part == "heldout":
        tuned_on = {row["messages"][-1]["content"] for row in demo_rows(kind, "tuning")}
    for tries in itertools.count():
        if len(seen) == count:
            return
        text = fill_pattern(kind, part, rng)
        if text not in seen | tuned_on:
            seen.add(text)
            messages = note_messages(text) if kind == "notes" else [{"role": "user", "content": text}]
            yield {"id": f"{kind}/{part}/{len(seen)}", "set": kind, "messages": messages}
        if tries > 100 * count:
            raise RuntimeError(f"the pools of {kind}/{part} are too small for {count} prompts")


def compose_tasks(rng: random.Random) -> list[str]:
    """Put tasks of programming together, each action with each thing, in random order."""
    tasks = []
    for pools in POOLS["tasks"].values():
        for action, thing in itertools.product(pools["action"].split(" | "), pools["thing"].split(" | ")):
            n = rng.choice(NUMBERS)
            lead = rng.choice(LEADS)
            tasks.append(f"{lead} {action.format(x=thing.format(n=n), n=n)}.")
    rng.shuffle(tasks)
    return tasks


def key_of(task: str) -> frozenset[str]:
    """Return what a task asks for, however it is worded."""
    return frozenset(word for word in re.findall(r"[a-z0-9]+", task.lower()) if word not in SMALL_WORDS)


def read_turns(path: Path) -> list[str]:
    """Read the different first turns of a file."""
    turns = [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(turns))


def draw(path: Path, rng: random.Random) -> list[str]:
    """Read prompts that are not too long, in random order."""
    texts = [text for text in read_turns(path) if len(text) <= MAX_CHARACTERS]
    rng.shuffle(texts)
    return texts


def box_rows(data: Path, num_parts: int) -> Iterator[dict[str, Any]]:
    """Yield the prompts of the drafter that comes with dpace."""
    rng = random.Random(0)
    measured = {key_of(text) for name in ("mbpp", "humaneval") for text in read_turns(data / f"{name}.jsonl")}
    code = draw(data / "mbpp_train.jsonl", rng)
    code += [task for task in compose_tasks(rng) if key_of(task) not in measured]
    rng.shuffle(code)
    texts = {
        "problems": draw(data / "gsm8k_train.jsonl", rng),
        "mathematics": draw(data / "math_train.jsonl", rng),
        "code": code,
    }
    kinds = {kind: [[{"role": "user", "content": text}] for text in of_kind] for kind, of_kind in texts.items()}
    kinds["notes"] = [row["messages"] for row in demo_rows("notes", "train", 2500)]
    for part in range(num_parts):
        for kind, share in SHARES.items():
            start = part * share
            for number, messages in enumerate(kinds[kind][start : start + share], start):
                yield {"id": f"{kind}/train/{number}", "set": kind, "messages": messages}


def main(
    data: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], num_parts: tyro.conf.Positional[int] = 10
) -> None:
    """Write the prompts.

    Args:
        data: folder with the files, or the word demo.
        folder: that gets the prompts.
        num_parts: of the drafter's prompts.
    """
    if str(data) == "demo":
        parts = {part: [row for kind in COUNTS for row in demo_rows(kind, part)] for part in SEEDS}
        for part, rows in parts.items():
            random.Random(SEEDS[part]).shuffle(rows)
    else:
        parts = {"prompts": list(box_rows(data, num_parts))}
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
