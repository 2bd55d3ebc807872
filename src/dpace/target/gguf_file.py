"""Make a target of the GGUF file that llama.cpp serves.

In goes the file; out comes a folder that transformers loads. Its weights are the numbers that the quantized blocks of
the file stand for, so answers, hidden states and tau are those of the file. transformers reads the file. It leaves out
in silence what it does not know; here such a file is refused.
"""

import functools
import math
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpace.system.ledger import JsonObject, filling, remove_unfinished
from dpace.system.loading import quiet_library, refuse_infinite, refuse_mismatch, translate_library_errors
from dpace.system.progress import note, quoted
from dpace.system.provenance import hash_file
from dpace.target.gguf_tokenizer import NAME_UNQUANTIZED, read_tokenizer, stop_tokens

GET_AGAIN = "write or download the file again, or name one in another precision"
SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""llama.cpp's and transformers' names of settings that transformers 5.24 does not take over for all architectures."""
SETTINGS_READ = {name.replace("_", ""): read for name, read in GGUF_TO_TRANSFORMERS_MAPPING["config"].items()}
"""Settings that transformers' older reader takes over, by architecture; its newer one takes all."""
SAME_AS_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Sizes that its networks take to be those of a head."""
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Llama 3.1, 3.2 and 3.3 have; a GGUF file only has the factors that follow from it."""


class _StrictReader(gguf.GGUFReader):
    """A reader that ends at the end of the file; gguf's own takes numbers after it as empty ones."""

    def _get(
        self, offset: int | np.integer, dtype: Any, count: int | np.integer = 1, override_order: Any = None
    ) -> Any:
        found = super()._get(int(offset), dtype, int(count), override_order)
        if len(found) < count:
            raise ValueError(f"{count} numbers at byte {offset} are past the end of the file")
        return found


def open_gguf(path: str | Path) -> tuple[gguf.GGUFReader, JsonObject]:
    """Open a GGUF file, and read its metadata; what llama.cpp refuses is refused here too.

    Raises:
        ValueError: the file is damaged, or one part of a split file; its tensors do not follow one another, are of
            another number of layers than it says, or have a rotary embedding that is none.
        OSError: there is no such file.
    """
    with translate_library_errors(f"the GGUF file {path}", GET_AGAIN), warnings.catch_warnings(action="ignore"):
        reader = _StrictReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        if values.get("split.count", 1) > 1:
            raise ValueError("it is one part of a split file; join the parts with llama-gguf-split --merge")
        end = reader.data_offset
        layers = set()
        for tensor in reader.tensors:
            if tensor.data_offset != end:
                raise ValueError(f"{tensor.name} begins at byte {tensor.data_offset}, expected {end}")
            end += tensor.n_bytes + -tensor.n_bytes % int(reader.alignment)
            layers.update(re.findall(r"^blk\.\d+", tensor.name))
        prefix = values.get("general.architecture")
        block_count = values.get(f"{prefix}.block_count")
        if len(layers) != block_count:
            raise ValueError(f"it has {len(layers)} layers, and its block_count is {block_count}")
        base = values.get(f"{prefix}.rope.freq_base", 1.0)
        if not 0 < base < math.inf:
            raise ValueError(f"its rope.freq_base is {base}, expected a positive number")
        return reader, values


@functools.cache  # a process hashes a file once
def find_gguf_target(path: Path, cache: Path) -> str:
    """Find the folder of a GGUF file's weights, and make it at the first use.

    The folder is named by the hash of the file, so each file is dequantized once. Its weights are in the narrowest
    dtype that holds all values of the file: fp32 for quantized blocks.

    Memory at the first use: about 8 bytes a weight. Disk: 2 or 4 bytes a weight. Later uses read the file once, for
    its hash.

    Args:
        path: the file.
        cache: folder in which such folders are kept.

    Raises:
        ValueError: the file is damaged, in parts, or has no tokenizer; transformers does not read its
            architecture or one of its settings.
        OSError: it cannot be read, or the disk is too small.
    """
    digest = hash_file(path)
    folder = cache / f"{path.stem}-{digest[:16]}"
    made = folder / "config.json"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(cache.with_suffix(".lock")):  # one at a time, since each needs much memory
            if not made.exists():  # another process may have made it meanwhile
                dequantize(path, folder, digest)
    return str(folder)


@contextmanager
def _reading_once(reader: gguf.GGUFReader) -> Iterator[None]:
    """Let transformers take a file that is open already, and read llama.cpp's names of weights once.

    Without it the file is read again for config, weights and tokenizer, and the names for each module of the network:
    most of the time of a first use.
    """
    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (lambda _path: reader), functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


