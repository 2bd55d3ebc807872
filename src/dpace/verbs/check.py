"""Prove that a drafter does not change the text."""

from pathlib import Path

from dpace.config import CheckConfig
from dpace.flags import parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace check`."""
    config = parse(CheckConfig, "check", args)
    from dpace.data.prompts import read_heldout
    from dpace.drafter import load_drafter
    from dpace.measure.check import check
    from dpace.report.tables import check_table, console

    prompts = read_heldout(config.prompts)
    failed = []
    for dtype in config.dtypes:
        target = load_target(config, dtype)
        findings = check(target, load_drafter(config.drafter, target), prompts, config)
        console().print(check_table(findings, f"{Path(target.name).name} in {dtype}"))
        failed += [f"{finding.name} ({dtype})" for finding in findings if not finding.is_passed]
    if failed:
        raise ValueError(
            f"failed: {', '.join(failed)}; all checks were expected to pass: do not serve {config.drafter} with "
            f"{config.target} before the cause is found"
        )
    print("passed")
