"""Prove that a drafter does not change the text."""

from pathlib import Path

from dpace.config import CheckConfig, Recipe
from dpace.recipes.flags import parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace check`."""
    config = parse(CheckConfig, "check", args)
    from dpace.drafter import load_drafter
    from dpace.measure.check import check
    from dpace.measure.own_text import check_responses, read_greedy
    from dpace.prompts.prompts import read_heldout_prompts
    from dpace.report.tables import Section, console, section_table
    from dpace.target.locate import find_drafter

    prompts = read_heldout_prompts(config.prompts)
    folder = find_drafter(config.drafter)
    responses, meta = read_greedy(config.responses) if config.responses else ([], {})
    answered_in = meta.get("dtype", config.dtypes[0])  # servers do not tell theirs
    if responses and answered_in not in config.dtypes:
        raise ValueError(
            f"{config.responses} was written in {answered_in}, and --dtypes has {', '.join(config.dtypes)}; rounding "
            f"differs: add {answered_in} to --dtypes"
        )
    failed = []
    for dtype in config.dtypes:
        target = load_target(Recipe(target=config.target, dtype=dtype, device_map=config.device_map))
        findings = []
        if responses and dtype == answered_in:
            findings.append(check_responses(target, responses, meta))
        findings += check(target, load_drafter(folder, target), prompts, config)
        rows = [
            {"result": "pass" if is_passed else "FAIL", "check": name, "cases": cases, "found": detail}
            for name, cases, is_passed, detail in findings
        ]
        console().print(section_table(Section(f"{Path(target.name).name} in {dtype}", rows=rows, num_texts=4)))
        failed += [f"{finding.name} ({dtype})" for finding in findings if not finding.is_passed]
    if failed:
        of_answers = "; write responses again that are not the target's own" if responses else ""
        raise ValueError(
            f"failed: {'; '.join(failed)}. All checks were expected to pass: find the cause before you serve "
            f"{config.drafter} with {config.target}{of_answers}"
        )
    print("passed")
