"""llama.cpp, and what is built on it: a GGUF file of the architecture `dflash`.

What comes in is a spec with its tensors and any GGUF file of the target, whose tokenizer is repeated; what goes out is
one file. Reading gives spec and tensors back, bit for bit, or one line about a file that is damaged or another's.

Source: `tools/server/README.md` and `src/models/dflash.cpp` of ggml-org/llama.cpp.
"""

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dpace.config import ExportConfig
from dpace.drafter import Drafter
from dpace.drafter.spec import LAYER_SIZES, DrafterSpec, read_sizes
from dpace.drafter.vocabulary import drafted_tokens
from dpace.engines.engine import CONVOLUTIONS, DSPARK, TABLES, Engine, to_layer_ids
from dpace.system.ledger import JsonObject, refuse_endless
from dpace.system.loading import translate_library_errors
from dpace.target import Target
from dpace.target.gguf_file import GET_AGAIN, open_gguf

ARCHITECTURE = "dflash"
RECORD_KEY = "dpace.config"
"""Key of the file, a text in JSON: record and special tokens of the drafter's config, which llama.cpp does not read."""
SUPPORTED_TARGETS = (
    "bailingmoe3 deepseek4 gemma4 gpt-oss hunyuan-dense hunyuan_vl k2-horizon lfm2 lfm2moe llama mimo2 minimax-01 "
    "minimax-m2 muse-glimmer nanbeige nemotron_h nemotron_h_moe qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen4exp "
    "deepseek_v4 gemma4_text gemma4_unified gpt_oss hunyuan_v1_dense internlm3 iquestcoder janus lfm2_moe llava "
    "mimo_v2_flash minicpmv4_6 minimax_m2 mistral mixtral muse_glimmer qwen3_5 qwen3_5_moe qwen3_5_moe_text "
    "qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text"
).split()
"""Targets whose graphs hand out the inputs of their layers, which a drafter reads: in the first two lines by the
architecture of the GGUF file, and after them by the `model_type` of a config where that is another word.

Source: llama.cpp b11549, as xllamacpp 2026.10.11549 has it: the graphs in `src/models/` that set `t_layer_inp`, and the
models of which `conversion/` makes such files. With another target it ends its process at the first request
(`GGML_ASSERT` in `src/llama-graph.cpp`)."""
FIELDS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "block_size": "block_size",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "input_embedding_scale": "embedding_scale",
    "output_multiplier": "logit_scale",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Published name and llama.cpp's name of each number; those that change nothing are not written."""
TENSOR_NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection.weight": "selector_hidden.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
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
TENSOR_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.int64: gguf.GGMLQuantizationType.I64,
}
DTYPES = {kind: dtype for dtype, kind in TENSOR_TYPES.items()}


