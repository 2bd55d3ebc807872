"""Take over a drafter that another project trained."""

from dataclasses import dataclass

from dpace.flags import command, first_as, parse


def run(args: list[str]) -> None:
    """Read another project's drafter, and write it as one of this project."""
    config = parse(ImportConfig, "import", first_as("source", args))
    from dpace.engines.export import import_drafter
    from dpace.engines.speculators import verifier_name
    from dpace.locate import find_target

    target = config.target or verifier_name(config.source)
    target = find_target(target) if target else None
    drafter = import_drafter(config.source, config.output, target=target)
    layers, mask = drafter.target_layer_ids, drafter.mask_token_id
    print(f"blocks of {drafter.block_size}, features of layers {layers}, mask token {mask}")
    print(f"written: {config.output}")
    print("next:", command("check", target=config.target or "TARGET", drafter=config.output))


@dataclass(frozen=True)
class ImportConfig:
    """Take over another project's drafter, weights bit for bit: dpace import SOURCE --output FOLDER."""

    source: str
    """A z-lab, SpecForge or speculators folder, or a GGUF file in f32, f16 or bf16; given first, or with this flag."""
    output: str
    """Folder for the drafter."""
    target: str | None = None
    """Folder or Hub id of its target; needed for GGUF files, and for speculators folders whose target has moved."""
