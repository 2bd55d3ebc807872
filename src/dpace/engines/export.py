"""Write a drafter in the format of an engine, and read it back.

All that is written is read again and compared with what was to be written, before it takes its place.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dpace.drafter import Drafter
from dpace.drafter.drafter import make_drafter
from dpace.drafter.files import read_folder
from dpace.drafter.spec import DrafterSpec
from dpace.engines import ExportConfig, all_engines, engine_of
from dpace.engines.card import write_card
from dpace.engines.engine import Engine
from dpace.system.device import dtype_name
from dpace.system.ledger import filling, refuse_foreign_files, remove_files
from dpace.system.provenance import fingerprint
from dpace.target import Target
from dpace.target.files import find_adapter, find_target_files
from dpace.train.run import RUN_FILE

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
    faults = {
        "is the drafter's own folder": output.resolve() == drafter.resolve(),
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


class Exported(NamedTuple):
    """What was written, and read again as it was to be written."""

    path: Path
    """What an engine is given: the folder, or the GGUF file in it."""
    files: list[str]
    """Names of all files."""


def check_export(folder: Path, config: ExportConfig) -> None:
    """Refuse an export that cannot be made, before a model is loaded.

    Whether tables of the drafter's own are the target's is not known yet; here they count as such.

    Raises:
        ValueError: a folder that is not to be written to; a drafter in another layout than the published one, or that
            cannot be served; or see `Engine.check`.
    """
    refuse_output(Path(config.output), folder)
    writer = writer_of(folder)
    if writer.layout != Engine.layout:
        raise ValueError(f"{folder} is for {writer.title}, not in the published layout; convert it with `dpace import`")
    spec, _ = read_folder(folder)
    spec.check()
    spec = without_selector(spec) if config.plain else spec
    engine_of(config.to).check(config, replace(spec, has_own_embed_tokens=False, has_own_lm_head=False))


def export(folder: str | Path, target: Target, config: ExportConfig) -> Exported:
    """Write a drafter for an engine with a model card, read it again, and compare.

    Raises:
        ValueError: see `check_export`; tables of its own that the engine does not read, or files that do not read back
            as they were written.
    """
    folder = Path(folder)
    output = Path(config.output)
    engine = engine_of(config.to)
    check_export(folder, config)
    source = read_drafter(folder)
    source.check_target(target)
    source.share_tables(target)
    spec = source.spec
    tensors = source.state_dict()
    if config.plain:
        spec = without_selector(spec)
        zeros = tensors["norm.weight"].new_zeros  # for DFlash2's selector, which convolutions without a head come with
        own = {name: tensor for name, tensor in tensors.items() if tensor.shape == spec.shapes.get(name)}
        tensors = {name: own[name] if name in own else zeros(shape) for name, shape in spec.shapes.items()}
    engine.check(config, spec)
    spec, tensors = engine.adapt(spec, tensors, folder, target)
    drafter = make_drafter(spec, {name: engine.cast(tensor, config.dtype) for name, tensor in tensors.items()})
    if config.dtype == "keep":
        config = replace(config, dtype=dtype_name(drafter.fc.weight.dtype))
    merging = lines_to_merge(target, config.served_target)
    if merging:
        print(
            f"{config.served_target} is a LoRA adapter, which engines do not serve as a model; merge it, and name the "
            f"merged model with --target-name:\n{merging}",
            file=sys.stderr,
        )
    with _compared(output, drafter) as aside:
        path = engine.write(aside, drafter, config, target)
        write_card(path, drafter, config, folder=folder, source=source, merging=merging)
        files = sorted(file.name for file in aside.iterdir())
    return Exported(output / path.relative_to(aside), files)


def lines_to_merge(target: Target, name: str) -> str:
    """Write the lines of Python that merge a LoRA adapter into its base.

    Args:
        target: that was loaded.
        name: what the engine is to call it.

    Returns:
        The lines; empty where the name is not that of an adapter.
    """
    if Path(target.name).resolve() != Path(name).resolve() or not find_adapter(target.name):
        return ""
    return (
        "import peft, transformers\n"
        f"peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')\n"
        f"transformers.AutoTokenizer.from_pretrained({target.tokenizer.name_or_path!r}).save_pretrained('merged')"
    )


def import_drafter(source: str | Path, output: str | Path, *, target: str | None = None) -> Drafter:
    """Read another project's drafter and write it in this project's layout, weights bit for bit.

    Args:
        source: a z-lab, SpecForge or speculators folder, or a GGUF file; quantized weights become fp32.
        output: folder for `config.json`, `model.safetensors` and the network's code.
        target: folder or Hub id, for formats that do not say how many layers it has.

    Raises:
        ValueError: a drafter that dpace does not know or that cannot be served, or a target that cannot be read.
    """
    source, output = Path(source), Path(output)
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
    with filling(output) as aside:
        yield aside
        again = read_drafter(aside, num_target_layers=drafter.spec.num_target_layers)
        if again.spec != drafter.spec or fingerprint(again) != fingerprint(drafter):
            raise ValueError(f"{output} does not read back as it was written; do not serve it")
        files = [file.name for file in aside.iterdir()]
    if old := remove_files(output, PATTERNS, keep=files):
        print(f"removed from {output}, where dpace wrote an earlier drafter: {', '.join(old)}", file=sys.stderr)


def count_layers(target: str) -> int:
    """Read how many layers a target has; see `find_target_files`."""
    return find_target_files(target).config.get_text_config(decoder=True).num_hidden_layers


def read_drafter(path: str | Path, *, num_target_layers: int | None = None) -> Drafter:
    """Read a folder of any known format, or a file of an engine, also the only one of a folder, with its weights.

    Raises:
        ValueError: see `Engine.read` and `make_drafter`.
    """
    path = Path(path)
    return make_drafter(*writer_of(path).read(path, num_target_layers))


def writer_of(path: Path) -> Engine:
    """Find the engine in whose layout files are; the published one's where they say nothing else."""
    return next((engine for engine in all_engines() if engine.is_written(path)), Engine())


def push(folder: str | Path, repo: str, files: Sequence[str]) -> str:
    """Upload files of a folder to the Hugging Face Hub and return the address.

    The repository is made where it is missing.

    Raises:
        ValueError: the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload drafter", allow_patterns=list(files))
    except Exception as error:  # the Hub's many ways not to take files
        raise ValueError(
            f"the drafter is in {folder}, and the Hub does not take it as {repo} ({error}); check the "
            "name, the network and `hf auth login`, and run the command again"
        ) from error
    return str(address)
