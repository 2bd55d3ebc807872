"""Write the prompts of `smollm2-135m`, the drafter that comes with dpace.

    python benchmarks/box_prompts.py DATA FOLDER
    cp src/dpace/target/drafters/smollm2-135m/recipe.yaml recipe.yaml
    dpace respond recipe.yaml
    dpace train recipe.yaml

DATA has JSONL files with `turns`: `gsm8k_train`, `math_train` and `mbpp_train`; prompts like those of `mbpp` and
`humaneval` in it are left out. FOLDER gets `prompts.jsonl`, 6,005 prompts, which `study.py --prompts` reads too: word
problems, mathematics, tasks of programming and the demo's notes. Most tasks are put together from the pools below,
because there are only 370 others. They are in ten parts; a third argument is another number of parts.
"""

import json
import random
import re
import sys
from pathlib import Path

from make_prompts import make

MAX_CHARACTERS = 700
"""Longest prompt."""
NUM_PARTS = 10
SHARES = {"problems": 220, "mathematics": 200, "code": 130, "notes": 90}
"""Prompts of each kind in a part. Each part has all kinds, so answers may be cut off after any of them."""
TASKS = {
    "numbers": (
        "a list of integers|an array of floats|a sorted array|a tuple of numbers|a nested list of numbers|"
        "the rows of a matrix|the values of a dictionary",
        "find the second largest element of {x}|compute the average of {x}|compute the median of {x}|"
        "count the even elements of {x}|count the negative elements of {x}|"
        "find the product of all elements of {x}|compute the running total of {x}|"
        "find the difference between the largest and the smallest element of {x}|remove all zeros from {x}|"
        "return the squares of the odd elements of {x}|find the three smallest elements of {x} with heapq|"
        "check whether {x} contains a value greater than {n}|multiply every element of {x} by {n}|"
        "find the index of the first element of {x} that is larger than {n}|"
        "split {x} into parts of length {n}|rotate {x} to the left by {n} positions|"
        "normalize {x} so that the sum is one|replace every negative element of {x} with zero|"
        "return the elements of {x} that are divisible by {n}|compute the standard deviation of {x}",
    ),
    "strings": (
        "a string|a sentence|each word of a text|a list of strings|the lines of a file|a password",
        "count the vowels in {x}|reverse {x}|remove all digits from {x}|remove the spaces from {x}|"
        "count the capital letters in {x}|check whether {x} starts and ends with the same character|"
        "find the longest word in {x}|replace every tab with {n} spaces in {x}|turn {x} into title case|"
        "count how often each character occurs in {x}|find all numbers in {x} by using regex|"
        "check that {x} has at least {n} characters|return the first {n} characters of {x}|"
        "remove repeated characters from {x}|encode {x} with a Caesar cipher of {n} steps|"
        "split {x} at every comma|check whether {x} contains only letters|"
        "find the most common character of {x}|join {x} with hyphens|remove the punctuation from {x}",
    ),
    "collections": (
        "a list of tuples|a list of dictionaries|a dictionary|two dictionaries|two lists|a list of words|a nested list",
        "sort {x} by the second value|remove the duplicates from {x} and keep the order|"
        "count the elements of {x}|merge {x} into one list|group {x} by the first letter|"
        "convert {x} into a string|find the common elements of {x}|invert {x}|"
        "return the first {n} items of {x}|remove the empty items from {x}|check whether {x} is empty|"
        "count how often each value occurs in {x}|filter {x} by a minimum of {n}|flatten {x}|"
        "pair up the neighbouring items of {x}|pick {n} random items from {x}|find the longest item of {x}|"
        "write {x} to a csv file",
    ),
    "number": (
        "a number|a positive integer|a three digit number|an integer given as a string|each number from 1 to {n}",
        "check whether {x} is a prime|find the sum of the digits of {x}|find all divisors of {x}|"
        "convert {x} to binary|convert {x} to a roman numeral|compute the factorial of {x}|"
        "check whether {x} is a perfect square|check whether {x} is a power of two|reverse the digits of {x}|"
        "count the ones in the binary form of {x}|round {x} to a multiple of {n}|"
        "find the smallest prime factor of {x}|compute the cube of {x}|"
        "check whether {x} is divisible by {n} and by 7|print the multiplication table of {x}",
    ),
    "geometry and money": (
        "with two arguments|with type hints|with a docstring|without any import|"
        "that raises an error for negative values",
        "compute the area of a circle {x}|compute the volume of a cylinder {x}|"
        "compute the distance of two points {x}|convert miles to kilometers {x}|"
        "convert fahrenheit to celsius {x}|compute the perimeter of a rectangle {x}|"
        "compute compound interest after {n} years {x}|compute the price after a discount of {n} percent {x}|"
        "compute the body mass index {x}|compute the area of a triangle {x}|"
        "compute the {n}th fibonacci number {x}|compute the greatest common divisor {x}|"
        "compute the number of days of a month {x}|check whether a year is a leap year {x}|"
        "compute the monthly payment of a loan {x}",
    ),
}
"""Things, and what a function is to do with them; `{n}` is a small number."""
NUMBERS = [2, 3, 4, 5, 6, 8, 10, 12]
LEADS = ["Write a python function to", "Write a function to", "Write a Python function to", "Implement a function to"]
SMALL_WORDS = set("write a an the python function to of given implement from in for by using is or not that".split())
"""What two wordings of one task may differ in."""


def compose_tasks(rng):
    """Put tasks of programming together, each action with each thing, in random order."""
    tasks = []
    for things, actions in TASKS.values():
        for action in actions.split("|"):
            for thing in things.split("|"):
                n = rng.choice(NUMBERS)
                lead = rng.choice(LEADS)
                tasks.append(f"{lead} {action.format(x=thing.format(n=n), n=n)}.")
    rng.shuffle(tasks)
    return tasks


def key_of(task):
    """Return what a task asks for, however it is worded."""
    return frozenset(word for word in re.findall(r"[a-z0-9]+", task.lower()) if word not in SMALL_WORDS)


def read_turns(path):
    """Read the first turns of a file."""
    return [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]


def draw(path, rng):
    """Read different prompts that are not too long, in random order."""
    texts = [text for text in dict.fromkeys(read_turns(path)) if len(text) <= MAX_CHARACTERS]
    rng.shuffle(texts)
    return texts


def main(data, folder, num_parts):
    """Write the prompts."""
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
    kinds["notes"] = [row["messages"] for row in make("notes", "train", 2500)]
    rows = []
    for part in range(num_parts):
        for kind, share in SHARES.items():
            start = part * share
            for number, messages in enumerate(kinds[kind][start : start + share], start):
                rows.append({"id": f"{kind}/train/{number}", "set": kind, "messages": messages})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python benchmarks/box_prompts.py DATA FOLDER [PARTS]")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else NUM_PARTS)
