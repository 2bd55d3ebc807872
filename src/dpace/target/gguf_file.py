"""Make a target of the GGUF file that llama.cpp serves.

In goes the file; out comes a folder that transformers loads. Its weights are the numbers that the quantized blocks of
the file stand for, so answers, hidden states and tau are those of the file. transformers reads the file. It leaves out
in silence what it does not know; here such a file is refused.
"""

import functools
import math
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub.utils import WeakFileLock
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

from dpace.system.ledger import JsonObject, filling, remove_unfinished
from dpace.system.loading import quiet_library, refuse_infinite, refuse_mismatch, translate_library_errors
from dpace.system.progress import describe_error, note, quoted
from dpace.system.provenance import hash_file

GET_AGAIN = "write or download the file again, or name one in another precision"
NAME_UNQUANTIZED = "name the folder or Hub id of the model that is not quantized"
SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""llama.cpp's and transformers' names of settings that transformers 5.24 does not take over for all architectures."""
SAME_AS_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Sizes that its networks take to be those of a head."""
GPT2_SPLITS = ("default", "gpt-2", "gpt2", "smollm")
"""Pre-tokenizers that split as GPT-2's does, so far as the merges of their vocabularies tell."""
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Llama 3.1, 3.2 and 3.3 have; a GGUF file only has the factors that follow from it."""


def read_header(path: Path) -> tuple[JsonObject, GgufHeader]:
    """Read the metadata of a GGUF file, and where its tensors are; of a list of texts only the length is read.

    Raises:
        ValueError: the file is damaged, or has weights of a kind that transformers does not read.
        OSError: it cannot be read.
    """
    with translate_library_errors(f"the GGUF file {path}", GET_AGAIN):
        try:
            values, _ = read_gguf_metadata(str(path))
            header = GgufHeader.from_file(str(path))
        except struct.error as error:
            raise ValueError(f"it ends too early ({error})") from error
        num_bytes = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
        if num_bytes > path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size} bytes, and its tensors end at byte {num_bytes}")
    return values, header


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
    folder = cache / f"{path.stem}-{hash_file(path)[:16]}"
    if (folder / "config.json").exists():
        return str(folder)
    num_weights = _refuse_unreadable(path)
    cache.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache.with_suffix(".lock")):  # one at a time, since each needs much memory
        if not (folder / "config.json").exists():  # another process may have made it meanwhile
            gib = 4 * num_weights / 2**30
            note(
                f"first use of {path.name}: its {num_weights / 1e6:,.0f} million weights are written to {folder}, "
                f"{gib:.1f} GiB, with {2 * gib:.1f} GiB of memory"
            )
            dequantize(path, folder)
    return str(folder)


def _refuse_unreadable(path: Path) -> int:
    """Refuse what is no whole file of a target, or has what transformers does not read; return its number of weights.

    Raises:
        ValueError: names what was found, and what to do.
    """
    values, header = read_header(path)
    architecture = str(values.get("general.architecture"))  # a damaged file may have a list
    fault = ""
    if values.get("split.count", 1) not in (0, 1):
        fault = "is one part of a split file; join the parts with llama-gguf-split --merge"
    elif architecture not in GGUF_CONFIG_ARCHS and _settings_read(architecture) is None:
        fault = (
            f"has the architecture {quoted(architecture)}, which transformers does not read from GGUF files; "
            f"{NAME_UNQUANTIZED}, or a drafter with --drafter"
        )
    elif "tokenizer.ggml.tokens" not in values:
        fault = f"has no tokenizer; {GET_AGAIN}"
    if fault:
        raise ValueError(f"{path} {fault}")
    if "tokenizer.chat_template" not in values:
        note(f"{path.name} has no chat template: messages are encoded as they are, one on each line")
    split = values.get("tokenizer.ggml.pre", "default")
    if values.get("tokenizer.ggml.model") == "gpt2" and split not in (*GPT2_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS):
        note(f"{path.name} splits text as {quoted(split)}, which transformers does not have: it splits as GPT-2 does")
    return sum(math.prod(tensor.shape) for tensor in header.tensors)


def _settings_read(architecture: str) -> JsonObject | None:
    """Return the settings of an architecture that transformers' older reader takes over; None where it has none."""
    plain_name = architecture.replace("-", "").replace("_", "")
    for name, settings in GGUF_TO_TRANSFORMERS_MAPPING["config"].items():
        if name.replace("_", "") == plain_name:
            return settings
    return None


