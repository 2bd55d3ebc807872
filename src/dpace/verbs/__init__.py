"""The verbs of the command line, one file each, and what several of them do.

Such a file has `ARGUMENTS`, which `dpace.cli` parses, and `run(options, given)`. This checks what needs no model, loads
the models, runs, and prints the command that comes next. Heavy imports stand inside of it, so that `--help` and
refusals come at once. The class of the options stands in this file, or in `dpace.config` where rooms below read it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dpace.config import BenchConfig, DeviceMap, Dtype, Recipe, TargetShard, Text, Width, options
from dpace.recipes.flags import command
from dpace.system.progress import note

if TYPE_CHECKING:
    from dpace.decode import Decoder
    from dpace.measure.results import Results
    from dpace.target import Target
    from dpace.target.chat import ChatTokenizer

TARGET_OPTIONS = ("target", "dtype", "device", "device_map", "thinking")
"""Options that say which target is loaded, and how."""
PROMPT = "Write a Python function to check whether a number is even."
"""The prompt of commands that are shown to be copied, where no held-out one has a name."""


@options
class DecoderConfig:
    """What decodes."""

    target: Text
    """Folder, Hub id or GGUF file of the target."""
    drafter: Text | None = None
    """Folder or Hub id of the drafter, or smollm2-135m, which comes with dpace. Without it earlier text is copied."""
    thinking: bool = False
    """Turn thinking on, for chat templates that offer it."""
    dtype: Dtype = "auto"
    """Precision of the weights; auto is bf16 on a GPU and fp32 on a CPU, where texts are equal token for token.
    int8, on a CPU with VNNI: a rounded target; a drafter keeps its text, not that of fp32."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""


def load_decoder(config: DecoderConfig, width: Width = "auto") -> "Decoder":
    """Find and load the target and the drafter that the options of a verb name.

    Raises:
        ValueError: see `load_target` and `load_drafter`.
    """
    from dpace.decode import Decoder
    from dpace.drafter import load_drafter
    from dpace.target.locate import find_drafter

    folder = config.drafter and find_drafter(config.drafter)  # before the target, which takes longer
    target = load_target(config)
    return Decoder(target, load_drafter(folder, target) if folder else None, width=width)


def load_target(config: Any, *, shard: TargetShard = "none") -> "Target":
    """Find and load the target that the options of a verb name.

    Where a verb lacks an option of `TARGET_OPTIONS`, the default of a recipe counts.

    Args:
        config: options of a verb.
        shard: how it is spread over several ranks.

    Raises:
        ValueError: see `Target.load`.
    """
    import torch

    from dpace.target import Target

    # A recipe with the verb's values has the default of each option that the verb lacks.
    recipe = Recipe(**{name: value for name, value in vars(config).items() if name in TARGET_OPTIONS})
    return Target.load(
        recipe.target,
        dtype=getattr(torch, recipe.dtype, None),  # None for auto
        device=recipe.device,
        device_map=recipe.device_map,
        thinking=recipe.thinking,
        shard=shard,
    )


def load_chat(config: Any) -> "ChatTokenizer":
    """Find and load the tokenizer of the target that the options of a verb name, without its weights."""
    from dpace.target.chat import ChatTokenizer

    return ChatTokenizer.load(config.target, config.thinking)


def note_untrained(tau: float | None) -> None:
    """Say that a drafter is not trained yet where nothing of it is accepted."""
    from dpace.metrics import LEAST_TAU

    if tau and tau < LEAST_TAU:
        note(f"no drafter accepts anything yet (tau {tau:.2f}): train for more steps, see docs/laptop.md")


def note_unread(config: BenchConfig, names: Iterable[str], reason: str) -> None:
    """Say which of these options of measuring, which a verb does not read, differ from their defaults."""
    defaults = BenchConfig()
    for name in names:
        if getattr(config, name) != getattr(defaults, name):
            note(f"--bench.{name.replace('_', '-')} is not read: {reason}")


def show_results(results: "Results", path: str) -> None:
    """Print the tables of results, and where they are written."""
    from dpace.report.sections import tables_of
    from dpace.report.tables import console, section_table
    from dpace.system.progress import print_text

    console().print(*map(section_table, tables_of(results)))
    print_text(f"written: {path}")


def generate_command(recipe: Recipe, drafter: object, prompt_id: str | None) -> str:
    """Return the command that answers a prompt, by its id a held-out one, with a drafter of a recipe's target."""
    prompt = PROMPT
    path = recipe.prompts.heldout_path or recipe.prompts.path
    if prompt_id and (path == "demo" or path.endswith(".jsonl")):  # as `find_prompt` reads it
        prompt = f"{path}#{prompt_id}"
    return command("generate", target=recipe.target, drafter=drafter, thinking=recipe.thinking, prompt=prompt)
