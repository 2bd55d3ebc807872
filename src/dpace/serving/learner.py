"""Learn from answers that are given: keep them, train a drafter on them, take it where it is better.

`Learner` stands beside the service. A round is another process (`python -m dpace.serving.learner`): it is stopped while
a request is open, so that it takes no time from an answer, and what happens to it does not reach the service.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dpace.config import Recipe
from dpace.drafter import load_drafter
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import LEAST_TAU, tau_estimate, tau_gain
from dpace.prompts.formats import Prompt
from dpace.prompts.prompts import hash_text, split_prompts
from dpace.recipes.recipe_file import read_recipe, write_recipe
from dpace.respond.responses import (
    Response,
    check_meta,
    find_meta,
    iterate_responses,
    meta_path,
    read_examples,
    read_meta,
    write_meta,
)
from dpace.system.ledger import (
    JsonObject,
    append_lines,
    cut_unfinished_line,
    lock_folder,
    read_jsonl,
    refuse_foreign_files,
    register_files,
    write_text,
)
from dpace.system.progress import count, describe_error, note
from dpace.target import Target
from dpace.training.initial import start_from
from dpace.training.run import choose_conversations, train

LEAST_NEW = 32
"""Answers that a round needs that the round before it did not have; and `LEAST_SHARE` of all."""
LEAST_SHARE = 0.2
LEAST_HELDOUT = 8
"""Held-out answers that a round needs: with fewer, an interval of tau says nothing."""
HELD_OUT = 5
"""One prompt of so many is held out."""
NUM_TRAINED = 256
"""Newest answers that a round trains on."""
NUM_MEASURED = 64
"""Newest held-out answers that both drafters are measured on."""
RECIPE, ROUNDS, LOG = "recipe.yaml", "rounds.jsonl", "round.log"
PROMPTS = ("prompts.jsonl", "heldout.jsonl")


def read_rounds(folder: Path) -> list[JsonObject]:
    """Read what the finished rounds of a folder were; the last line may be unfinished."""
    path = folder / ROUNDS
    return [row for _, row in read_jsonl(path, is_growing=True)] if path.exists() else []


def find_taken(folder: str | Path) -> str | None:
    """Find the drafter of a folder that the last round with a better one left; None where there is none."""
    taken = [row["folder"] for row in read_rounds(Path(folder)) if row["is_taken"]]
    return str(Path(folder) / taken[-1]) if taken else None


class Learner:
    """Keeps answers in a folder, and has drafters trained on them.

    Files: `responses.jsonl` as `dpace respond` writes it, at most `mib` MiB; prompts, recipe and a line for each round;
    and a folder for each drafter that was taken. Memory: an id for each answer; while a round runs, its process has a
    target of its own and the features of `NUM_TRAINED` answers.

    Args:
        recipe: target, drafter to start from, and how drafters are trained; its output is the folder.
        mib: limit of `responses.jsonl`; the oldest lines go first.
        target: what answers.

    Raises:
        ValueError: the folder has answers of another target, files that dpace did not write, or another process's lock.
    """

    def __init__(self, recipe: Recipe, mib: float, target: Target):
        self.recipe = recipe
        self.max_bytes = mib * 2**20
        self.folder = Path(recipe.output)
        self.path = recipe.responses_path
        self.target = target
        self.process: subprocess.Popen | None = None
        self.lock = ExitStack()
        self.lock.enter_context(lock_folder(self.folder))
        names = (self.path.name, meta_path(self.path).name, RECIPE, ROUNDS, LOG, *PROMPTS)
        register_files(self.folder, *names)
        meta = find_meta(target, recipe.respond)
        check_meta(self.path, meta)
        for path in (self.path, self.folder / ROUNDS):
            cut_unfinished_line(path)
        self.path.touch()
        write_meta(self.path, meta, is_complete=False)
        self.heldout = {response.id: is_held_out(response.id) for response in iterate_responses(self.path)}
        """For each answer that was kept, whether it is held out."""
        self.num_before = 0
        """How many of them the last round had."""
        rounds = read_rounds(self.folder)
        if rounds and (newest := rounds[-1]["newest"]) in self.heldout:
            self.num_before = [*self.heldout].index(newest) + 1

    def keep(self, prompt: Prompt, token_ids: list[int], new: list[int], **notes: object) -> None:
        """Keep an answer, unless there is one to the same prompt; where the disk has no room, say that it is lost.

        Args:
            prompt: what was asked.
            token_ids: of it, through the template.
            new: of the answer, stop token included.
            notes: other keys of the line.
        """
        prompt_id = hash_text(prompt).hex()
        if prompt_id in self.heldout:
            return
        text = self.target.tokenizer.decode(new, skip_special_tokens=True)
        messages = [*prompt.turns[0], {"role": "assistant", "content": text}]
        span = [len(token_ids), len(token_ids) + len(new)]
        response = Response(prompt_id, "served", messages, [*token_ids, *new], [span])
        try:
            append_lines(self.path, [asdict(response) | notes])
            self.heldout[prompt_id] = is_held_out(prompt_id)
            if self.path.stat().st_size > self.max_bytes:
                self._drop_oldest()
        except OSError as error:
            note(f"an answer is not kept: {describe_error(error)}")
            cut_unfinished_line(self.path)

    def _drop_oldest(self) -> None:
        """Drop the oldest lines, and a tenth more than needed, so that this is rarely done."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        num_bytes = sum(map(len, lines))
        num_dropped = 0
        while num_bytes > 0.9 * self.max_bytes:
            num_bytes -= len(lines[num_dropped])
            num_dropped += 1
        write_text(self.path, b"".join(lines[num_dropped:]).decode())
        self.heldout = dict([*self.heldout.items()][num_dropped:])
        self.num_before = max(0, self.num_before - num_dropped)

    @property
    def is_due(self) -> bool:
        """Whether a round has enough to learn from that is new, and none is under way."""
        num_kept = len(self.heldout)
        has_new = num_kept - self.num_before >= max(LEAST_NEW, LEAST_SHARE * num_kept)
        return self.process is None and has_new and sum(self.heldout.values()) >= LEAST_HELDOUT

    def begin(self) -> subprocess.Popen:
        """Start a round, a process that writes a line of `rounds.jsonl` at its end.

        Raises:
            ValueError: the folder that its drafter gets is there, and is not dpace's.
            OSError: the disk has no room.
        """
        self.num_before = len(self.heldout)  # first, so that a failure is not tried again at once
        name = f"round-{len(read_rounds(self.folder)) + 1}"
        # A killed round may have left it; another's folder of this name is refused.
        if name in refuse_foreign_files(self.folder, name):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        register_files(self.folder, name)
        write_recipe(self.recipe, self.folder / RECIPE)
        words = [sys.executable, "-m", "dpace.serving.learner", str(self.folder), name]
        with (self.folder / LOG).open("wb") as log:
            # A group of its own: Ctrl-C does not reach it, and where the service is killed, the system ends it.
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
        return self.process

    def pause(self, is_paused: bool) -> None:
        """Stop the round that is under way, or let it go on."""
        if self.process:
            self.process.send_signal(signal.SIGSTOP if is_paused else signal.SIGCONT)

    def end(self) -> str | None:
        """Note how the round ended, and return the folder of its drafter where that is better."""
        if self.process is None:  # closed meanwhile
            return None
        code = self._wait()
        if code:
            note(f"a round of learning failed; {self.folder / LOG} says why, and the next one comes with new answers")
            return None
        row = read_rounds(self.folder)[-1]
        note(describe_round(row))
        if not row["is_taken"]:
            shutil.rmtree(self.folder / row["folder"])
            return None
        folder = str(self.folder / row["folder"])
        self.recipe = with_drafter(self.recipe, folder)
        return folder

    def _wait(self) -> int:
        """Wait for the process of the round, and return its exit code."""
        assert self.process is not None
        with self.process as process:
            self.process = None
        return process.returncode

    def close(self) -> None:
        """End the round that is under way, which is lost, and leave a folder that other verbs take."""
        if self.process:
            self.process.kill()
            self._wait()
        write_recipe(self.recipe, self.folder / RECIPE)
        write_prompts(self.folder, self.path)
        write_meta(self.path, read_meta(self.path), is_complete=True)
        self.lock.close()

    @property
    def numbers(self) -> dict[str, float]:
        """For `/metrics`: answers that are kept, rounds, rounds with a better drafter, and tau of what serves."""
        rounds = read_rounds(self.folder)
        taus = [row["tau" if row["is_taken"] else "tau_before"][0] for row in rounds[-1:]]
        return {
            "dpace:answers_kept": len(self.heldout),
            "dpace:rounds": len(rounds),
            "dpace:rounds_taken": sum(row["is_taken"] for row in rounds),
            "dpace:heldout_tau": taus[0] if taus else 1.0,
        }