@contextmanager
def _reading_once() -> Iterator[None]:
    """Let transformers read a file's metadata once, and llama.cpp's names of weights.

    Without it both are read again for config, weights and tokenizer, and the names for each module of the network:
    most of the time of a first use.
    """
    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, kept)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


@_reading_once()
def dequantize(path: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights, tokenizer and chat template of a GGUF file as a folder of transformers.

    Args:
        path: the file.
        folder: is written all or nothing; the caller holds its lock.
        dtype: of the weights; by default the narrowest that holds them all exactly.

    Raises:
        ValueError: transformers cannot read the file, or would leave out a setting or weights of it.
    """
    values, header = read_header(path)
    what = f"the GGUF file {path}"
    with translate_library_errors(what, GET_AGAIN):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    _complete_config(config, values, header)
    with (
        torch.device("cpu"),
        translate_library_errors(what, GET_AGAIN),
    ):  # also where the caller's models have no values
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = _read_tokenizer(path)
    quantized, info = loaded
    refuse_mismatch(what, info, GET_AGAIN)
    refuse_infinite(what, quantized, GET_AGAIN)
    _refuse_left_out(header, quantized)
    with torch.device("meta"):  # a fresh one, since what was quantized refuses to be saved
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()  # a table that embedding and head share is written once
    model.to(dtype or _exact_dtype(model.state_dict().values()))
    model.generation_config.eos_token_id = _stop_tokens(values)
    remove_unfinished(folder)  # what killed processes left
    with filling(folder) as aside, quiet_library():
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def _read_tokenizer(path: Path) -> Any:
    """Read the tokenizer of a GGUF file.

    Raises:
        ValueError: its vocabulary, merges or special tokens do not fit one another.
    """
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"its tokenizer is damaged ({describe_error(error)})") from error


def _complete_config(config: Any, values: JsonObject, header: GgufHeader) -> None:
    """Add the settings that transformers leaves out, and refuse those that nobody reads.

    Raises:
        ValueError: names the setting.
    """
    architecture = values["general.architecture"]
    known = _settings_read(architecture)
    if architecture in GGUF_CONFIG_ARCHS or known is None:
        return  # transformers' newer reader takes over all settings
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
                f"{header.path} sets {name} to {quoted(value)}, which transformers does not read; {NAME_UNQUANTIZED}"
            )
    for name, tensor in load_gguf_state_dict(header).items():
        if name.startswith("rope_"):
            _set_scaling(config, header.path, tensor[...], head_dim)


def _set_scaling(config: Any, path: str, factors: Tensor, head_dim: int) -> None:
    """Find the scaled rotary embedding of Llama 3.1 from its factors of wavelengths.

    Source: `set_gguf_parameters` of Llama in llama.cpp's `conversion/llama.py`.

    Raises:
        ValueError: they are of another scaling.
    """
    scaling = LLAMA3_SCALING | {"factor": float(factors.max())}
    wavelengths = 2 * math.pi * config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    num_waves = scaling["original_max_position_embeddings"] / wavelengths  # in a text of the first length
    # 0 where a wave is long and is stretched by the whole factor, 1 where it is short and stays
    share = ((num_waves - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / scaling["factor"] + share)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{path} scales its rotary embedding in a way that is not Llama 3.1's; {NAME_UNQUANTIZED}")
    config.rope_parameters = config.rope_parameters | scaling


def _refuse_left_out(header: GgufHeader, model: Any) -> None:
    """Refuse a file with more weights than the model has, such as biases that its class does not know.

    Raises:
        ValueError: names both numbers.
    """
    num_layers = model.config.num_hidden_layers
    num_in_file = 0
    for tensor in header.tensors:
        part, _, rest = tensor.name.partition(".")
        layer = rest.partition(".")[0]
        # factors of the rotary embedding are in the config; later layers draft for the target itself
        if not part.startswith("rope_") and not (part == "blk" and int(layer) >= num_layers):
            num_in_file += math.prod(tensor.shape)
    num_in_model = sum(parameter.numel() for parameter in model.parameters())
    if num_in_file != num_in_model:
        raise ValueError(
            f"{header.path} has {num_in_file:,} weights, and the model that transformers makes of it {num_in_model:,}; "
            f"{NAME_UNQUANTIZED}"
        )


def _exact_dtype(tensors: Collection[Tensor]) -> torch.dtype:
    """Return the narrowest dtype in which no number of these tensors is rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in tensors):
            return dtype
    return torch.float32


def _stop_tokens(values: JsonObject) -> list[int]:
    """Return the tokens that end a text, and those that end a turn."""
    tokens = []
    for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        if name in values and values[name] not in tokens:
            tokens.append(values[name])
    return tokens
