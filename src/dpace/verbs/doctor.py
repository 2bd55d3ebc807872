"""Say what would go wrong when a drafter is served."""

from dataclasses import dataclass

from dpace.config import Engine
from dpace.flags import command, first_as, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Look at a drafter, and print what would go wrong."""
    config = parse(DoctorConfig, "doctor", first_as("drafter", args))
    from dpace.engines.doctor import diagnose
    from dpace.engines.run_checks import RUN_CHECKS
    from dpace.engines.serving import serve_command
    from dpace.report.tables import console, doctor_table

    target = load_target(config)
    diagnoses = diagnose(config.drafter, target, engine=config.engine, responses=config.responses)
    measured = {check.name for check in RUN_CHECKS}
    shown = [d for d in diagnoses if d.result != "passes" or d.check in measured]
    console().print(doctor_table(shown, f"{config.drafter} for {target.short_name}"))
    silent = [d.check for d in diagnoses if d not in shown]
    console().print(f"{len(silent)} other checks pass:", ", ".join(silent), "\n", highlight=False)
    failed = [d.check for d in diagnoses if d.result == "fails"]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the table says what to do")
    print("passed")
    if config.engine:
        size = next(int(d.found) for d in diagnoses if d.check == "block_size")
        print("serve with:", serve_command(config.engine, config.drafter, config.target, size), sep="\n")
    print("next:", command("check", target=config.target, drafter=config.drafter))


@dataclass(frozen=True)
class DoctorConfig:
    """Say what would go wrong when a drafter is served: dpace doctor DRAFTER --target TARGET.

    Reads config and weights as they are on disk, so that a broken folder is examined too, and runs the drafter where it
    loads. The exit code is 1 if a check fails. docs/doctor.md has the checks and what breaks where one fails.
    """

    drafter: str
    """The drafter's folder; given first, or with this flag."""
    target: str
    """Folder or Hub id."""
    engine: Engine | None = None
    """What will serve it: prints how to start it, with as many drafts as the drafter has."""
    responses: str | None = None
    """The responses.jsonl of the training, to measure tau on; by default one in the drafter's folder or above."""
    thinking: bool = False
    """Switch thinking on, in chat templates that have the switch, as it will be when serving."""
