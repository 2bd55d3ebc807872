"""Say what would go wrong when an engine serves a drafter."""

from pathlib import Path

from dpace.config import DeviceMap, EngineName, Text, options
from dpace.engines import engine_of
from dpace.recipes.flags import Arguments, Given, command
from dpace.system.progress import note
from dpace.verbs import load_target


@options
class DoctorConfig:
    """Say what would go wrong when an engine serves a drafter.

    The drafter may stand first: dpace doctor DRAFTER --target TARGET. The exit code is 1 where a check fails.

    It reads the files strictly, compares the config with the published layout, loads the drafter, and measures tau as
    the config says and as other values would have it. docs/serve.md explains some of the checks.
    """

    drafter: Text
    """Folder or Hub id of the drafter; given first, or with this flag."""
    target: Text
    """Folder, Hub id or GGUF file of the target."""
    engine: EngineName | None = None
    """Engine that will serve the drafter, gguf for llama.cpp.
    What it does not read fails; its start command is printed, set to draft whole blocks."""
    responses: Text | None = None
    """responses.jsonl to measure tau on; by default, the one in the drafter's folder or in the two above it."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    thinking: bool = False
    """Turn thinking on, for chat templates that offer it; set it as it will be when serving."""


ARGUMENTS = Arguments(DoctorConfig, first="drafter")


def run(config: DoctorConfig, given: Given) -> None:
    """Run `dpace doctor`."""
    from dpace.doctor import CONFIG, RUN, attempt, diagnose
    from dpace.drafter.spec import read_folder
    from dpace.engines.read import refuse_other_layout
    from dpace.report.tables import Section, console, section_table
    from dpace.system.loading import read_config
    from dpace.target.locate import find_drafter

    folder = find_drafter(config.drafter)
    about, _ = attempt(CONFIG, read_config, folder)
    if about:  # what cannot be read is told below
        refuse_other_layout(Path(folder))
    target = load_target(config)
    rows = []
    failed = []
    for check, result, found, expected, fix in diagnose(
        folder, target, engine=config.engine, responses=config.responses
    ):
        if result == "passes" and check not in RUN:
            continue  # such checks are many
        if result == "fails":
            failed.append(check)
        note(f"{result}, {check}: {found}")  # now, since later ones take minutes
        rows.append(
            {
                "result": "FAILS" if result == "fails" else result,
                "check": check,
                "found": found,
                "expected": expected,
                "to do": fix,
            }
        )
    console().print(section_table(Section(f"{config.drafter} for {target.short_name}", "", rows, num_texts=5)))
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the table above says what to do about each")
    print("passed")
    if config.engine:
        spec, _ = read_folder(folder)
        print("serve with:", engine_of(config.engine).command(spec, config.drafter, config.target), sep="\n")
    print("next:", command("check", target=config.target, drafter=config.drafter))
