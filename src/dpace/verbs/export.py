"""Write a drafter in the format of an engine."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dpace.config import DeviceMap, Recipe, Text, options
from dpace.engines import EngineName
from dpace.recipes.flags import first_as, parse
from dpace.verbs import load_target

HubName = Annotated[str, Field(pattern=r"^([\w-][\w.-]*/)?[\w-][\w.-]*$", description="a name on the Hub, OWNER/NAME")]


def run(args: list[str]) -> None:
    """Run `dpace export`."""
    config = parse(ExportConfig, "export", first_as("drafter", args))
    if config.push and not config.target_name and Path(config.target).exists():
        raise ValueError(
            f"the target {config.target} is a place on this machine, and what is uploaded would name it; give its Hub "
            "id with --target-name"
        )
    from dpace.engines.engine import Request
    from dpace.engines.export import check_export, export, push
    from dpace.target.locate import find_drafter

    folder = find_drafter(config.drafter)
    request = Request(
        to=config.to,
        output=config.output,
        name=config.push or config.output,
        target_name=config.target_name or config.target,
        target_gguf=config.target_gguf,
        dtype=config.dtype,
        license=config.license,
        is_plain=config.plain,
    )
    check_export(Path(folder), request)
    target = load_target(Recipe(target=config.target, device_map=config.device_map))
    done = export(folder, target, request)
    print("all tensors read back bit for bit")
    print(f"written: {done.path}, {config.output}/README.md")
    if config.push:
        print("uploaded:", push(config.output, config.push, done.files))
    print(f"next: start an engine with a command of {config.output}/README.md")


@options
class ExportConfig:
    """Write a drafter in the format of an engine, with a model card.

    Usage: dpace export DRAFTER --target TARGET --to ENGINE --output FOLDER.

    The files are read again and compared: the weights bit for bit, and the layout field by field.
    """

    drafter: Text
    """Folder or Hub id of the drafter; given first, or with this flag."""
    target: Text
    """Folder or Hub id of the target."""
    target_name: HubName | None = None
    """Hub id of the target for the model card and the config of speculators, as OWNER/NAME; --target by default.
    It keeps a folder's path out of them, and is needed to push where the target is a folder."""
    to: EngineName
    """Engine to write for; gguf is for llama.cpp. All but gguf and speculators read the layout of `dpace train`.
    A drafter that the engine would read wrongly is refused."""
    output: Text
    """Folder that the files are written to."""
    target_gguf: Text | None = None
    """GGUF file of the target, in any precision; its tokenizer is copied. Needed with --to gguf."""
    dtype: Literal["keep", "float32", "float16", "bfloat16", "q8_0", "q5_0", "q4_0"] = "keep"
    """Precision of the weights; keep leaves it as it is. Vectors in GGUF files are always float32.
    q8_0, q5_0 and q4_0 are for GGUF files: 32 numbers share a scale."""
    plain: bool = False
    """Leave out the drafter's head: DFlash's own layout, which engines without LiLiCorr read."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    license: Text = "other"
    """License of the weights for the model card, by the Hub's short name, such as apache-2.0."""
    push: Text | None = None
    """Repository on the Hugging Face Hub to upload the folder to; no upload by default."""
