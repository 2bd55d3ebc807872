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
from dpace.engines import all_engines, engine_of
from dpace.engines.read import read_drafter, refuse_other_layout
from dpace.publish.card import write_card
from dpace.system.device import dtype_name
from dpace.system.ledger import filling, lock_folder, refuse_foreign_files, register_files, remove_files
from dpace.system.progress import note
from dpace.system.provenance import fingerprint
from dpace.target import Target
from dpace.target.files import count_layers
from dpace.training.run import RUN_FILE

CARD = "README.md"
IDENTIFYING = ("config.json", CARD, "model.safetensors")
"""Files that say whose a folder is: where another program wrote them, dpace writes nothing beside them."""
OF_SELECTOR = ("confidence_temperature", "tau", "tau_interval", "tau_responses", "reach_rate")
"""Entries of the record that were measured with the selector."""


def refuse_output(output: Path, drafter: Path) -> None:
    """Refuse a folder that is not dpace's to write to.

    Raises:
        ValueError: the output is the drafter's folder, or holds another program's files or a trained
            drafter.
    """
    folder = drafter.parent if drafter.is_file() else drafter
    faults = {
        "is the drafter's own folder": output.resolve() == folder.resolve(),
        "holds a drafter that dpace trained": (output / RUN_FILE).exists(),
    }
    for fault, is_found in faults.items():
        if is_found:
            raise ValueError(f"the output {output} {fault}; name another folder with --output")
    refuse_foreign_files(output, *IDENTIFYING)


def without_selector(spec: DrafterSpec) -> DrafterSpec:
    """Return what a drafter is without its selector: DFlash's, or DFlash2's where it has convolutions.

    Raises:
        ValueError: it has no selector.
    """
    if spec.selector is None:
        raise ValueError("the drafter has no selector that could be left out; export it without --plain")
    record = {name: value for name, value in spec.record.items() if name not in OF_SELECTOR}
    return replace(spec, selector=None, record=record)


def check_export(folder: Path, config: ExportConfig) -> Drafter:
    """Refuse an export that cannot be made, before the target is loaded; return the drafter.

    Whether tables of the drafter's own are the target's is not known yet; here they count as such.

    Raises:
        ValueError: a folder that is not to be written to; a drafter in another layout than the published one, or that
            cannot be served; or see `Engine.check`.
    """
    refuse_output(Path(config.output), folder)
    refuse_other_layout(folder)
    source = read_drafter(folder)
    spec = source.spec
    spec.check()
    if config.plain:
        spec = without_selector(spec)
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
    source.share_tables(target)  # engines take them from the target
    spec = replace(source.spec, **scales_of(target))
    tensors = source.state_dict()
    if config.plain:
        spec = without_selector(spec)
        zeros = tensors["norm.weight"].new_zeros  # for DFlash2's selector, which convolutions alone come with
        plain_tensors = {}
        for name, shape in spec.shapes.items():
            tensor = tensors.get(name)
            plain_tensors[name] = tensor if tensor is not None and tensor.shape == shape else zeros(shape)
        tensors = plain_tensors
    engine.check(config, spec)
    spec, tensors = engine.adapt(spec, tensors, folder, target)
    cast = {name: engine.cast(tensor, config.dtype) for name, tensor in tensors.items()}
    drafter = make_drafter(spec, cast, f"the drafter in {config.dtype}")
    if config.dtype == "keep":
        config = replace(config, dtype=dtype_name(drafter.fc.weight.dtype))
    with _replacing(output) as aside:
        path = engine.write(aside, drafter, config, target)
        _check_written(path, drafter, output)
        write_card(path, drafter, config, folder=folder, source=source, target=target)
    return output / path.relative_to(aside)


def import_drafter(source: str | Path, output: str | Path, *, target: str | None = None) -> Drafter:
    """Read another project's drafter and write it in this project's layout, weights bit for bit.

    Args:
        source: a folder or a file in the layout of any engine; quantized weights of a GGUF file become fp32.
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
    with _replacing(output) as aside:
        drafter.save_pretrained(aside)
        _check_written(aside, drafter, output)
    return drafter


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield an empty folder, whose files go to `output`.

    What dpace wrote of another drafter to the same folder would be uploaded and read with this one, and is removed.
    """
    patterns = {CARD, "speculation_profile.json"}.union(*(engine.files for engine in all_engines()))
    with lock_folder(output):
        with filling(output) as aside:
            yield aside
            # Registered before they move, so that after a kill too dpace knows them as its own.
            files = [file.name for file in aside.iterdir()]
            register_files(output, *files)
        old = remove_files(output, patterns, keep=files)
    if old:
        note(f"removed from {output}, where dpace wrote an earlier drafter: {', '.join(old)}")


def _check_written(path: Path, drafter: Drafter, output: Path) -> None:
    """Refuse files from which the drafter is not read back bit for bit.

    Args:
        path: what was written, the folder or a file in it.
        drafter: as it was to be written.
        output: the folder that they would go to.

    Raises:
        ValueError: a file differs from what was to be written.
    """
    again = read_drafter(path, num_target_layers=drafter.spec.num_target_layers)
    if again.spec != drafter.spec or fingerprint(again) != fingerprint(drafter):
        raise ValueError(f"{output} does not read back as it was written; do not serve it")
