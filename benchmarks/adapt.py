"""What a drafter of the base model is worth for a fine-tuned copy of it, before and after some training steps.

    dpace demo --quick --output /tmp/demo
    python benchmarks/adapt.py TARGET /tmp/demo/dpace/seed-42 --text gsm8k_train.jsonl --output /tmp/adapt

TARGET is the base model, and `--text` a JSONL file with `turns` and `reference` in another style, on which a copy is
fine-tuned. The base's drafter then learns from the copy's own answers to the demo's training prompts, beside a drafter
that starts from nothing. Tau is measured on the demo's held-out prompts, as the copy answers them. Each part is kept in
the folder: the same command goes on after it.
"""

import argparse
import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from make_prompts import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpace.batches.dataset import ResponseDataset
from dpace.config import DrafterConfig, RespondConfig
from dpace.drafter import load_drafter
from dpace.engines.initial import start_from
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import tau_gain
from dpace.prompts.prompts import Prompt, demo_path, read_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.train.run import make_datasets, train

FINE_TUNING = {"steps": 60, "batch_size": 2, "learning_rate": 2e-4, "max_length": 160, "layers": 8}
MAX_NEW_TOKENS = 96
STEPS = (25, 100)
NUM_VALIDATION, NUM_TEST = 16, 30


def fine_tune(base: str, text: Path, folder: Path) -> None:
    """Train the last layers of a copy of the base on conversations, with the loss on the answers, and write it."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    model.requires_grad_(False)
    model.model.layers[-FINE_TUNING["layers"] :].requires_grad_(True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=FINE_TUNING["learning_rate"], weight_decay=0.0)
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    for step in range(FINE_TUNING["steps"]):
        batch = rows[step * FINE_TUNING["batch_size"] :][: FINE_TUNING["batch_size"]]
        ids, labels = zip(*(encode(tokenizer, row) for row in batch), strict=True)
        longest = max(map(len, ids))
        inputs = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        is_text = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        loss = model(input_ids=inputs, attention_mask=is_text, labels=wanted).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"fine-tuning, step {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
    tokenizer.save_pretrained(folder)
    model.eval().half().save_pretrained(folder)


def encode(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, and its labels: those of the answer."""
    question = [{"role": "user", "content": row["turns"][0]}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = tokenizer(row["reference"])["input_ids"] + [tokenizer.eos_token_id]
    length = FINE_TUNING["max_length"]
    return (prompt + answer)[:length], ([-100] * len(prompt) + answer)[:length]


def answers_of(target: Target, prompts: list[Prompt], folder: Path) -> list[Response]:
    """Let a target answer prompts, in small batches that are kept one by one."""
    respond = RespondConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=32)
    return write_responses(target, prompts, folder / "responses.jsonl", respond)


def test_prompts() -> list[Prompt]:
    """Return the first prompts of each set of the demo's held-out part."""
    rows = [row for kind in ("notes", "problems") for row in islice(make(kind, "heldout"), NUM_TEST)]
    return [Prompt(row["id"], row["set"], [row["messages"]]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    demo, out = read_recipe(RECIPES["demo-cpu"]), args.output
    demo = replace(demo, target=args.target, train=replace(demo.train, learning_rate=args.learning_rate))
    fine_tune(args.target, args.text, out / "copy")
    target, tests = Target.load(str(out / "copy")), test_prompts()
    training = read_prompts(demo_path("train"))
    answers = answers_of(target, training + tests, out)
    kept, held = answers[: len(training)], answers[len(training) :]

    found = {"the base's, 0 steps": measure(args.drafter, target, held)}
    for steps in STEPS:
        settings = replace(demo.train, max_steps=steps, eval_steps=steps)
        for name, init in (("the base's", args.drafter), ("from nothing", None)):
            drafter = demo.drafter if init is None else DrafterConfig(init=init)
            recipe, start = start_from(replace(demo, train=settings, drafter=drafter), given=())
            datasets = make_datasets(target, kept[NUM_VALIDATION:], kept[:NUM_VALIDATION], recipe)
            folder = out / f"{name.split()[-1]}-{steps}-{args.learning_rate:g}"
            train(target, *datasets, recipe, folder, init=start)
            found[f"{name}, {steps} steps"] = measure(folder, target, held)
    base = Target.load(args.target)
    found["the base's, for the base"] = measure(args.drafter, base, answers_of(base, tests, out / "base"))
    before = found["the base's, 0 steps"]
    print("| drafter | notes | problems | notes, over 0 steps | problems |\n|---|---|---|---|---|")
    for name, taus in found.items():
        is_trained = name.endswith("steps") and taus is not before
        gains = [words_of_gain([taus[kind]], [before[kind]]) if is_trained else "" for kind in taus]
        print("|", " | ".join([name, *map(words_of, taus.values()), *gains]), "|")


def measure(folder: str | Path, target: Target, answers: list[Response]) -> dict:
    """Measure a drafter's accepted lengths on each set of a target's answers."""
    drafter, found = load_drafter(folder, target), {}
    for kind in dict.fromkeys(answer.set for answer in answers):
        of_set = [answer for answer in answers if answer.set == kind]
        found[kind] = heldout_acceptance(
            drafter, target, ResponseDataset(of_set, max_length=1024, num_anchors=None, seed=0)
        )
    return found


def words_of(acceptance) -> str:
    low, high = acceptance.interval()
    return f"{acceptance.tau:.2f} [{low:.2f}, {high:.2f}]"


def words_of_gain(ours: list, theirs: list) -> str:
    value, low, high = tau_gain(ours, theirs)
    return f"{value:+.1%} [{low:+.1%}, {high:+.1%}]"


if __name__ == "__main__":
    main()
