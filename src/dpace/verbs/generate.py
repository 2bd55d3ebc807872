"""Answer one prompt, or chat."""

import sys
from dataclasses import dataclass
from typing import Literal

from dpace.config import Dtype
from dpace.flags import parse
from dpace.locate import load_target


@dataclass(frozen=True)
class GenerateConfig:
    """Answer one prompt with a drafter."""

    target: str
    """Folder or Hub id."""
    prompt: str | None = None
    """What to ask, or FILE.jsonl#ID for a prompt of a file (demo#ID: of the demo); with --stream, a chat without it."""
    drafter: str | None = None
    """The drafter's folder; plain decoding without it."""
    stream: bool = False
    """Show the text as it comes; needs a drafter."""
    max_new_tokens: int = 256
    """Longest response in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the most likely tokens up to this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the highest probability."""
    seed: int | None = None
    """Seed of the draws at temperature above 0."""
    thinking: bool = False
    """Switch thinking on, in chat templates that have the switch."""
    dtype: Dtype = "auto"
    """Type of the weights: by default bf16 on a GPU and fp32 on a CPU, where texts are then equal token for token."""
    width: Literal["auto", "full"] = "auto"
    """Verify as much as is fastest on this machine, of a draft or of copied text; or whole drafts."""
    verify_rule: Literal["equality", "speculative"] = "equality"
    """Above temperature 0: accept what equals the target's own draw, or by speculative sampling."""
    compile: bool = False
    """Compile steps of fixed shapes, as CUDA graphs on a GPU: whole drafts, rule equality, not with --stream."""


def run(args: list[str]) -> None:
    """Answer a prompt, or chat."""
    config = parse(GenerateConfig, "generate", args)
    if config.stream and config.drafter is None:
        raise ValueError("--stream shows what a drafter does; name one with --drafter")
    if config.compile and (config.stream or config.drafter is None or config.verify_rule != "equality"):
        raise ValueError("--compile needs --drafter, and goes with neither --stream nor --verify-rule speculative")
    if config.prompt is None and not config.stream:
        raise ValueError("nothing to answer; give --prompt, or --stream for a chat")
    from dpace.data.chat import encode_chat
    from dpace.data.prompts import find_prompt
    from dpace.decode.batch import generate_batch
    from dpace.decode.loop import generate, generate_plain
    from dpace.drafter import load_drafter

    target = load_target(config)
    options = {
        name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    }
    speculative = {"width": config.width, "verify_rule": config.verify_rule}
    if config.stream and config.drafter:
        messages = find_prompt(config.prompt) if config.prompt else []
        return _chat(target, load_drafter(config.drafter, target), messages, {**options, **speculative})
    token_ids = encode_chat(target, find_prompt(config.prompt or ""))
    if config.drafter is None:
        generation = generate_plain(target, token_ids, **options)
    elif config.compile:
        (generation,) = generate_batch(
            target, load_drafter(config.drafter, target), [token_ids], **options, compile=True
        )
    else:
        generation = generate(target, load_drafter(config.drafter, target), token_ids, **options, **speculative)
    print(target.tokenizer.decode(generation.token_ids, skip_special_tokens=True))
    speed = generation.num_decode_tokens / max(generation.decode_seconds, 1e-9)
    tau = f", tau {generation.acceptance.tau:.2f}" if generation.accepted_lengths else ""
    print(f"{len(generation.token_ids)} tokens, {speed:.1f} tokens/s{tau}", file=sys.stderr)
    if config.drafter is None:
        print("next: dpace demo, to train a drafter", file=sys.stderr)


def _chat(target, drafter, messages: list[dict[str, str]], options: dict) -> None:
    """Answer the messages, or the user's lines until the end of input; show speed and accepted lengths."""
    import time

    from dpace.data.chat import encode_chat
    from dpace.decode.streaming import stream

    is_one_answer = bool(messages)
    while True:
        if not messages or messages[-1]["role"] != "user":
            try:
                line = input("> ").strip()
            except EOFError:
                return
            if not line:
                continue
            messages.append({"role": "user", "content": line})
        steps, text, started = [], "", 0.0
        for piece in stream(target, drafter, encode_chat(target, messages), **options, on_step=steps.append):
            started = started or time.perf_counter()
            text += piece
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - started
        print()
        tokens = sum(len(step.token_ids) for step in steps[1:])
        lengths = " ".join(str(step.accepted) for step in steps[1:])
        print(f"{tokens / max(seconds, 1e-9):.1f} tokens/s; accepted: {lengths}", file=sys.stderr)
        if is_one_answer:
            return
        messages.append({"role": "assistant", "content": text})
