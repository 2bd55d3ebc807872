"""Write a drafter in the format of an engine, and read it back.

All that is written is read again and compared with what was to be written, before it takes its place.
"""

import glob
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import read_spec
from dpace.drafter.values import MAX_LAYERS
from dpace.engines import all_engines, engine_of
from dpace.engines.card import write_card
from dpace.engines.engine import Contents, Engine, Request
from dpace.engines.published import DEQUANTIZED, make_drafter, read_folder, without_selector
from dpace.system.device import dtype_name
from dpace.system.ledger import filling, refuse_foreign_files, remove_files
from dpace.system.loading import translate_library_errors
from dpace.target import Target
from dpace.target.files import find_adapter, find_target_files
from dpace.train.identity import RUN_FILE

PATTERNS = ("config.json", "README.md", "model*.safetensors*", "modeling_*.py", "*.gguf")
"""Files of a drafter that an export or an import may write."""
IDENTIFYING = ("config.json", "README.md", "model.safetensors")
"""Files that say whose a folder is: where another program wrote them, dpace writes nothing beside them."""


def refuse_output(output: Path, drafter: Path, target: Path) -> None:
    """Refuse a folder that is not dpace's to write to.

    Raises:
        ValueError: the output is one of these places, or holds another program's files or a trained drafter.
    """
    for what, place in (("the drafter's own", drafter), ("the target's", target)):
        if place.exists() and output.resolve() == place.resolve():
            raise ValueError(f"the output {output} is {what} folder; name another folder with --output")
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; name a folder with --output")
    if (output / RUN_FILE).exists():
        raise ValueError(f"the output {output} holds a drafter that dpace trained; name another folder with --output")
    refuse_foreign_files(output, *IDENTIFYING)


class Exported(NamedTuple):
    """What was written, and read again as it was to be written."""

    path: Path
    """What an engine is given: the folder, or the GGUF file in it."""
    files: list[str]
    """Names of all files."""
    rounding: float
    """Largest relative change of a tensor by the change of dtype; 0 where it was kept."""


def check_export(folder: Path, request: Request) -> Engine:
    """Refuse an export that cannot be made, before a model is loaded, and return its engine.

    Whether tables of the drafter's own are the target's is not known yet; here they count as such.

    Raises:
        ValueError: a folder that is not to be written to; a drafter in another layout than the published one, or that
            cannot be served; or see `Engine.check`.
    """
    engine, writer = engine_of(request.to), writer_of(folder)
    refuse_output(Path(request.output), folder, Path(request.target_name))
    if writer.layout != Engine.layout:
        raise ValueError(f"{folder} is for {writer.title}, not in the published layout; convert it with `dpace import`")
    spec = read_spec(folder)
    spec.check()
    spec = without_selector(spec) if request.is_plain else spec
    engine.check(request, replace(spec, has_own_embed_tokens=False, has_own_lm_head=False))
    return engine


def export(folder: str | Path, target: Target, request: Request) -> Exported:
    """Write a drafter for an engine with a model card, read it again, and compare.

    Raises:
        ValueError: see `check_export`; tables of its own that the engine does not read, or files that do not read back
            as they were written.
    """
    folder = Path(folder)
    output = Path(request.output)
    engine = check_export(folder, request)
    contents, measured = _read_contents(folder, target, is_plain=request.is_plain)
    if fault := engine.fault(contents.spec):  # of tables that are not the target's
        raise ValueError(fault)
    merging = lines_to_merge(target, request.target_name)
    if merging:
        print(
            f"{request.target_name} is a LoRA adapter, which engines do not serve as a model; merge it, and name the "
            f"merged model with --target-name:\n{merging}",
            file=sys.stderr,
        )
    contents = _cast(engine.adapt(contents, folder, target), engine, request.dtype)
    with filling(output) as aside:
        path = engine.write(aside, contents, request, target)
        write_card(path, contents, request, source=folder, drafter=measured, merging=merging)
        final = output / path.relative_to(aside)
        _compare_files(final, contents, read_drafter(path, num_target_layers=target.num_layers))
        files = _names_in(aside)
    _remove_earlier(output, files)
    return Exported(final, files, contents.rounding)


