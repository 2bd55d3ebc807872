"""Write a drafter in the format of an engine, and read it back.

All that is written is read again and compared with what was to be written, before it takes its place.
"""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpace.config import Format
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.lilicorr import UNREAD_FORMATS
from dpace.drafter.spec import MAX_LAYERS, DrafterSpec
from dpace.drafter.vocabulary import DraftVocabulary, drafted_tokens, load_vocabulary
from dpace.engines.card import write_card
from dpace.engines.gguf import quantize, read_gguf, write_gguf
from dpace.engines.published import make_drafter, read_folder, without_head
from dpace.engines.speculators import speculators_config, verifier_name
from dpace.system.device import dtype_name
from dpace.system.ledger import filling, refuse_foreign_files
from dpace.system.loading import translate_library_errors
from dpace.target import Target
from dpace.target.files import find_target_files
from dpace.train.identity import RUN_FILE

IDENTIFYING = ("config.json", "README.md", "model.safetensors")
"""Files that say whose a folder is: where another program wrote them, dpace writes nothing beside them."""
HELD_BY: dict[str, tuple[Format, ...]] = {
    "conv_kernel_size": ("zlab", "sglang", "vllm", "gguf"),
    "sample_from_anchor": ("gguf", "speculators"),
    "draft_vocab_size": ("gguf", "speculators", "vllm"),
    "has_own_embed_tokens": ("gguf", "vllm"),
    "has_own_lm_head": ("gguf", "vllm"),
}
"""Formats whose engines read a property of `DrafterSpec`; the others would draft wrongly, and say nothing."""


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
    num_tensors: int
    """Number of tensors, all equal, bit for bit, to those that were to be written."""
    rounding: float
    """Largest relative change of a tensor by the change of dtype; 0 where it was kept."""


