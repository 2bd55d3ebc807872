"""llama.cpp, and what is built on it: a GGUF file of the architecture `dflash`.

What comes in is a spec with its tensors and any GGUF file of the target, whose tokenizer is repeated; what goes out is
one file. Reading gives spec and tensors back, bit for bit, or one line about a file that is damaged or another's.

Source: `tools/server/README.md` and `src/models/dflash.cpp` of ggml-org/llama.cpp.
"""

import contextlib
import io
import json
import re
import shlex
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dpace.drafter.spec import LAYER_SIZES, SPECIAL_TOKENS, DrafterSpec
from dpace.drafter.vocabulary import drafted_tokens
from dpace.engines.engine import PROPERTIES, Contents, Engine
from dpace.engines.folder import mapping, to_layer_ids
from dpace.engines.published import DEQUANTIZED
from dpace.system.loading import LIBRARY_ERRORS
from dpace.system.progress import describe_error

ARCHITECTURE = "dflash"
OURS = "dpace.config"
"""Key of the file, a text in JSON: record and special tokens of the drafter's config, which llama.cpp does not read."""
BROKEN = (*LIBRARY_ERRORS, MemoryError, struct.error)
"""What reading a damaged file raises in gguf and numpy."""
SIZES = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "block_size": "block_size",
}
"""Published name and llama.cpp's name of each size."""
SCALES = {
    "input_embedding_scale": "embedding_scale",
    "output_multiplier": "logit_scale",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""The same of scales and caps, which are only written where they change something."""
NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection.weight": "selector_hidden.weight",
    "embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "d2t": "d2t",
}
"""Published name and llama.cpp's name of each tensor; nothing is permuted, because the rotary embedding is NeoX's."""
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "attention_conv.base_kernel": "attn_conv_base",
    "attention_conv.kernel_projection.weight": "attn_conv_proj.weight",
    "mlp_conv.base_kernel": "ffn_conv_base",
    "mlp_conv.kernel_projection.weight": "ffn_conv_proj.weight",
}
"""The same of the tensors of a layer."""
MAX_READS = 2**21
"""Most numbers and texts before the weights; a vocabulary of 262,144 tokens with its merges takes about 1.1 million."""
TENSOR_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.int64: gguf.GGMLQuantizationType.I64,
}
QUANTIZED = ("q8_0", "q5_0", "q4_0")
"""Precisions of llama.cpp in which a block of 32 numbers shares a scale, and which `gguf` can write."""


class Gguf(Engine):
    """See `Engine`."""

    name = "gguf"
    title = "llama.cpp"
    reads = ("DFlashDraftModel", "DFlash2DraftModel", *PROPERTIES)
    precisions = (*Engine.precisions, *QUANTIZED)
    layout = "gguf"
    library = "gguf"
    tags = ("gguf",)
    card = """**llama.cpp** (without `--spec-draft-n-max` it drafts 3 tokens, which this drafter was not trained for)

```bash
{command}
```

By default it verifies all that is drafted. `--spec-draft-p-min 0.5` ends a draft before its first token of a lower
probability; try a few values on your prompts.

`TARGET.gguf` in f16, bf16 or f32 keeps the target's text; quantized targets round a block and a token differently.
"""

    def check(self, request, spec):
        """See `Engine`; a GGUF file of another target is refused too."""
        super().check(request, spec)
        if request.target_gguf is None:
            raise ValueError(
                "no GGUF file of the target is named, and a drafter's GGUF file repeats its tokenizer; name one with "
                "--target-gguf"
            )
        open_target_gguf(request.target_gguf, spec)

    def fault(self, spec):
        """See `Engine`.

        Its network takes no frequency factors of a scaled rotary embedding; other scalings were not tested.
        """
        if spec.is_causal == "sliding":
            return (
                "is_causal is not set, so that sliding layers are causal and full ones are not; llama.cpp has one "
                "value for all layers: serve this drafter with vLLM or z-lab's code"
            )
        if spec.rope["rope_type"] != "default":
            return (
                f"the drafter's rope_type is {spec.rope['rope_type']!r}, expected 'default': llama.cpp's DFlash "
                "network takes no frequency factors, which Llama 3.1's scaling needs, and other scalings were not "
                "tested; serve this drafter with vLLM, SGLang or transformers"
            )
        return super().fault(spec)

    def command(self, spec, drafter, target):
        """See `Engine`; drafters whose blocks begin at the anchor run as DSpark's without a head."""
        file = shlex.quote(drafter) if drafter.endswith(".gguf") else "DRAFTER.gguf"
        kind = "dspark" if spec.sample_from_anchor else "dflash"
        count = spec.num_draft_tokens
        return f"llama-server -m TARGET.gguf -md {file} --spec-type draft-{kind} --spec-draft-n-max {count}"

    def section(self, layout, spec, drafter, target):
        """See `Engine`; cards of the published layout say how the file is made."""
        if layout != Engine.layout:
            return super().section(layout, spec, drafter, target)
        if self.fault(replace(spec, selector=None)):
            return ""
        plain = " --plain" if spec.selector else ""
        return (
            f"For llama.cpp: `dpace export FOLDER --target {target} --to gguf{plain} --target-gguf TARGET.gguf "
            "--output FOLDER-gguf`."
        )

    def cast(self, tensor, dtype):
        """See `Engine`; llama.cpp needs all but matrices in float32."""
        if tensor.dim() != 2:
            return super().cast(tensor, "float32")
        return quantize(tensor, dtype)[1] if dtype in QUANTIZED else super().cast(tensor, dtype)

    def write(self, folder, contents, request, target):
        """See `Engine`."""
        path = folder / f"dflash-{Path(request.target_name).resolve().name}-{contents.dtype}.gguf"
        write_gguf(path, contents, str(request.target_gguf))
        return path

    def is_written(self, path):
        """See `Engine`; a folder may hold the file."""
        return path.suffix == ".gguf" or not (path / "config.json").exists() and any(path.glob("*.gguf"))

    def read(self, path, num_target_layers):
        """See `Engine`."""
        files = [path] if path.is_file() or path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ValueError(f"{path} has {names}, and each may be another drafter; name one of the files")
        return read_gguf(files[0], num_target_layers=num_target_layers)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    of_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return NAMES[name] if of_layer is None else f"blk.{of_layer[1]}.{LAYER_NAMES[of_layer[2]]}"


def quantize(tensor: Tensor, precision: str) -> tuple[np.ndarray, Tensor]:
    """Quantize a matrix.

    Args:
        tensor: "row column".
        precision: one of `QUANTIZED`.

    Returns:
        The bytes for the file, and the numbers that they stand for. A matrix whose rows are no blocks of 32 stays as it
        is, in fp32.
    """
    kind = gguf.GGMLQuantizationType[precision.upper()]
    values = tensor.float().cpu().numpy()
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return values, torch.from_numpy(values)
    data = gguf.quants.quantize(values, kind)
    return data, torch.from_numpy(gguf.quants.dequantize(data, kind) + 0)  # no -0.0, which would become 0.0 later


def open_target_gguf(path: str | Path, spec: DrafterSpec) -> gguf.GGUFReader:
    """Open a GGUF file of a drafter's target.

    Raises:
        ValueError: there is no such file, or it is damaged or of another model.
    """
    target = _open_gguf(path)
    tokens = target.fields.get("tokenizer.ggml.tokens")
    architecture = _read_value(target, "general.architecture")
    sizes = [_read_value(target, f"{architecture}.{name}") for name in ("block_count", "embedding_length")]
    found = [*sizes, len(tokens.data) if tokens else None]
    expected = [spec.num_target_layers, spec.hidden_size, spec.vocab_size]
    if found != expected:
        raise ValueError(
            f"{path} has {found} and the drafter's target {expected} (layers, hidden size, tokens); name a GGUF "
            "file of that target with --target-gguf"
        )
    return target


def write_gguf(path: Path, contents: Contents, target_gguf: str | Path) -> None:
    """Write a drafter for llama.cpp.

    Args:
        path: of the new file.
        contents: matrices in float32, float16, bfloat16, or to be quantized; all other tensors in float32.
        target_gguf: any GGUF file of the target; the drafter's file repeats its tokenizer.

    Raises:
        ValueError: see `open_target_gguf`.
    """
    spec, tensors = contents.spec, contents.tensors
    quantized = contents.dtype if contents.dtype in QUANTIZED else ""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, field in open_target_gguf(target_gguf, spec).fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.ggml.mask_token_id":
            _copy_field(writer, field)
    _write_fields(writer, spec)
    mostly = quantized or TENSOR_TYPES[tensors["fc.weight"].dtype].name
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if mostly == "F32" else f"MOSTLY_{mostly.upper()}"])
    for ours in spec.shapes:
        tensor = tensors[ours].detach().cpu().contiguous()
        if ours == "d2t":
            tensor = drafted_tokens(tensor, spec.vocab_size)
        kind = TENSOR_TYPES[tensor.dtype]
        # numpy has no bf16: gguf takes its bytes, as those of blocks
        data = (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        if quantized and tensor.dim() == 2:
            data = quantize(tensor, quantized)[0]
            kind = gguf.GGMLQuantizationType[quantized.upper()] if data.dtype == np.uint8 else kind
        writer.add_tensor(gguf_name(ours), data, raw_dtype=kind)
    _write_file(writer)


def _copy_field(writer: gguf.GGUFWriter, field: gguf.ReaderField) -> None:
    """Copy a metadata field."""
    sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)


