"""Write a drafter as a GGUF file for llama.cpp, and read one.

What comes in is a spec with its tensors and any GGUF file of the target, whose tokenizer is repeated; what goes out is
one file. Reading gives spec and tensors back, bit for bit, or one line about a file that is damaged or another's.
"""

import contextlib
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dpace.drafter.dflash import CONVOLUTION_KEYS
from dpace.drafter.spec import DrafterSpec
from dpace.drafter.vocabulary import drafted_tokens
from dpace.engines.speculators import to_layer_ids
from dpace.system.loading import LIBRARY_ERRORS
from dpace.system.progress import describe_error

ARCHITECTURE = "dflash"
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


def write_gguf(
    path: str | Path,
    spec: DrafterSpec,
    tensors: dict[str, Tensor],
    *,
    target_gguf: str | Path,
    precision: str | None = None,
) -> None:
    """Write a drafter for llama.cpp, with tensors in the dtype that they have.

    Args:
        path: of the new file.
        spec: of the drafter.
        tensors: its weights; matrices float32, float16 or bfloat16, all others float32, as llama.cpp needs them.
        target_gguf: any GGUF file of the target; the drafter's file repeats its tokenizer.
        precision: one of `QUANTIZED`, for the matrices.

    Raises:
        ValueError: a file of another model; a scaled rotary embedding, since llama.cpp's network takes no frequency
            factors, and other scalings were not tested; or layers of which only some are causal.
    """
    if spec.is_causal == "sliding":
        raise ValueError(
            "is_causal is not set, so that sliding layers are causal and full ones are not; llama.cpp has one value "
            "for all layers; serve this drafter with vLLM or z-lab's code"
        )
    if spec.rope["rope_type"] != "default":
        raise ValueError(
            f"the drafter's rope_type is {spec.rope['rope_type']!r}, expected 'default': llama.cpp's DFlash network "
            "takes no frequency factors, which Llama 3.1's scaling needs, and other scalings were not tested; serve "
            "this drafter with vLLM, SGLang or transformers"
        )
    target = _open_gguf(target_gguf)
    tokens = target.fields.get("tokenizer.ggml.tokens")
    architecture = _read_value(target, "general.architecture")
    theirs = {
        "hidden_size": _read_value(target, f"{architecture}.embedding_length"),
        "num_target_layers": _read_value(target, f"{architecture}.block_count"),
        "vocab_size": len(tokens.data) if tokens else None,
    }
    for name, found in theirs.items():
        if found != getattr(spec, name):
            raise ValueError(
                f"{target_gguf} has {name} {found} and the drafter's target {getattr(spec, name)}; name a GGUF file of "
                "that target with --target-gguf"
            )
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, field in target.fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.ggml.mask_token_id":
            _copy_field(writer, field)
    _write_fields(writer, spec)
    mostly = precision or TENSOR_TYPES[tensors["fc.weight"].dtype].name
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if mostly == "F32" else f"MOSTLY_{mostly.upper()}"])
    for ours, (_, name) in spec.tensors.items():
        tensor = tensors[ours].detach().cpu().contiguous()
        if ours == "d2t":
            tensor = drafted_tokens(tensor, spec.vocab_size)
        kind = TENSOR_TYPES[tensor.dtype]
        # numpy has no bf16: gguf takes its bytes, as those of blocks
        data = (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        if precision and tensor.dim() == 2:
            data = quantize(tensor, precision)[0]
            kind = gguf.GGMLQuantizationType[precision.upper()] if data.dtype == np.uint8 else kind
        writer.add_tensor(name, data, raw_dtype=kind)
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
    kinds = gguf.GGUFValueType
    sizes = {name: getattr(config, ours) for ours, name in SIZES.items()}
    sizes |= {"attention.value_length": spec.head_dim, **spec.kind.config_keys(spec)}
    if spec.sliding_window is not None:
        sizes["attention.sliding_window"] = spec.sliding_window
        pattern = [kind == "sliding_attention" for kind in spec.layer_types]
        writer.add_array(f"{ARCHITECTURE}.attention.sliding_window_pattern", pattern)
    scales = {name: getattr(config, ours) for ours, name in SCALES.items() if hasattr(config, ours)}
    scales |= {"attention.layer_norm_rms_epsilon": spec.rms_norm_eps, "rope.freq_base": spec.rope["rope_theta"]}
    flags = {"attention.causal": bool(spec.is_causal), "sample_from_anchor": spec.sample_from_anchor}
    for kind, values in ((kinds.UINT32, sizes), (kinds.FLOAT32, scales), (kinds.BOOL, flags)):
        for name, value in values.items():
            writer.add_key_value(f"{ARCHITECTURE}.{name}", value, kind)
    writer.add_key_value(f"{ARCHITECTURE}.target_layers", spec.hidden_state_ids, kinds.ARRAY, kinds.INT32)
    writer.add_uint32("tokenizer.ggml.mask_token_id", spec.mask_token_id)


def read_gguf(path: str | Path, *, num_target_layers: int | None = None) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a drafter's GGUF file, as `dpace.engines.published.read_folder` reads a folder.

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

    def get(name: str, default: Any = None) -> Any:
        return _read_value(reader, f"{ARCHITECTURE}.{name}", default)

    pattern = get("attention.sliding_window_pattern", [])
    window = get("attention.sliding_window", 0) or None
    if not isinstance(pattern, list) or (window and not pattern):
        raise ValueError(
            f"{path} has sliding_window {window} and sliding_window_pattern {pattern!r:.50}, expected a list that says "
            "of each layer whether it has the window; write it again with such a list"
        )
    tokens = _read_value(reader, "tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ValueError(f"{path} has no list of tokens; write or download it again")
    tensors = {tensor.name: _read_gguf_tensor(tensor) for tensor in reader.tensors}
    values = {
        **{published: get(name) for published, name in SIZES.items()},
        **{published: get(name, 0.0) or None for published, name in SCALES.items()},
        "mask_token_id": _read_value(reader, "tokenizer.ggml.mask_token_id"),
        "num_target_layers": num_target_layers,
        "vocab_size": len(tokens),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": get("rope.freq_base")},
        "sliding_window": window,
        "layer_types": ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern],
        "is_causal": get("attention.causal", False),
        **{name: get(name, 0) for name in CONVOLUTION_KEYS},
        "sample_from_anchor": get("sample_from_anchor", False),
        "draft_vocab_size": len(tensors["d2t"]) if "d2t" in tensors else 0,
        "has_own_embed_tokens": "token_embd.weight" in tensors,
        "has_own_lm_head": "output.weight" in tensors and "d2t" not in tensors,
    }
    try:
        spec = DrafterSpec.from_values({**values, "target_layer_ids": to_layer_ids(get("target_layers"))})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if "d2t" in tensors:  # the tokens themselves here
        tensors["d2t"] -= torch.arange(len(tensors["d2t"]))
    names = {theirs: ours for ours, (_, theirs) in spec.tensors.items()}
    return spec, {names.get(name, name): tensor for name, tensor in tensors.items()}


def _read_gguf_tensor(tensor: Any) -> Tensor:
    """Read a tensor of the file, bit for bit; quantized ones become the numbers that they stand for, in fp32."""
    dtypes = {kind: dtype for dtype, kind in TENSOR_TYPES.items()}
    try:
        shape = [int(size) for size in reversed(tensor.shape)]
        if tensor.tensor_type not in dtypes:
            return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type) + 0).reshape(shape)
        data = torch.from_numpy(np.array(tensor.data))
        return data.view(dtypes[tensor.tensor_type]).reshape(shape)
    except NotImplementedError as error:
        raise ValueError(
            f"{tensor.name} is quantized ({tensor.tensor_type.name}), which the package gguf cannot read; name a file "
            "of the drafter in another precision, such as q8_0"
        ) from error
    except BROKEN as error:
        raise ValueError(f"{tensor.name} cannot be read ({error}); write or download the file again") from error


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
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # numpy's, about numbers that no length is
            return _BoundedReader(path)
    except BROKEN as error:
        raise ValueError(
            f"{path} is no GGUF file, or a damaged one ({describe_error(error)[:300]}); write or download it again"
        ) from error


def _read_value(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    """Read a metadata value, which must be there unless a default is given."""
    field = reader.fields.get(name)
    if field is None and default is None:
        raise ValueError(f"the GGUF file has no value {name} and is not complete; write or download it again")
    try:
        return default if field is None else field.contents()
    except BROKEN as error:
        raise ValueError(f"the GGUF file's value {name} cannot be read ({error}); download it again") from error
