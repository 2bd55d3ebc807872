"""Read a drafter that another project trained, and write it for dpace."""

from dpace.config import Text, options
from dpace.recipes.flags import Arguments, Given, command


@options
class ImportConfig:
    """Read a drafter that another project trained, and write it for dpace, weights bit for bit.

    The source may stand first: dpace import SOURCE --output FOLDER.
    """

    source: Text
    """Folder or Hub id of z-lab, SpecForge or speculators, or GGUF file; given first, or with this flag."""
    output: Text
    """Folder that the drafter is written to."""
    target: Text | None = None
    """Folder or Hub id of the target; needed for GGUF files and folders of speculators."""


ARGUMENTS = Arguments(ImportConfig, first="source")


def run(config: ImportConfig, given: Given) -> None:
    """Run `dpace import`."""
    from dpace.publish.export import import_drafter
    from dpace.target.locate import find_drafter

    source = find_drafter(config.source, "--source")
    import_drafter(source, config.output, target=config.target)
    print(f"written: {config.output}")
    print("next:", command("check", target=config.target or "TARGET", drafter=config.output))