def lines_to_merge(target: Target, name: str) -> str:
    """Write the lines of Python that merge a LoRA adapter into its base.

    Args:
        target: that was loaded.
        name: what the engine is to call it.

    Returns:
        The lines; empty where the name is not that of an adapter.
    """
    if not target.name or target.name not in (name, str(Path(name).resolve())) or not find_adapter(target.name):
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
    refuse_output(output, source, Path(target or source))
    num_target_layers = None if target is None else count_layers(target)
    drafter = read_drafter(source, num_target_layers=num_target_layers)
    spec = drafter.spec
    spec.check()
    if DEQUANTIZED in spec.record:
        print(f"quantized weights ({spec.record[DEQUANTIZED]}) are written as float32", file=sys.stderr)
    with filling(output) as aside:
        drafter.save_pretrained(aside)
        _compare_files(output, Contents(spec, drafter.state_dict()), read_drafter(aside))
        files = _names_in(aside)
    _remove_earlier(output, files)
    return drafter


def _names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _remove_earlier(output: Path, files: list[str]) -> None:
    """Remove what dpace wrote of another drafter to the same folder, which would be uploaded and read with this one."""
    if old := remove_files(output, PATTERNS, keep=files):
        print(f"removed from {output}, where dpace wrote an earlier drafter: {', '.join(old)}", file=sys.stderr)


def count_layers(target: str) -> int:
    """Read how many layers a target has.

    Raises:
        ValueError: a config that cannot be read.
    """
    fix = "name the target's folder or Hub id with --target"
    with translate_library_errors(f"the config of the target {target}", fix):
        count = find_target_files(target).config.get_text_config(decoder=True).num_hidden_layers
    if type(count) is not int or not 1 <= count <= MAX_LAYERS:
        raise ValueError(f"the target {target} has num_hidden_layers {count!r:.50}, expected 1 .. {MAX_LAYERS}; {fix}")
    return count


def read_drafter(path: str | Path, *, num_target_layers: int | None = None) -> Drafter:
    """Read a folder of any known format, or a file of an engine, also the only one of a folder, with its weights.

    Raises:
        ValueError: see `Engine.read` and `make_drafter`.
    """
    path = Path(path)
    return make_drafter(*writer_of(path).read(path, num_target_layers))


def writer_of(path: Path) -> Engine:
    """Find the engine in whose layout files are; the published one's where they say nothing else."""
    return next((engine for engine in all_engines() if engine.is_written(path)), engine_of("zlab"))


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
        api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            commit_message="Upload drafter",
            allow_patterns=[glob.escape(name) for name in files],
        )
    except Exception as error:  # the Hub's many ways not to take files
        raise ValueError(
            f"the drafter is in {folder}, and the Hub does not take it as {repo} ({error}); check the "
            "name, the network and `hf auth login`, and run the command again"
        ) from error
    return str(address)


def _read_contents(folder: Path, target: Target, *, is_plain: bool) -> tuple[Contents, Drafter]:
    """Read a drafter without the tables that are the target's; return also the drafter that may have been measured."""
    spec, weights = read_folder(folder)
    original = load_drafter(folder, target, all_tokens=True)
    own = {name: getattr(original.spec, name) for name in ("has_own_embed_tokens", "has_own_lm_head")}
    spec = replace(spec, **own)
    weights = {name: tensor for name, tensor in weights.items() if name in spec.shapes}
    if is_plain:
        spec = without_selector(spec)
        zeros = weights["norm.weight"].new_zeros
        weights = {name: weights[name] if name in weights else zeros(shape) for name, shape in spec.shapes.items()}
        original = make_drafter(spec, weights).to(target.model.dtype)  # of which nothing was measured
    return Contents(spec, weights), original


def _cast(contents: Contents, engine: Engine, dtype: str) -> Contents:
    """Turn weights into the precision to write."""
    cast = {name: engine.cast(tensor, dtype).contiguous() for name, tensor in contents.tensors.items()}
    pairs = [(cast[name].double(), tensor.double()) for name, tensor in contents.tensors.items()]
    rounding = max(float((new - old).norm() / old.norm().clamp_min(1e-30)) for new, old in pairs)
    written = dtype_name(cast["fc.weight"].dtype)
    return Contents(contents.spec, cast, dtype if dtype not in Engine.precisions else written, rounding)


def _compare_files(path: Path, contents: Contents, again: Drafter) -> None:
    """Refuse a file that differs from what was to be written."""
    found, expected = vars(again.spec), vars(contents.spec)
    names = [field.name for field in fields(contents.spec) if field.compare]
    wrong = [f"{name} {found[name]}, expected {expected[name]}" for name in names if found[name] != expected[name]]
    for name, tensor in again.state_dict().items():
        pair = (tensor, contents.tensors[name])
        bits = [one.contiguous().view(torch.uint8) for one in pair]
        if pair[0].dtype != pair[1].dtype or not torch.equal(*bits):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} does not read back as it was written ({'; '.join(wrong[:3])}); do not serve it")
