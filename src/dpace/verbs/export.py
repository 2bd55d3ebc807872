"""Write a drafter in the format of an engine."""

from pathlib import Path

from dpace.config import ExportConfig, Recipe
from dpace.recipes.flags import Arguments, Given
from dpace.verbs import load_target

ARGUMENTS = Arguments(ExportConfig, first="drafter")


def run(config: ExportConfig, given: Given) -> None:
    """Run `dpace export`."""
    if config.name and not config.target_name and Path(config.target).exists():
        raise ValueError(
            f"the target {config.target} is a place on this machine, and with --name the model card is for others; "
            "give its Hub id with --target-name"
        )
    from dpace.publish.export import check_export, export
    from dpace.target.locate import find_drafter

    folder = find_drafter(config.drafter)
    check_export(Path(folder), config)
    target = load_target(Recipe(target=config.target, device_map=config.device_map))
    path = export(folder, target, config)
    print("all tensors read back bit for bit")
    print(f"written: {path}, {config.output}/README.md")
    print(f"next: start an engine with a command of {config.output}/README.md")