def _write_file(writer: gguf.GGUFWriter) -> None:
    """Write what was added, and close the file."""
    with contextlib.closing(writer):  # also where the disk is full
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _write_fields(writer: gguf.GGUFWriter, spec: DrafterSpec) -> None:
    """Write the metadata.

    The file numbers the target's layers by their input, so one higher than here.
    """
    config = spec.config()
    if spec.sliding_window is not None:
        pattern = [kind == "sliding_attention" for kind in spec.layer_types]
        writer.add_array(f"{ARCHITECTURE}.attention.sliding_window_pattern", pattern)
    values = {
        **{name: getattr(config, ours) for ours, name in SIZES.items()},
        "attention.value_length": spec.head_dim,
        **spec.layer_keys,
        "attention.sliding_window": spec.sliding_window,
        **{name: getattr(config, ours, None) for ours, name in SCALES.items()},
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "rope.freq_base": spec.rope["rope_theta"],
        "attention.causal": bool(spec.is_causal),
        "sample_from_anchor": spec.sample_from_anchor,
    }
    kinds = gguf.GGUFValueType
    types = {int: kinds.UINT32, float: kinds.FLOAT32, bool: kinds.BOOL}
    for name, value in values.items():
        if value is not None:
            writer.add_key_value(f"{ARCHITECTURE}.{name}", value, types[type(value)])
    writer.add_key_value(f"{ARCHITECTURE}.target_layers", spec.hidden_state_ids, kinds.ARRAY, kinds.INT32)
    writer.add_uint32("tokenizer.ggml.mask_token_id", spec.mask_token_id)
    writer.add_string(OURS, json.dumps({"dpace": spec.record, **spec.special_token_ids}))