def is_held_out(prompt_id: str) -> bool:
    """Return whether the answer to a prompt is held out; the id is the prompt's hash."""
    return int(prompt_id, 16) % HELD_OUT == 0


def with_drafter(recipe: Recipe, folder: str | None) -> Recipe:
    """Let a recipe train from a drafter and measure it."""
    bench = replace(recipe.bench, drafters=(folder,) if folder else ())
    return replace(recipe, drafter=replace(recipe.drafter, init=folder), bench=bench)


def write_prompts(folder: Path, path: Path) -> str | None:
    """Write the prompts of the answers, with these as their replies, into two files: to train on, and held out.

    Returns:
        The id of the newest answer; None where there is none.
    """
    newest = None
    lines: dict[bool, list[str]] = {False: [], True: []}
    for response in iterate_responses(path):
        row = {"id": response.id, "set": response.set, "messages": response.messages}
        lines[is_held_out(response.id)].append(json.dumps(row, ensure_ascii=False) + "\n")
        newest = response.id
    for name, rows in zip(PROMPTS, lines.values(), strict=True):
        write_text(folder / name, "".join(rows))
    return newest


def describe_round(row: JsonObject) -> str:
    """Write what a round gave in a line."""
    before, after = (f"{tau:.2f} [{low:.2f}, {high:.2f}]" for tau, low, high in (row["tau_before"], row["tau"]))
    verdict = "taken" if row["is_taken"] else "not better, so not taken"
    return (
        f"{row['folder']}: {count(row['trained'], 'answer')}, {row['steps']} steps, {row['seconds']:.0f} s, tau of "
        f"{row['measured']} held-out answers {before} -> {after}: {verdict}"
    )


