"""Answer one prompt, or chat, with or without a drafter."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpace.config import Recipe, SamplingConfig, Text, Width, options
from dpace.recipes.flags import Arguments, Given, command
from dpace.system.ledger import JsonObject
from dpace.system.progress import count, print_text
from dpace.verbs import DecoderConfig, load_decoder

if TYPE_CHECKING:
    from dpace.decode import Generation


@options
class GenerateConfig(SamplingConfig, DecoderConfig):
    """Answer one prompt, or chat, with or without a drafter."""

    prompt: Text | None = None
    """Text to answer, or FILE.jsonl#ID for the first turn of a file's prompt (demo#ID: the demo's).
    It may stand first or last without the flag, or come from standard input. --stream without it is a chat."""
    stream: bool = False
    """Show the text while it is written."""
    json: bool = False
    """Print one JSON object when the answer is whole, also with --stream.
    It has text, token_ids, tau, prefill_seconds and decode_seconds."""
    width: Width = "auto"
    """Verification length: auto finds the fastest on this machine, full verifies whole drafts, copies never drafts; or
    a number of tokens, the anchor included."""


ARGUMENTS = Arguments(GenerateConfig, first="prompt")


def run(config: GenerateConfig, given: Given) -> None:
    """Run `dpace generate`."""
    prompt = config.prompt
    is_streamed = config.stream and not config.json
    if not (prompt or is_streamed or sys.stdin is None or sys.stdin.isatty()):
        prompt = sys.stdin.read().strip()
    if not (prompt or is_streamed):
        raise ValueError("there is no prompt to answer; give one with --prompt, or chat with --stream")
    from dpace.decode import Generation, stream
    from dpace.decode.generation import Step
    from dpace.decode.pace import widest_step
    from dpace.measure.results import defined
    from dpace.prompts.prompts import find_prompt
    from dpace.target.chat import encode_chat

    messages = find_prompt(prompt) if prompt else []
    decoder = load_decoder(config, width=config.width)
    target = decoder.target

    def show_answer(messages: list[JsonObject]) -> str:
        """Print an answer, and on stderr how fast it came; return it."""
        text = ""
        steps: list[Step] = []
        drafting: Any = {"width": config.width, "paces": decoder.paces, "on_step": steps.append, **config.sampling}
        started = time.perf_counter()
        for piece in stream(target, decoder.drafter, encode_chat(target, messages), **drafting):
            text += piece
            if is_streamed:
                print_text(piece, end="")
        ends = [step.ended for step in steps]
        seconds = {"prefill_seconds": ends[0] - started, "decode_seconds": ends[-1] - ends[0]}
        generation = Generation.from_steps(steps, widest_step(decoder.drafter, config.width), **seconds)
        shown = "" if is_streamed else text
        if config.json:
            shown = json.dumps({"text": text, "tau": defined(generation.acceptance.tau), **vars(generation)})
        print_text(shown)
        _print_speed(generation)
        return text

    if messages:
        show_answer(messages)
    else:
        _chat(show_answer)
    if decoder.drafter is None:
        first_step = command("demo")  # it trains for the default target
        if config.target != Recipe().target:
            first_step = command("respond", target=config.target, **{"prompts.path": "prompts.jsonl"})
        print("next:", first_step, "(the first step to a drafter, which makes this faster)", file=sys.stderr)


def _print_speed(generation: "Generation") -> None:
    """Print on stderr, in one sentence, how long the answer was and how fast it came after its first token."""
    sentence = count(len(generation.token_ids), "token")
    num_timed = generation.num_decode_tokens
    if num_timed:  # more than the first one
        sentence += f" at {num_timed / max(generation.decode_seconds, 1e-9):.1f} tokens/s"
    if generation.accepted_lengths:
        sentence += f"; each pass of the target gave {generation.acceptance.tau:.2f} (tau)"
    print(sentence, file=sys.stderr)


def _chat(show_answer: Callable[[list[JsonObject]], str]) -> None:
    """Answer the lines that the user types, until the end of input."""
    messages: list[JsonObject] = []
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> ").strip():
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": show_answer(messages)})