def read_gguf(path: str | Path, *, num_target_layers: int | None = None) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a drafter's GGUF file, see `Engine.read`.

    Raises:
        ValueError: not a drafter's file, weights that `gguf` cannot read, or the number of the target's layers is not
            given.
    """
    reader = _open_gguf(path)
    architecture = _read_value(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path} has architecture {architecture!r}, expected {ARCHITECTURE!r}; name the GGUF file of a DFlash "
            "drafter"
        )
    if num_target_layers is None:
        raise ValueError(f"{path} does not say how many layers the target has; name the target with --target")

    def get(name: str) -> Any:
        return _read_value(reader, f"{ARCHITECTURE}.{name}")

    pattern = get("attention.sliding_window_pattern")
    window = get("attention.sliding_window") or None
    if window and not isinstance(pattern, list):
        raise ValueError(
            f"{path} has sliding_window {window} and sliding_window_pattern {pattern!r:.50}, expected a list that says "
            "of each layer whether it has the window; write it again with such a list"
        )
    tokens = _read_value(reader, "tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ValueError(f"{path} has no list of tokens; write or download it again")
    tensors = {tensor.name: _read_tensor(tensor) for tensor in reader.tensors}
    kept = _read_ours(reader)
    if quantized := {tensor.tensor_type for tensor in reader.tensors} - {*TENSOR_TYPES.values()}:
        kept["dpace"] = mapping(kept.get("dpace")) | {DEQUANTIZED: ", ".join(sorted(kind.name for kind in quantized))}
    values = {
        **{published: get(name) for published, name in SIZES.items()},
        **{published: get(name) or None for published, name in SCALES.items()},
        **{name: get(name) for name in (*LAYER_SIZES, "sample_from_anchor")},
        "mask_token_id": _read_value(reader, "tokenizer.ggml.mask_token_id"),
        "dpace": kept.get("dpace"),
        "special_token_ids": {name: kept[name] for name in SPECIAL_TOKENS if name in kept},
        "num_target_layers": num_target_layers,
        "vocab_size": len(tokens),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": get("rope.freq_base")},
        "sliding_window": window,
        "layer_types": ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern or ()],
        "is_causal": get("attention.causal"),
        "draft_vocab_size": len(tensors.get("d2t", ())),
        "has_own_embed_tokens": "token_embd.weight" in tensors,
        "has_own_lm_head": "output.weight" in tensors and "d2t" not in tensors,
    }
    try:
        spec = DrafterSpec.from_values({**values, "target_layer_ids": to_layer_ids(get("target_layers"))})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if "d2t" in tensors:  # the tokens themselves here
        tensors["d2t"] -= torch.arange(len(tensors["d2t"]))
    names: dict[Any, str] = {gguf_name(ours): ours for ours in spec.shapes}
    return spec, {names.get(name, name): tensor for name, tensor in tensors.items()}


def _read_ours(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Read the keys of the config that only dpace reads; none where another program wrote the file."""
    text = _read_value(reader, OURS)
    with _naming(f"the GGUF file's value {OURS}"):
        return dict(json.loads(text or "{}"))


