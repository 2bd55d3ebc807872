"""Write a drafter for an engine."""

from dataclasses import dataclass
from typing import Literal

from dpace.config import Format
from dpace.flags import first_as, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Write the drafter, and print how to serve it."""
    config = parse(ExportConfig, "export", first_as("drafter", args))
    import torch

    from dpace.data.chat import encode_chat
    from dpace.data.prompts import first_of_each_set, read_heldout
    from dpace.engines.export import export, push

    target = load_target(config, "auto")
    chosen = first_of_each_set(read_heldout(config.prompts), config.num_prompts)
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen]
    done = export(
        config.drafter,
        target,
        to=config.to,
        output=config.output,
        name=config.push or config.output,
        target_name=config.target,
        target_gguf=config.target_gguf,
        dtype=None if config.dtype == "keep" else getattr(torch, config.dtype),
        license=config.license,
        prompts=prompts,
        max_new_tokens=config.max_new_tokens,
    )
    print(f"{done.num_tensors} of {done.num_tensors} tensors read back bit for bit", end="")
    print(f"; rounded by at most {done.rounding:.1g} (relative)" if done.rounding else "")
    if done.acceptance:
        print(f"logits of a block differ by {done.logit_error:.1g} (relative)")
        print(f"accepted lengths equal on {len(prompts)} of {len(prompts)} prompts, tau {done.acceptance.tau:.2f}")
    print(f"written: {done.path}, {config.output}/README.md")
    if config.push:
        print("uploaded:", push(config.output, config.push))
    print(f"next: the commands in {config.output}/README.md")


@dataclass(frozen=True)
class ExportConfig:
    """Write a drafter for an engine: dpace export DRAFTER --target T --to ENGINE --output FOLDER.

    A model card is written beside it. What was written is read again: weights bit for bit, the logits of a block, and
    accepted lengths on prompts have to be the same.
    """

    drafter: str
    """The drafter's folder; given first, or with this flag."""
    target: str
    """Folder or Hub id; the model card and speculators' config call it so."""
    to: Format
    """The engine. zlab, sglang and vllm are the same files, those that `dpace train` writes; gguf is for llama.cpp."""
    output: str
    """Folder for what is written."""
    target_gguf: str | None = None
    """A GGUF file of the target, of any precision, whose tokenizer the drafter's repeats; needed with --to gguf."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Type of the weights; vectors in GGUF files are always float32."""
    license: str = "other"
    """License of the weights, for the model card, as the Hub abbreviates it."""
    prompts: str = "demo"
    """JSONL file of prompts that accepted lengths are compared on; `demo` is the held-out set that comes with dpace."""
    num_prompts: int = 2
    """Prompts of each set; 0 compares weights only."""
    max_new_tokens: int = 64
    """Longest response in tokens."""
    push: str | None = None
    """Upload the folder to this repository of the Hugging Face Hub."""