def export(
    folder: str | Path,
    target: Target,
    *,
    to: Format,
    output: str | Path,
    name: str,
    target_name: str,
    target_gguf: str | Path | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    license: str = "other",
    is_plain: bool = False,
) -> Exported:
    """Write a drafter for an engine with a model card, read it again, and compare.

    `zlab`, `sglang` and `vllm` are the same files, in z-lab's layout, which `dpace train` writes.

    Args:
        folder: of the drafter.
        target: its target.
        to: the engine.
        output: folder for the files.
        name: what the model card calls the drafter: a Hub id or a folder.
        target_name: what the engine is to call the target: a Hub id, or a folder.
        target_gguf: any GGUF file of the target; needed for `gguf`.
        dtype: of the weights; by default as they are.
        precision: one of `dpace.engines.gguf.QUANTIZED`, for the matrices of a GGUF file.
        license: of the weights, for the model card.
        is_plain: leave out the drafter's head.

    Raises:
        ValueError: a drafter that cannot be served, a missing or wrong `target_gguf`, or files that do not read back as
            they were written.
    """
    folder, output = Path(folder), Path(output)
    if to == "gguf" and target_gguf is None:
        raise ValueError(
            "no GGUF file of the target is named, and a drafter's GGUF file repeats its tokenizer; name one with "
            "--target-gguf"
        )
    if to != "gguf" and precision:
        raise ValueError(f"--dtype {precision} is a precision of GGUF files, and --to is {to}; take --to gguf")
    refuse_output(output, folder, Path(target_name))
    if verifier_name(folder):
        raise ValueError(
            f"{folder} is in the format of speculators, not in the published one; convert it with `dpace import` first"
        )
    spec, weights = read_folder(folder)
    spec.check()
    original = load_drafter(folder, target, all_tokens=True)
    own = {name: getattr(original.spec, name) for name in ("has_own_embed_tokens", "has_own_lm_head")}
    spec = replace(spec, **own)  # without tables that are the target's
    weights = {name: tensor for name, tensor in weights.items() if name in spec.tensors}
    if is_plain:
        spec, weights = without_head(spec, weights)
        original = make_drafter(spec, weights).to(target.model.dtype)  # of which nothing was measured
    if spec.head and to in UNREAD_FORMATS:
        raise ValueError(
            f"the drafter has a LiLiCorr head, and {UNREAD_FORMATS[to]}; give vLLM or SGLang the folder that `dpace "
            "train` writes, or write it without the head, as DFlash's, with --plain"
        )
    for key, formats in HELD_BY.items():
        if getattr(spec, key) and to not in formats:
            raise ValueError(
                f"the drafter's {key} is {getattr(spec, key)}, which engines that read the format {to} do not use, "
                f"and so accept nearly nothing; export with --to {' or --to '.join(formats)}"
            )
    engine_target = str(Path(target_name).resolve()) if Path(target_name).is_dir() else target_name
    if to == "speculators" and not spec.draft_vocab_size:
        spec, weights = _with_vocabulary(spec, weights, load_vocabulary(folder, spec.vocab_size), target)
    tensors, rounding = _cast_weights(weights, dtype, has_fp32_vectors=to == "gguf", precision=precision)
    written = precision or dtype_name(tensors["fc.weight"].dtype)
    with filling(output) as aside:
        path = aside
        if to == "gguf":
            path = aside / f"dflash-{Path(target_name).resolve().name}-{written}.gguf"
            write_gguf(path, spec, tensors, target_gguf=str(target_gguf), precision=precision)
        elif to == "speculators":
            if spec.draft_vocab_size:
                tensors["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool)
                tensors["t2d"][drafted_tokens(tensors["d2t"], spec.vocab_size)] = True
            save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
            config = speculators_config(
                spec,
                target_name=engine_target,
                architectures=list(target.model.config.architectures or []),
                dtype=written,
            )
            (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        else:
            make_drafter(spec, tensors).save_pretrained(aside)
        write_card(
            path,
            spec,
            to=to,
            name=name,
            target_name=target_name,
            license=license,
            dtype=written,
            is_rounded=rounding > 0,
            source=folder,
            drafter=original,
        )
        again = read_drafter(path, num_target_layers=target.num_layers)
        final = output / path.relative_to(aside)
        _compare_files(final, spec, tensors, again)
    return Exported(final, len(tensors), rounding)


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
    with filling(output) as aside:
        drafter.save_pretrained(aside)
        _compare_files(output, spec, drafter.state_dict(), read_drafter(aside))
    return drafter


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
    """Read a folder of any known format, or a GGUF file, also the only one of a folder, with the weights as they are.

    Raises:
        ValueError: see `read_folder`, `read_gguf` and `make_drafter`.
    """
    path = Path(path)
    inside = [] if (path / "config.json").exists() else list(path.glob("*.gguf"))
    path = inside[0] if len(inside) == 1 else path
    read: Any = read_gguf if path.suffix == ".gguf" else read_folder
    return make_drafter(*read(path, num_target_layers=num_target_layers))


def push(folder: str | Path, repo: str) -> str:
    """Upload a folder to the Hugging Face Hub and return the address.

    The repository is made where it is missing. Only what an export may write goes there, and no folder.

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
            allow_patterns=[*IDENTIFYING, "*.py", "*.gguf"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the Hub's many ways not to take files
        raise ValueError(
            f"the drafter is in {folder}, and the Hub does not take it as {repo} ({error}); check the "
            "name, the network and `hf auth login`, and run the command again"
        ) from error
    return str(address)


def _with_vocabulary(
    spec: DrafterSpec, weights: dict[str, Tensor], vocabulary: DraftVocabulary | None, target: Target
) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Add a draft vocabulary as speculators stores it: the target's rows in 16 bits where that changes no value."""
    if vocabulary is None or len(vocabulary.token_ids) == spec.vocab_size:
        return spec, weights
    token_ids = vocabulary.token_ids
    exact = target.head.weight[token_ids.to(target.device)].cpu()
    rows = exact.to(weights["fc.weight"].dtype)
    rows = rows if torch.equal(rows.to(exact.dtype), exact) else exact
    own = {"lm_head.weight": rows, "d2t": token_ids - torch.arange(len(token_ids))}
    return replace(spec, draft_vocab_size=len(token_ids)), weights | own


def _cast_weights(
    tensors: dict[str, Tensor], dtype: torch.dtype | None, *, has_fp32_vectors: bool, precision: str | None
) -> tuple[dict[str, Tensor], float]:
    """Turn weights into the dtype to write; return them and the largest relative change of a tensor."""
    cast, errors = {}, [0.0]
    for name, tensor in tensors.items():
        wanted = torch.float32 if has_fp32_vectors and tensor.dim() != 2 else dtype or tensor.dtype
        cast[name] = tensor.to(wanted if tensor.is_floating_point() else tensor.dtype).contiguous()
        if precision and tensor.dim() == 2:
            cast[name] = quantize(tensor, precision)[1]
        errors.append(float((cast[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-30)))
    return cast, max(errors)


def _compare_files(path: str | Path, spec: DrafterSpec, tensors: dict[str, Tensor], again: Drafter) -> None:
    """Refuse a file that differs from what was to be written."""
    found = vars(again.spec)
    names = [field.name for field in fields(spec) if field.compare]
    wrong = [f"{n} {found[n]}, expected {getattr(spec, n)}" for n in names if found[n] != getattr(spec, n)]
    for name, tensor in again.state_dict().items():
        bits, expected = (one.contiguous().view(torch.uint8) for one in (tensor, tensors[name]))
        if tensor.dtype != tensors[name].dtype or not torch.equal(bits, expected):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} does not read back as it was written ({'; '.join(wrong[:3])}); do not serve it")
