"""Read a drafter from the files of any engine: a folder or a file comes in, a drafter with its weights goes out."""

from pathlib import Path

from dpace.drafter import Drafter
from dpace.drafter.drafter import make_drafter
from dpace.engines import all_engines
from dpace.engines.engine import Engine


def read_drafter(path: str | Path, *, num_target_layers: int | None = None) -> Drafter:
    """Read a folder of any known format, or a file of an engine, with its weights.

    Raises:
        ValueError: see `Engine.read` and `make_drafter`.
    """
    path = Path(path)
    return make_drafter(*writer_of(path).read(path, num_target_layers))


def refuse_other_layout(path: Path) -> None:
    """Refuse files that are not in the published layout.

    Raises:
        ValueError: names the engine that they were written for.
    """
    writer = writer_of(path)
    if writer.layout != Engine.layout:
        raise ValueError(f"{path} is for {writer.title}, not in the published layout; convert it with `dpace import`")


def writer_of(path: Path) -> Engine:
    """Find the engine in whose layout files are; the published one's where they say nothing else."""
    for engine in all_engines():
        if engine.is_written(path):
            return engine
    return Engine()  # the published layout, which names no engine