class Gguf(Engine):
    """See `Engine`."""

    name = "gguf"
    title = "llama.cpp"
    reads = ("DFlashDraftModel", "DFlash2DraftModel", DSPARK, *CONVOLUTIONS, *TABLES, "sample_from_anchor")
    layout = "gguf"
    files = ("*.gguf",)
    card = """**llama.cpp** (without `--spec-draft-n-max` it drafts 3 tokens)

```bash
{command}
```

On a CPU measure first, with `dpace bench --server`: long drafts were slower than no drafter in all our runs there. By
default it verifies all that is drafted. `--spec-draft-p-min 0.5` ends a draft before its first token of a lower
probability; try a few values on your prompts. With the type `draft-dspark` it takes no such value.

From the Hub: `llama-server -hf OWNER/TARGET-GGUF -hfd OWNER/REPOSITORY` finds this file by its name, in any repository.
Beside the target's GGUF file, `-hf` finds it with the `--spec-type` of the command, and Unsloth's studio by itself.

With a quantized target, such as Q8_0 or Q4_1, the text will differ from what the same target writes without a drafter:
llama.cpp rounds a block of tokens and a single one differently. With a target in f16, bf16 or f32 the text stays.
"""

    def check(self, config: ExportConfig, spec: DrafterSpec) -> None:
        """See `Engine`; a GGUF file of another target, or of one that no drafter can read, is refused too."""
        super().check(config, spec)
        if config.served_gguf is None:
            raise ValueError(
                "no GGUF file of the target is named, and a drafter's GGUF file repeats its tokenizer; name one with "
                "--target-gguf, or as the --target"
            )
        target = open_target_gguf(config.served_gguf, spec)
        if fault := self.target_fault(target.fields["general.architecture"].contents()):
            raise ValueError(fault)

    def fault(self, spec: DrafterSpec) -> str:
        """See `Engine`.

        Its network takes no frequency factors of a scaled rotary embedding; other scalings were not tested.
        """
        if spec.is_causal == "sliding":
            return (
                "is_causal is not set, so that sliding layers are causal and full ones are not; llama.cpp has one "
                "value for all layers: serve this drafter with vLLM or z-lab's code"
            )
        if spec.rope_parameters["rope_type"] != "default":
            return (
                f"the drafter's rope_type is {spec.rope_parameters['rope_type']!r}, expected 'default': llama.cpp's "
                "DFlash network takes no frequency factors, which Llama 3.1's scaling needs, and other scalings were "
                "not tested; serve this drafter with vLLM, SGLang or transformers"
            )
        return super().fault(spec)

    def target_fault(self, kind: str) -> str:
        """See `Engine`; also for the architecture of a GGUF file."""
        if kind in SUPPORTED_TARGETS:
            return ""
        return (
            f"the target is a {kind}, of which llama.cpp (b11549) hands out no inputs of layers: it ends its process "
            "at the first request; use `dpace generate`, or serve this drafter with vLLM, SGLang or transformers"
        )

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """See `Engine`; drafters whose blocks begin at the anchor run as DSpark's, with its head or without."""
        file = shlex.quote(drafter) if drafter.endswith(".gguf") else "DRAFTER.gguf"
        model = shlex.quote(target) if target.endswith(".gguf") else "TARGET.gguf"
        kind = kind_of(spec)
        count = spec.num_draft_tokens
        return f"llama-server -m {model} -md {file} --spec-type draft-{kind} --spec-draft-n-max {count}"

    def cast(self, tensor: Tensor, dtype: str) -> Tensor:
        """See `Engine`; llama.cpp needs all but matrices in float32."""
        return super().cast(tensor, dtype if tensor.dim() == 2 else "float32")

    def write(self, folder: Path, drafter: Drafter, config: ExportConfig, target: Target) -> Path:
        """See `Engine`; llama.cpp and Unsloth's studio find the file by the two ends of its name."""
        kind = kind_of(drafter.spec)
        name = Path(config.served_target).resolve().name.removesuffix(".gguf")
        precision = TENSOR_TYPES[getattr(torch, config.dtype)].name
        path = folder / f"{kind}-{name}-{precision}.gguf"
        write_gguf(path, drafter, str(config.served_gguf))
        return path

    def is_written(self, path: Path) -> bool:
        """See `Engine`."""
        return path.suffix == ".gguf"

    def read(self, path: Path, num_target_layers: int | None) -> tuple[DrafterSpec, dict[str, Tensor]]:
        """See `Engine`; weights that `gguf` cannot read are refused too."""
        reader, fields = open_gguf(path)
        architecture = fields.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise ValueError(
                f"{path} has architecture {architecture!r}, expected {ARCHITECTURE!r}; name a DFlash drafter's file"
            )
        if num_target_layers is None:
            raise ValueError(f"{path} does not say how many layers the target has; name the target with --target")
        with translate_library_errors(f"the GGUF file {path}", GET_AGAIN):
            tensors = {
                tensor.name: from_gguf(tensor.data, tensor.tensor_type).reshape(tensor.shape.tolist()[::-1])
                for tensor in reader.tensors
            }
            if "markov_w1.weight" in tensors:  # other writers do not say its rank
                fields[f"{ARCHITECTURE}.markov_rank"] = tensors["markov_w1.weight"].shape[1]
            values = _read_values(fields) | {
                "num_target_layers": num_target_layers,
                "draft_vocab_size": len(tensors.get("d2t", ())),
                "has_own_embed_tokens": "token_embd.weight" in tensors,
                "has_own_lm_head": "output.weight" in tensors and "d2t" not in tensors,
            }
            spec = DrafterSpec.from_values(values)
        if "d2t" in tensors:  # the tokens themselves here
            tensors["d2t"] -= torch.arange(len(tensors["d2t"]))
        names = {gguf_name(ours): ours for ours in spec.shapes}
        return spec, {names.get(name, name): tensor for name, tensor in tensors.items()}


def kind_of(spec: DrafterSpec) -> str:
    """Return what llama.cpp calls the kind of a drafter, in its command and in names of files."""
    return "dspark" if spec.sample_from_anchor else spec.method


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    of_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return TENSOR_NAMES[name] if of_layer is None else f"blk.{of_layer[1]}.{LAYER_NAMES[of_layer[2]]}"


