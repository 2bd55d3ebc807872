"""Answer one prompt, or chat, with or without a drafter."""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from dpace.config import DeviceMap, Dtype, Recipe, SamplingConfig, Text, Width, options
from dpace.recipes.flags import Arguments, Given, command
from dpace.system.ledger import JsonObject
from dpace.system.progress import count, print_text
from dpace.verbs import load_target

if TYPE_CHECKING:
    from dpace.decode import Generation


@options
class GenerateConfig(SamplingConfig):
    """Answer one prompt, or chat, with or without a drafter."""

    target: Text
    """Folder, Hub id or GGUF file of the target."""
    prompt: Text | None = None
    """Text to answer, or FILE.jsonl#ID for the first turn of a file's prompt (demo#ID: the demo's).
    It may stand first or last without the flag, or come from standard input. --stream without it is a chat."""
    drafter: Text | None = None
    """Folder or Hub id of the drafter, or smollm2-135m, which comes with dpace. Without it earlier text is copied."""
    stream: bool = False
    """Show the text while it is written."""
    json: bool = False
    """Print one JSON object when the answer is whole, also with --stream.
    It has text, token_ids, tau, prefill_seconds and decode_seconds."""
    thinking: bool = False
    """Turn thinking on, for chat templates that offer it."""
    dtype: Dtype = "auto"
    """Precision of the weights; auto is bf16 on a GPU and fp32 on a CPU, where texts are equal token for token."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
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
    from dpace.decode import Decoder
    from dpace.decode.generation import SamplingOptions
    from dpace.drafter import load_drafter
    from dpace.measure.results import defined
    from dpace.prompts.prompts import find_prompt
    from dpace.target.chat import encode_chat
    from dpace.target.locate import find_drafter

    messages = find_prompt(prompt) if prompt else []
    folder = find_drafter(config.drafter) if config.drafter else None
    target = load_target(config)
    sampling = SamplingOptions(**{field.name: getattr(config, field.name) for field in fields(SamplingConfig)})
    drafter = load_drafter(folder, target) if folder else None
    decoder = Decoder(target, drafter, width=config.width)

    def show_answer(messages: list[JsonObject]) -> str:
        """Print an answer while it is written, and on stderr how fast it came; return it."""
        text = ""
        generations: list[Generation] = []
        for piece in decoder.stream(encode_chat(target, messages), on_end=generations.append, **sampling):
            text += piece
            print_text(piece, end="")
        print()
        _print_speed(*generations)
        return text

    if is_streamed and messages:
        show_answer(messages)
    elif is_streamed:
        _chat(show_answer)
    else:
        generation = decoder.generate(encode_chat(target, messages), **sampling)
        text = target.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        if config.json:
            text = json.dumps({"text": text, "tau": defined(generation.acceptance.tau), **vars(generation)})
        print_text(text)
        _print_speed(generation)
    if folder is None:
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
