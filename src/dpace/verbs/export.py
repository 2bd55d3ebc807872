"""Write a drafter in the format of an engine."""

from typing import Literal

from pydantic.dataclasses import dataclass

from dpace.config import STRICT, Count, CountOrZero, DeviceMap, Format, Text
from dpace.recipes.flags import first_as, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace export`."""
    config = parse(ExportConfig, "export", first_as("drafter", args))
    import torch

    from dpace.engines.export import export, push
    from dpace.prompts.prompts import first_of_each_set, read_heldout
    from dpace.target.chat import encode_chat
    from dpace.target.locate import find_drafter

    folder = find_drafter(config.drafter)
    target = load_target(config.target, device_map=config.device_map)
    chosen = first_of_each_set(read_heldout(config.prompts), config.num_prompts)
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen]
    done = export(
        folder,
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
    print(f"next: start an engine with a command of {config.output}/README.md")


@dataclass(frozen=True, config=STRICT)
class ExportConfig:
    """Write a drafter in the format of an engine, with a model card.

    Usage: dpace export DRAFTER --target TARGET --to ENGINE --output FOLDER.

    The files are read again and compared: the weights bit for bit, the logits of a block, and the accepted lengths on
    prompts must be the same.
    """

    drafter: Text
    """Folder or Hub id of the drafter; given first, or with this flag."""
    target: Text
    """Folder or Hub id of the target, which the model card and the config of speculators name too."""
    to: Format
    """Format to write: zlab, sglang and vllm are the files that `dpace train` writes; gguf is for llama.cpp."""
    output: Text
    """Folder that the files are written to."""
    target_gguf: Text | None = None
    """GGUF file of the target, in any precision; its tokenizer is copied. Needed with --to gguf."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Precision of the weights; keep leaves it as it is. Vectors in GGUF files are always float32."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    license: Text = "other"
    """License of the weights for the model card, by the Hub's short name, such as apache-2.0."""
    prompts: Text = "demo"
    """JSONL file of prompts to compare accepted lengths on; `demo` is the held-out dataset that comes with dpace."""
    num_prompts: CountOrZero = 2
    """Prompts to take from each dataset of the file; 0 compares only the weights."""
    max_new_tokens: Count = 64
    """Longest response in tokens."""
    push: Text | None = None
    """Repository on the Hugging Face Hub to upload the folder to; no upload by default."""
