"""Read a drafter that another project trained, and write it for dpace."""

from dpace.config import Text, options
from dpace.recipes.flags import command, first_as, parse


def run(args: list[str]) -> None:
    """Run `dpace import`."""
    config = parse(ImportConfig, "import", first_as("source", args))
    from pathlib import Path

    from dpace.engines.export import import_drafter, writer_of
    from dpace.target.locate import find_drafter, find_target

    source = find_drafter(config.source, "--source")
    name = config.target or writer_of(Path(source)).target_of(Path(source))
    drafter = import_drafter(source, config.output, target=find_target(name) if name else None)
    layers = ", ".join(map(str, drafter.target_layer_ids))
    print(f"blocks of {drafter.num_slots}, hidden states of layers {layers}, mask token {drafter.mask_token_id}")
    print(f"written: {config.output}")
    print("next:", command("check", target=name or "TARGET", drafter=config.output))


@options
class ImportConfig:
    """Read a drafter that another project trained, and write it for dpace, weights bit for bit.

    Usage: dpace import SOURCE --output FOLDER.
    """

    source: Text
    """Folder or Hub id of z-lab, SpecForge or speculators, or GGUF file or its folder; given first."""
    output: Text
    """Folder that the drafter is written to."""
    target: Text | None = None
    """Folder or Hub id of the target; needed for GGUF files, and for speculators folders whose target has moved."""
