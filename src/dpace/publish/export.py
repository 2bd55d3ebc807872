"""Write a drafter in the format of an engine, and read it back.

All that is written is read again and compared with what was to be written, before it takes its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dpace.config import ExportConfig
from dpace.drafter import Drafter
from dpace.drafter.drafter import make_drafter, scales_of
from dpace.drafter.spec import DrafterSpec
from dpace.engines import engine_of
from dpace.engines.engine import Engine
from dpace.engines.read import read_drafter, writer_of
from dpace.publish.card import write_card
from dpace.system.device import dtype_name
from dpace.system.ledger import filling, lock_folder, refuse_foreign_files, register_files, remove_files
from dpace.system.progress import note
from dpace.system.provenance import fingerprint
from dpace.target import Target
from dpace.target.files import count_layers
from dpace.training.run import RUN_FILE

PATTERNS = ("config.json", "README.md", "model*.safetensors*", "modeling_*.py", "*.gguf")
"""Files of a drafter that an export or an import may write."""
IDENTIFYING = ("config.json", "README.md", "model.safetensors")
"""Files that say whose a folder is: where another program wrote them, dpace writes nothing beside them."""
OF_HEAD = ("confidence_temperature", "tau", "tau_interval", "tau_responses")
"""Entries of the record that were measured with the head."""


def refuse_output(output: Path, drafter: Path) -> None:
    """Refuse a folder that is not dpace's to write to.

    Raises:
        ValueError: the output is a file, is the drafter's folder, or holds another program's files or a trained
            drafter.
    """
    folder = drafter.parent if drafter.is_file() else drafter
    faults = {
        "is the drafter's own folder": output.resolve() == folder.resolve(),
        "is a file": output.is_file(),
        "holds a drafter that dpace trained": (output / RUN_FILE).exists(),
    }
    for fault, is_found in faults.items():
        if is_found:
            raise ValueError(f"the output {output} {fault}; name another folder with --output")
    refuse_foreign_files(output, *IDENTIFYING)


def without_selector(spec: DrafterSpec) -> DrafterSpec:
    """Return what a drafter is without its head: DFlash's, or DFlash2's where it has convolutions.

    Raises:
        ValueError: it has no head.
    """
    if spec.selector is None:
        raise ValueError("the drafter has no head that could be left out; export it without --plain")
    record = {name: value for name, value in spec.record.items() if name not in OF_HEAD}
    return replace(spec, selector=None, record=record)


def check_export(folder: Path, config: ExportConfig) -> Drafter:
    """Refuse an export that cannot be made, before the target is loaded; return the drafter.

    Whether tables of the drafter's own are the target's is not known yet; here they count as such.

    Raises:
        ValueError: a folder that is not to be written to; a drafter in another layout than the published one, or that
            cannot be served; or see `Engine.check`.
    """
    refuse_output(Path(config.output), folder)
    writer = writer_of(folder)
    if writer.layout != Engine.layout:
        raise ValueError(f"{folder} is for {writer.title}, not in the published layout; convert it with `dpace import`")
    source = read_drafter(folder)
    spec = source.spec
    spec.check()
    spec = without_selector(spec) if config.plain else spec
    engine_of(config.to).check(config, replace(spec, has_own_embed_tokens=False, has_own_lm_head=False))
    return source


def export(folder: str | Path, target: Target, config: ExportConfig) -> Path:
    """Write a drafter for an engine with a model card, read it again, and compare.

    Returns:
        What an engine is given: the folder, or the GGUF file in it.

    Raises:
        ValueError: see `check_export`; tables of its own that the engine does not read, or files that do not read back
            as they were written.
    """
    folder = Path(folder)
    output = Path(config.output)
    engine = engine_of(config.to)
    source = check_export(folder, config)
    source.check_target(target)
    source.share_tables(target)
    spec = replace(source.spec, **scales_of(target))
    tensors = source.state_dict()
    if config.plain:
        spec = without_selector(spec)
        zeros = tensors["norm.weight"].new_zeros  # for DFlash2's selector, which convolutions without a head come with
        own = {name: tensor for name, tensor in tensors.items() if tensor.shape == spec.shapes.get(name)}
        tensors = {name: zeros(shape) for name, shape in spec.shapes.items()} | own
    engine.check(config, spec)
    spec, tensors = engine.adapt(spec, tensors, folder, target)
    cast = {name: engine.cast(tensor, config.dtype) for name, tensor in tensors.items()}
    drafter = make_drafter(spec, cast, f"the drafter in {config.dtype}")
    if config.dtype == "keep":
        config = replace(config, dtype=dtype_name(drafter.fc.weight.dtype))
    with _compared(output, drafter) as aside:
        path = engine.write(aside, drafter, config, target)
        write_card(path, drafter, config, folder=folder, source=source, target=target)
    return output / path.relative_to(aside)


def import_drafter(source: str | Path, output: str | Path, *, target: str | None = None) -> Drafter:
    """Read another project's drafter and write it in this project's layout, weights bit for bit.

    Args:
        source: a folder or a file in the layout of any engine; quantized weights become fp32.
        output: folder for `config.json`, `model.safetensors` and the network's code.
        target: folder or Hub id, for formats that do not say how many layers it has.

    Raises:
        ValueError: a drafter that dpace does not know or that cannot be served, or a target that cannot be read.
    """
    source = Path(source)
    output = Path(output)
    refuse_output(output, source)
    drafter = read_drafter(source, num_target_layers=None if target is None else count_layers(target))
    drafter.spec.check()
    with _compared(output, drafter) as aside:
        drafter.save_pretrained(aside)
    return drafter


@contextmanager
def _compared(output: Path, drafter: Drafter) -> Iterator[Path]:
    """Yield an empty folder, whose files go to `output` where a drafter can be read back from them bit for bit.

    What dpace wrote of another drafter to the same folder would be uploaded and read with this one, and is removed.

    Raises:
        ValueError: a file differs from what was to be written.
    """
    with lock_folder(output):
        with filling(output) as aside:
            yield aside
            path = next(aside.glob("*.gguf"), aside)
            again = read_drafter(path, num_target_layers=drafter.spec.num_target_layers)
            if again.spec != drafter.spec or fingerprint(again) != fingerprint(drafter):
                raise ValueError(f"{output} does not read back as it was written; do not serve it")
            files = [file.name for file in aside.iterdir()]
            register_files(output, *files)
        old = remove_files(output, PATTERNS, keep=files)
    if old:
        note(f"removed from {output}, where dpace wrote an earlier drafter: {', '.join(old)}")