def learn(recipe: Recipe, name: str) -> None:
    """Train a drafter on the answers of a folder, and measure it beside the one that it starts from.

    The line of `rounds.jsonl`, written last, says how that ended.

    Args:
        recipe: as the `Learner` wrote it.
        name: of the drafter's folder in the recipe's.
    """
    started = time.monotonic()
    folder = Path(recipe.output)
    path = recipe.responses_path
    newest = write_prompts(folder, path)
    init_folder = recipe.drafter.init
    recipe, init = start_from(recipe, ())
    dtype = getattr(torch, recipe.dtype, None)  # None for auto
    target = Target.load(recipe.target, dtype=dtype, device_map=recipe.device_map, thinking=recipe.thinking)
    parts = split_prompts(recipe.prompts)
    trained, measured = read_examples(path, [parts.train[-NUM_TRAINED:], parts.heldout[-NUM_MEASURED:]])
    dataset, heldout = choose_conversations(trained, measured, recipe)
    drafter = train(target, dataset, heldout, recipe, folder / name, init=init)
    after = [heldout_acceptance(drafter, target, heldout)]
    tau = tau_estimate([after])
    tau_before = (1.0, 1.0, 1.0)
    is_taken = tau[1] > LEAST_TAU
    if init_folder:
        before = [heldout_acceptance(load_drafter(init_folder, target), target, heldout)]
        tau_before = tau_estimate([before])
        is_taken = tau_gain(after, before)[1] > 0
    shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
    row = {
        "folder": name,
        "newest": newest,
        "trained": len(dataset),
        "measured": len(heldout),
        "steps": recipe.train.max_steps,
        "seconds": time.monotonic() - started,
        "tau_before": tau_before,
        "tau": tau,
        "is_taken": bool(is_taken),
    }
    append_lines(folder / ROUNDS, [row])


def main(folder: str, name: str) -> None:
    """Run a round, and end where the service ends."""
    # Nothing is ever written there, so that reading ends where the service does.
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
    os.nice(19)
    learn(read_recipe(Path(folder) / RECIPE), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
