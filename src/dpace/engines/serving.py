"""How each engine serves a drafter: what its option counts, its command and its part of the card."""

import json
import shlex
from collections.abc import Callable
from typing import NamedTuple

from dpace.config import Engine, Format


class Serving(NamedTuple):
    """How one engine serves a drafter."""

    num_counted: Callable[[int], int]
    """What the engine's option counts in a block of this size: its draft tokens or all its slots."""
    command: Callable[[str, str, int], str]
    """The command, or the line of Python, from drafter, target and `num_counted`."""
    card: str
    """Part of the model card, with `{target}`, `{drafter}` and `{command}` to fill in; empty where there is none."""


def _draft_tokens(block_size: int) -> int:
    """Count the draft tokens of a block."""
    return block_size - 1


def _slots(block_size: int) -> int:
    """Count the slots of a block: the anchor and the draft tokens."""
    return block_size


def _vllm(drafter: str, target: str, count: int) -> str:
    """Write vLLM's command."""
    config = json.dumps({"method": "dflash", "model": drafter, "num_speculative_tokens": count})
    return shlex.join(["vllm", "serve", target, "--speculative-config", config])


def _sglang(drafter: str, target: str, count: int) -> str:
    """Write SGLang's command."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", target, "--speculative-algorithm", "DFLASH"]
    words += ["--speculative-draft-model-path", drafter, "--speculative-dflash-block-size", str(count)]
    return shlex.join(words)


def _llamacpp(drafter: str, target: str, count: int) -> str:
    """Write llama.cpp's command; only files in its own format can be named."""
    gguf = drafter if drafter.endswith(".gguf") else "DRAFTER.gguf"
    words = ["llama-server", "-m", "TARGET.gguf", "-md", gguf, "--spec-type", "draft-dflash"]
    return shlex.join([*words, "--spec-draft-n-max", str(count)])


def _transformers(drafter: str, target: str, count: int) -> str:
    """Write the line of Python for transformers, which reads the block size from the drafter."""
    model = f"Drafter.from_pretrained({drafter!r}, dtype=model.dtype)"
    return f'model.generate(**inputs, assistant_model={model}, speculation_type="dflash", do_sample=False)'


def _zlab(drafter: str, target: str, count: int) -> str:
    """Write the line of Python for z-lab's code, which reads the block size from the drafter."""
    model = f"DFlashDraftModel.from_pretrained({drafter!r}, dtype=model.dtype)"
    return f"dflash_generate({model}, model, token_ids, max_new_tokens, stop_token_ids, 0.0)"


ENGINES: dict[Engine, Serving] = {
    "vllm": Serving(
        _draft_tokens,
        _vllm,
        """**vLLM**

```bash
{command}
```
""",
    ),
    "sglang": Serving(
        _slots,
        _sglang,
        """**SGLang** (not run by us)

```bash
{command}
```
""",
    ),
    "llamacpp": Serving(
        _draft_tokens,
        _llamacpp,
        """**llama.cpp** (without `--spec-draft-n-max` it drafts 3 tokens, which this drafter was not trained for)

```bash
{command}
```

`TARGET.gguf` in f16, bf16 or f32 keeps the target's text; quantized targets round a block and a token differently.
""",
    ),
    "transformers": Serving(
        _slots,
        _transformers,
        """**transformers** (5.15 or newer, one prompt at a time)

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto").eval()
drafter = AutoModel.from_pretrained("{drafter}", trust_remote_code=True, dtype=target.dtype).eval()
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {{"speculation_type": "dflash", "do_sample": False, "max_new_tokens": 256}}
output = target.generate(**inputs, assistant_model=drafter, **options)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
""",
    ),
    "zlab": Serving(_slots, _zlab, ""),
}
"""Source: the engines' own documentation; docs/results-engines.md says which were run."""

CARD_ENGINES: dict[Format, tuple[Engine, ...]] = {"speculators": ("vllm",), "gguf": ("llamacpp",)}
"""Engines that a model card has commands for; those of the published layout for all other formats."""
PUBLISHED_ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "transformers")
CONVERSION = (
    "For llama.cpp: `dpace export FOLDER --target {target} --to gguf --target-gguf TARGET.gguf --output FOLDER-gguf`."
)
"""What a model card of the published layout says of llama.cpp."""


def serve_command(engine: Engine, drafter: str, target: str, block_size: int) -> str:
    """Give the command, or the line of Python, with which an engine drafts whole blocks."""
    serving = ENGINES[engine]
    return serving.command(drafter, target, serving.num_counted(block_size))


def card_sections(to: Format, *, drafter: str, gguf: str, target: str, block_size: int) -> list[str]:
    """Write the parts of a model card that say how to serve the drafter.

    Args:
        to: format that was written.
        drafter: name that engines are given for it.
        gguf: name of the drafter's GGUF file, for llama.cpp.
        target: name of the target.
        block_size: slots of a block.
    """
    sections = []
    for engine in CARD_ENGINES.get(to, PUBLISHED_ENGINES):
        command = serve_command(engine, gguf if engine == "llamacpp" else drafter, target, block_size)
        sections.append(ENGINES[engine].card.format(drafter=drafter, target=target, command=command).rstrip())
    return sections if to in CARD_ENGINES else [*sections, CONVERSION.format(target=target)]