def to_gguf(tensor: Tensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Return the bytes of a tensor for the file, and their type."""
    tensor = tensor.detach().cpu().contiguous()
    # numpy has no bf16: gguf takes its bytes, as those of blocks
    data = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
    return data.numpy(), TENSOR_TYPES[tensor.dtype]


def from_gguf(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> Tensor:
    """Return the tensor of such bytes, bit for bit; quantized ones become the numbers that they stand for, in fp32."""
    if kind in DTYPES:
        return torch.from_numpy(np.array(data)).view(DTYPES[kind])
    return torch.from_numpy(gguf.quants.dequantize(data, kind))


def open_target_gguf(path: str | Path, spec: DrafterSpec) -> gguf.GGUFReader:
    """Open a GGUF file of a drafter's target.

    Raises:
        ValueError: it is damaged or of another model.
        OSError: there is no such file.
    """
    refuse_endless(path, "a GGUF file of the target")
    reader, values = open_gguf(path)

    def size(name: str) -> int:
        return values.get(f"{values.get('general.architecture')}.{name}", 0)

    num_layers = size("block_count") - size("nextn_predict_layers")  # whose layers draft for the target itself
    found = [num_layers, size("embedding_length"), len(values.get("tokenizer.ggml.tokens", ()))]
    expected = [spec.num_target_layers, spec.hidden_size, spec.vocab_size]
    if found != expected:
        raise ValueError(
            f"{path} has {found} and the drafter's target {expected} (layers, hidden size, tokens); name a GGUF "
            "file of that target with --target-gguf"
        )
    return reader


def write_gguf(path: Path, drafter: Drafter, target_gguf: str | Path) -> None:
    """Write a drafter for llama.cpp.

    Args:
        path: of the new file.
        drafter: matrices in float32, float16 or bfloat16; all other tensors in float32.
        target_gguf: any GGUF file of the target; the drafter's file repeats its tokenizer.

    Raises:
        ValueError: see `open_target_gguf`.
    """
    spec = drafter.spec
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, field in open_target_gguf(target_gguf, spec).fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.ggml.mask_token_id":
            copy_field(writer, field)
    _add_values(writer, spec)
    kinds = {}
    for name, tensor in drafter.state_dict().items():
        if name == "d2t":
            tensor = drafted_tokens(tensor, spec.vocab_size)
        data, kinds[name] = to_gguf(tensor)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kinds[name])
    mostly = kinds["fc.weight"].name
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if mostly == "F32" else f"MOSTLY_{mostly}"])
    write_file(writer)


def copy_field(writer: gguf.GGUFWriter, field: gguf.ReaderField) -> None:
    """Copy a metadata field."""
    sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)


def write_file(writer: gguf.GGUFWriter) -> None:
    """Write what was added, and close the file."""
    with contextlib.closing(writer):  # also where the disk is full
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add_values(writer: gguf.GGUFWriter, spec: DrafterSpec) -> None:
    """Add the metadata.

    The file numbers the target's layers by their input, so one higher than here.
    """
    config = spec.config()
    values = {
        **{name: getattr(config, published, None) for published, name in FIELDS.items()},
        **spec.network_keys,
        "attention.value_length": spec.head_dim,
        "rope.freq_base": spec.rope_parameters["rope_theta"],
        "attention.causal": spec.is_causal,
        "sample_from_anchor": spec.sample_from_anchor,
        "has_confidence_head": False,
    }
    kinds = gguf.GGUFValueType
    types = {int: kinds.UINT32, float: kinds.FLOAT32, bool: kinds.BOOL}
    for name, value in values.items():
        if value is not None:
            writer.add_key_value(f"{ARCHITECTURE}.{name}", value, types[type(value)])
    if spec.sliding_window is not None:
        pattern = [kind == "sliding_attention" for kind in spec.layer_types]
        writer.add_array(f"{ARCHITECTURE}.attention.sliding_window_pattern", pattern)
    writer.add_key_value(f"{ARCHITECTURE}.target_layers", spec.hidden_state_ids, kinds.ARRAY, kinds.INT32)
    writer.add_uint32("tokenizer.ggml.mask_token_id", spec.mask_token_id)
    writer.add_string(RECORD_KEY, json.dumps({"dpace": spec.record}))


def _read_values(fields: JsonObject) -> JsonObject:
    """Return what the metadata says of a drafter, by published names."""

    def get(name: str) -> Any:
        return fields.get(f"{ARCHITECTURE}.{name}")

    pattern = get("attention.sliding_window_pattern")
    if get("attention.sliding_window") and not isinstance(pattern, list):
        raise ValueError("it has a sliding window, and no list that says which layers have it")
    if get("rope.scaling.type") not in (None, "none"):
        raise ValueError(f"its rope.scaling.type is {get('rope.scaling.type')!r:.50}, which is not read")
    return {
        **json.loads(fields.get(RECORD_KEY, "{}")),
        **{published: get(name) or None for published, name in FIELDS.items()},
        **{name: get(name) for name in (*LAYER_SIZES, "sample_from_anchor")},
        "selector": read_sizes({}, {name: get(name) for name in ("selector_rank", "selector_top_k", "markov_rank")}),
        "mask_token_id": fields.get("tokenizer.ggml.mask_token_id"),
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
        "rope_parameters": {"rope_type": "default", "rope_theta": get("rope.freq_base")},
        "layer_types": ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern or ()],
        "is_causal": get("attention.causal"),
        "target_layer_ids": to_layer_ids(get("target_layers")),
    }


ENGINE = Gguf()
