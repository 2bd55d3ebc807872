"""Prove that a drafter does not change the text."""

from pathlib import Path
from typing import Annotated, Literal

from dpace.config import Count, DeviceMap, OneOrMore, Recipe, Seed, Text, integer, options
from dpace.recipes.flags import Arguments, Given
from dpace.verbs import load_target


@options
class CheckConfig:
    """Prove that a drafter does not change the text; the exit code is 1 where it does.

    The baseline (decoding without a drafter) must equal `generate` of transformers. In fp32, texts must equal the
    baseline token for token: greedy, and sampled with the same seed; for several block sizes, verification lengths,
    verify rules and batches. Sampled tokens and pairs must have the target's distribution (chi-square). A block
    must not read tokens or hidden states at or after its anchor's successor: those it predicts. A block in training
    must equal the block when serving, with the same accepted lengths.

    In bf16, every difference in the text is listed with the target's margin, which tells a tie from a bug.
    """

    target: Text
    """Folder, Hub id or GGUF file of the target."""
    drafter: Text
    """Folder or Hub id of the drafter."""
    prompts: Text = "demo"
    """JSONL file of prompts; `demo` is the held-out dataset that comes with dpace."""
    num_prompts: Count = 4
    """Prompts to take from each dataset of the file."""
    max_new_tokens: Annotated[int, integer(3)] = 64
    """Longest response in tokens."""
    dtypes: OneOrMore[Literal["float32", "bfloat16", "float16", "int8"]] = ("float32",)
    """Precisions of the weights to check in."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    seed: Seed = 0
    """Seed for sampling."""


ARGUMENTS = Arguments(CheckConfig)


def run(config: CheckConfig, given: Given) -> None:
    """Run `dpace check`."""
    from dpace.drafter import load_drafter
    from dpace.measure.check import check
    from dpace.prompts.prompts import first_of_each_set, read_heldout_prompts
    from dpace.report.tables import Section, console, section_table
    from dpace.target.locate import find_drafter

    prompts = first_of_each_set(read_heldout_prompts(config.prompts), config.num_prompts)
    folder = find_drafter(config.drafter)
    failed = []
    for dtype in config.dtypes:
        target = load_target(Recipe(target=config.target, dtype=dtype, device_map=config.device_map))
        drafter = load_drafter(folder, target)
        rows = []
        for name, cases, is_passed, detail in check(
            target, drafter, prompts, max_new_tokens=config.max_new_tokens, seed=config.seed
        ):
            result = "pass" if is_passed else "FAIL"
            rows.append({"result": result, "check": name, "cases": cases, "found": detail})
            if not is_passed:
                failed.append(f"{name} ({dtype})")
        console().print(section_table(Section(f"{Path(target.name).name} in {dtype}", rows=rows, num_texts=4)))
    if failed:
        raise ValueError(
            f"failed: {'; '.join(failed)}. All checks were expected to pass: find the cause before you serve "
            f"{config.drafter} with {config.target}"
        )
    print("passed")