def _read_tensor(tensor: Any) -> Tensor:
    """Read a tensor of the file, bit for bit; quantized ones become the numbers that they stand for, in fp32."""
    dtypes = {kind: dtype for dtype, kind in TENSOR_TYPES.items()}
    with _naming(tensor.name, "name a file of the drafter in another precision, such as q8_0, or download it again"):
        shape = [int(size) for size in reversed(tensor.shape)]
        if tensor.tensor_type not in dtypes:
            return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type) + 0).reshape(shape)
        data = torch.from_numpy(np.array(tensor.data))
        return data.view(dtypes[tensor.tensor_type]).reshape(shape)


@contextlib.contextmanager
def _naming(what: str, fix: str = "write or download the file again") -> Iterator[None]:
    """Turn what gguf and numpy raise for a damaged file into one line."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{what} cannot be read ({describe_error(error)[:300]}); {fix}") from error


class _BoundedReader(gguf.GGUFReader):
    """A reader that a damaged length cannot keep busy.

    gguf's own takes numbers past the end of the file as empty ones, of which it reads as many as the length says.
    """

    num_reads = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        found = super()._get(offset, dtype, count, override_order)
        self.num_reads += 1
        if len(found) < count:
            raise ValueError(f"{count} numbers at byte {offset} are past the end of the file")
        if self.num_reads > MAX_READS:
            raise ValueError(f"more than {MAX_READS} numbers and texts before the weights")
        return found


def _open_gguf(path: str | Path) -> gguf.GGUFReader:
    """Open a GGUF file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; name a GGUF file that exists")
    with _naming(f"the GGUF file {path}"), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # numpy's, about numbers that no length is
        return _BoundedReader(path)


def _read_value(reader: gguf.GGUFReader, name: str) -> Any:
    """Read a metadata value; None where there is none."""
    if name not in reader.fields:
        return None
    with _naming(f"the GGUF file's value {name}"):
        return reader.fields[name].contents()


ENGINE = Gguf()
