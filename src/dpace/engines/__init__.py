"""Engines, a file each: what it can hold, how its files are written and read, its command and its part of the card."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field

from dpace.config import DeviceMap, Text, options

if TYPE_CHECKING:
    from dpace.engines.engine import Engine

EngineName = Literal["vllm", "zlab", "transformers", "tensorrt", "speculators", "sglang", "gguf"]
"""Engines, each a file of this package, in the order of the model card; gguf is llama.cpp's."""
HubName = Annotated[str, Field(pattern=r"^([\w-][\w.-]*/)?[\w-][\w.-]*$", description="a name on the Hub, OWNER/NAME")]


def engine_of(name: EngineName) -> "Engine":
    """Import an engine, and with it what reads and writes its files."""
    return import_module(f"dpace.engines.{name}").ENGINE


def all_engines() -> list["Engine"]:
    """Import all engines."""
    return [engine_of(name) for name in get_args(EngineName)]


@options
class ExportConfig:
    """Write a drafter in the format of an engine, with a model card.

    The drafter may stand first: dpace export DRAFTER --target TARGET --to ENGINE --output FOLDER.

    The files are read again and compared: the weights bit for bit, and the layout field by field.
    """

    drafter: Text
    """Folder or Hub id of the drafter; given first, or with this flag."""
    target: Text
    """Folder or Hub id of the target."""
    target_name: HubName | None = None
    """Hub id of the target for what is written, such as the model card, as OWNER/NAME; --target by default.
    It keeps a folder's path out of that, and is needed with --name where the target is a folder."""
    to: EngineName
    """Engine to write for; gguf is for llama.cpp. Most engines read the layout of `dpace train`.
    A drafter that the engine would read wrongly is refused."""
    output: Text
    """Folder that the files are written to."""
    name: HubName | None = None
    """Hub id of the drafter for the commands of the model card, as OWNER/NAME; --output by default."""
    target_gguf: Text | None = None
    """GGUF file of the target, in any precision; its tokenizer is copied. Needed with --to gguf."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Precision of the weights; keep leaves it as it is. Vectors in GGUF files are always float32."""
    plain: bool = False
    """Leave out the drafter's selector: DFlash's own layout, which engines without selectors read."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    license: Text = "other"
    """License of the weights for the model card, by the Hub's short name, such as apache-2.0."""

    @property
    def served_name(self) -> str:
        """What engines are to call the drafter."""
        return self.name or self.output

    @property
    def served_target(self) -> str:
        """What engines are to call the target."""
        return self.target_name or self.target