def dequantize(path: Path, folder: Path, digest: str, dtype: torch.dtype | None = None) -> None:
    """Write weights, tokenizer and chat template of a GGUF file as a folder of transformers.

    Args:
        path: the file.
        folder: is written all or nothing; the caller holds its lock.
        digest: hash of the file, which must not change meanwhile.
        dtype: of the weights; by default the narrowest that holds them all exactly.

    Raises:
        ValueError: the file is damaged, changes, or is in parts; transformers cannot read it, or would leave out a
            setting or weights of it.
    """
    reader, values = open_gguf(path)
    architecture = values["general.architecture"]
    if architecture not in GGUF_CONFIG_ARCHS and architecture.replace("-", "") not in SETTINGS_READ:
        raise ValueError(
            f"{path} has the architecture {quoted(architecture)}, which transformers does not read from GGUF files; "
            f"{NAME_UNQUANTIZED}, or a drafter with --drafter"
        )
    tokenizer = read_tokenizer(path)
    gib = 4 * sum(tensor.n_elements for tensor in reader.tensors) / 2**30
    note(f"first use of {path.name}: its weights are written to {folder}, {gib:.1f} GiB, with {2 * gib:.1f} of memory")
    if "tokenizer.chat_template" not in values:
        note(f"{path.name} has no chat template: messages are encoded as they are, one on each line")
    what = f"the GGUF file {path}"
    with _reading_once(reader):
        with translate_library_errors(what, GET_AGAIN):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        _complete_config(config, path, reader, values)
        # On the CPU, also where the caller's models have no values.
        with torch.device("cpu"), translate_library_errors(what, GET_AGAIN):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                trust_remote_code=False,
                output_loading_info=True,
            )
    quantized, info = loaded
    refuse_mismatch(what, info, GET_AGAIN)
    refuse_infinite(what, quantized, GET_AGAIN)
    _refuse_left_out(path, reader, quantized)
    with torch.device("meta"):  # a fresh one, since what was quantized refuses to be saved
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()  # a table that embedding and head share is written once
    model.to(dtype or _exact_dtype(model.state_dict().values()))
    model.generation_config.eos_token_id = stop_tokens(values)
    remove_unfinished(folder)  # what killed processes left
    with filling(folder) as aside, quiet_library():
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if hash_file(path) != digest:
            raise ValueError(f"{path} was changed while it was read; run the same command again")


def _complete_config(config: Any, path: Path, reader: gguf.GGUFReader, values: JsonObject) -> None:
    """Add the settings that transformers leaves out, and refuse those that nobody reads.

    Raises:
        ValueError: names the setting.
    """
    architecture = values["general.architecture"]
    if architecture in GGUF_CONFIG_ARCHS:
        return  # transformers' newer reader takes over all settings
    known = SETTINGS_READ[architecture.replace("-", "")]
    unread = {}
    for key, value in values.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and known.get(name) is None:
            unread[name] = value
    for name, config_name in SETTINGS.items():
        if name in unread and hasattr(config, config_name):
            setattr(config, config_name, unread.pop(name))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_scaled = unread.get("rope.scaling.type", "none") != "none" and architecture != "gpt-oss"
    for name, value in unread.items():
        is_head = name in SAME_AS_HEAD and value == head_dim
        is_unused = not value or (name.startswith("rope.scaling.") and not is_scaled)
        if not is_head and not is_unused:
            raise ValueError(
                f"{path} sets {name} to {quoted(value)}, which transformers does not read; {NAME_UNQUANTIZED}"
            )
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_"):
            _set_scaling(config, path, torch.tensor(tensor.data))


def _set_scaling(config: Any, path: Path, factors: Tensor) -> None:
    """Find the scaled rotary embedding of Llama 3.1 from its factors of wavelengths.

    Source: `set_gguf_parameters` of Llama in llama.cpp's `conversion/llama.py`.

    Raises:
        ValueError: they are of another scaling.
    """
    config.rope_parameters |= LLAMA3_SCALING | {"factor": float(factors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    inverse = config.rope_parameters["rope_theta"] ** (torch.arange(len(scaled)) / len(scaled))
    expected = 1 / (inverse * scaled)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{path} scales its rotary embedding in a way that is not Llama 3.1's; {NAME_UNQUANTIZED}")


def _refuse_left_out(path: Path, reader: gguf.GGUFReader, model: Any) -> None:
    """Refuse a file with more weights than the model has, such as biases that its class does not know.

    Raises:
        ValueError: names both numbers.
    """
    # factors of the rotary embedding are in the config; later layers draft for the target itself
    later = range(model.config.num_hidden_layers, len(reader.tensors))
    others = ("rope_", *(f"blk.{layer}." for layer in later))
    num_in_file = sum(tensor.n_elements for tensor in reader.tensors if not tensor.name.startswith(others))
    num_in_model = model.num_parameters()
    if num_in_file != num_in_model:
        raise ValueError(
            f"{path} has {num_in_file:,} weights, and the model that transformers makes of it {num_in_model:,}; "
            f"{NAME_UNQUANTIZED}"
        )


def _exact_dtype(tensors: Collection[Tensor]) -> torch.dtype:
    """Return the narrowest dtype in which no number of these tensors is rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in tensors):
            return dtype
    return torch.float32
