"""Write a drafter in the format of an engine."""

from pathlib import Path

from dpace.config import Recipe
from dpace.engines import ExportConfig
from dpace.recipes.flags import first_as, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace export`."""
    config = parse(ExportConfig, "export", first_as("drafter", args))
    if config.push and not config.target_name and Path(config.target).exists():
        raise ValueError(
            f"the target {config.target} is a place on this machine, and what is uploaded would name it; give its Hub "
            "id with --target-name"
        )
    from dpace.engines.export import check_export, export, push
    from dpace.target.locate import find_drafter

    folder = find_drafter(config.drafter)
    check_export(Path(folder), config)
    target = load_target(Recipe(target=config.target, device_map=config.device_map))
    done = export(folder, target, config)
    print("all tensors read back bit for bit")
    print(f"written: {done.path}, {config.output}/README.md")
    if config.push:
        print("uploaded:", push(config.output, config.push, done.files))
    print(f"next: start an engine with a command of {config.output}/README.md")
