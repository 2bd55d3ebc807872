"""Read a target's files: weights and tokenizer, also quantized, over several devices or ranks, or as a LoRA adapter.

In goes a folder or Hub id; out come a transformers model and its tokenizer, or a refusal in one line. transformers
reads the files; where the weights are spread over the ranks of a training, each rank reads its own share of each
tensor, and the tables of the embedding and of the LM head are whole on each rank: the drafter's own steps need them.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from dpace.config import DeviceMap, TargetShard
from dpace.system import ranks
from dpace.system.ledger import read_object, refuse_endless
from dpace.system.loading import attention_of, refuse_infinite, refuse_mismatch, translate_library_errors
from dpace.system.progress import quoted
from dpace.target.locate import find_target
from dpace.target.probe import find_layers

FIX = "download or copy the target again"


class TargetFiles(NamedTuple):
    """Where the parts of a target are."""

    config: Any
    """Config of the base."""
    base: str
    """Folder or Hub id of config and weights; of a GGUF file the folder that was made of it."""
    adapter: Path | None
    """Folder of the LoRA adapter that is merged into them."""
    tokenizer: str


def find_target_files(name: str) -> TargetFiles:
    """Find a target, read its config, and find base and adapter where it is an adapter.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: the same, also a generation config that is not JSON, which transformers leaves out in silence; an
            adapter that is not LoRA's, or whose base is not named or not found; or see `find_target`.
    """
    place = find_target(name)
    folder = find_adapter(place)
    base = place if folder is None else _find_base(folder)
    for place in filter(None, (base, folder)):
        for file in Path(place).glob("*.safetensors"):
            refuse_endless(file, "a target with files of weights")
    with translate_library_errors(f"the target {name if folder is None else base}", FIX):
        generation = cached_file(base, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if generation is not None:
        read_object(Path(generation), FIX)
    tokenizer = base
    if folder is not None and (folder / "tokenizer_config.json").exists():
        tokenizer = str(folder)
    return TargetFiles(config, base, folder, tokenizer)


def count_layers(target: str) -> int:
    """Read how many layers a target has; see `find_target_files`."""
    return find_target_files(target).config.get_text_config(decoder=True).num_hidden_layers


def find_adapter(name: str) -> Path | None:
    """Find the folder of an adapter; None where there is none, or a folder that also has whole weights."""
    if find_adapter_config_file(name) is None:
        return None
    folder = Path(name)
    if folder.is_dir():
        return None if any(folder.glob("model*.safetensors")) else folder
    allowed = ["adapter_*.json", "adapter_*.safetensors", "*token*", "vocab*", "merges.txt", "*.jinja"]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=allowed))


def _find_base(folder: Path) -> str:
    """Find the model that the adapter in a folder was trained for."""
    settings = read_object(folder / "adapter_config.json", FIX)
    kind = settings.get("peft_type")
    base = settings.get("base_model_name_or_path")
    if kind != "LORA" or not base:
        raise ValueError(
            f"{folder} is an adapter of kind {quoted(kind)} with base {quoted(base)}, expected LORA and the name of a "
            "model; merge it yourself, and name the merged model"
        )
    with translate_library_errors(f"the base of the adapter {folder}", "download it, or name a merged model"):
        return find_target(base)


def read_tokenizer(name: str, files: TargetFiles) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a target."""
    with translate_library_errors(f"the target {name}", FIX):
        return AutoTokenizer.from_pretrained(files.tokenizer, trust_remote_code=False)


def full_name(name: str) -> str:
    """Return a Hub id, the full path of a folder, or the name of a GGUF file."""
    path = Path(name)
    if path.is_file():
        return path.name
    return str(path.resolve()) if name and path.is_dir() else name


def auto_class(config: Any) -> Any:
    """Return transformers' auto class of a causal LM, or of a model for images and text; None where it has neither."""
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in classes if type(config) in auto._model_mapping), None)


def open_target(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap,
    shard: TargetShard,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a target's model and tokenizer; quantized weights keep their dtype, and no code of a checkpoint is run.

    Raises:
        OSError: there is no readable model of that name.
        ValueError: weights that are missing, in other shapes, or not finite; a class that transformers does not have; a
            package that is missing; GPUs without room for all layers; see `find_target_files`.
        ImportError: the target is an adapter, and peft is missing.
    """
    what = f"the target {name}"
    files = find_target_files(name)
    config = files.config
    is_quantized = getattr(config, "quantization_config", None) is not None
    _refuse_kind(what, files, device_map, shard)
    tokenizer = read_tokenizer(name, files)
    spread: Any = device_map
    if is_quantized and not device_map:
        spread = {"": device}  # quantized weights are put there as they are read
    config.transformers_weights = None  # may name a pickle
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else the Hub's bot converts one, and its proposal is loaded
    auto = auto_class(config)
    config._attn_implementation = attention_of(auto._model_mapping[type(config)])
    over_ranks = plan_distribution(shard, auto, config)
    with translate_library_errors(what, f"{FIX}, or install what it needs"):
        loaded: Any = auto.from_pretrained(
            files.base,
            config=config,
            dtype=dtype,
            device_map=spread,
            distributed_config=over_ranks,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    model, info = loaded
    refuse_mismatch(what, info, FIX)
    _refuse_offloaded(what, model)
    refuse_infinite(what, model, FIX)
    if files.adapter:
        model = _merge_adapter(what, model, files.adapter)
    model.config._name_or_path = full_name(name)  # also of a file, in place of the folder that was made of it
    if not spread and not over_ranks:
        model = model.to(device)
    return model, tokenizer


def _refuse_kind(what: str, files: TargetFiles, device_map: DeviceMap, shard: TargetShard) -> None:
    """Refuse a target that cannot be loaded in the way that is asked for, before it is read.

    Raises:
        ValueError: names the reason and what to do.
    """
    quantized = getattr(files.config, "quantization_config", None)
    if quantized is not None and not AutoHfQuantizer.supports_quant_method(quantized):
        raise ValueError(
            f"{what} is quantized in a way that transformers does not have (quantization_config: {quoted(quantized)}); "
            "update transformers, or name the model that is not quantized"
        )
    if device_map and ranks.num_ranks() > 1:
        raise ValueError(
            "--device-map auto gives one process all GPUs, and torchrun starts several; start one process, or leave "
            "--device-map out"
        )
    if quantized is not None and files.adapter:
        raise ValueError(
            f"{what} is an adapter of {files.base}, whose weights are quantized; merging would round them anew: merge "
            "it into the model before it was quantized, and name the merged model"
        )
    if auto_class(files.config) is None:
        raise ValueError(
            f"{what} is of the kind {files.config.model_type}, which transformers has no decoder for; name a causal "
            "LM, or a model for images and text"
        )
    if shard != "none" and (quantized is not None or files.adapter or device_map):
        raise ValueError(
            f"--train.target-shard {shard} spreads plain weights only, and {what} is quantized, an adapter, or spread "
            "by --device-map; leave one of them out"
        )


def _refuse_offloaded(what: str, model: Any) -> None:
    """Refuse a model that was put on GPUs in part only, whose other layers would be copied in at every step.

    Raises:
        ValueError: names the places of its layers.
    """
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"{what} does not fit into the GPUs: its parts would be on {', '.join(sorted(map(str, places)))}; use more "
            "GPUs, or a quantized target"
        )


def _merge_adapter(what: str, model: Any, folder: Path) -> Any:
    """Add a LoRA adapter to the weights of its base.

    Raises:
        ValueError: the adapter does not fit, or cannot be merged.
        ImportError: peft is missing.
    """
    import peft  # pyright: ignore[reportMissingImports]

    with translate_library_errors(what, "train the adapter for this base, without what cannot be merged"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        adapted: Any = peft.PeftModel(model, config)
        unmatched = peft.set_peft_model_state_dict(adapted, load_file(folder / "adapter_model.safetensors"))
        merged = adapted.merge_and_unload()
    missing = [key for key in unmatched.missing_keys if "lora_" in key]
    refuse_mismatch(what, {"missing_keys": missing, "mismatched_keys": ()}, FIX, unknown=unmatched.unexpected_keys)
    tables = [name for name in adapted.targeted_module_names if name.endswith(("lm_head", "embed_tokens"))]
    if tables and model.config.get_text_config(decoder=True).tie_word_embeddings:
        raise ValueError(
            f"{what} is a LoRA adapter that changes {tables[0]}, which embedding and head share, so both would "
            "change; untie them when training, or name a merged model"
        )
    refuse_infinite(what, merged, FIX)
    return merged


def plan_distribution(shard: TargetShard, model_class: Any, config: Any) -> DistributedConfig | None:
    """Plan how `from_pretrained` spreads a model over the ranks; None where a rank has all of it.

    Args:
        shard: `fsdp` gathers a decoder layer where it runs and frees it afterwards.
        model_class: an auto class of transformers.
        config: of the model.
    """
    num_ranks = ranks.num_ranks()
    if shard == "none" or num_ranks == 1:
        return None
    ranks.barrier()  # joins the group, with the backend of this machine
    with torch.device("meta"):
        model = model_class.from_config(config)
    layers = find_layers(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    return DistributedConfig(fsdp_size=num_ranks, fsdp_plan={f"{name}.*": "free_full_weight"})


def gather_tables(model: Any) -> None:
    """Gather all but the decoder layers, and let them stay whole.

    The model's `state_dict` must not be asked for afterwards: it shards them again.
    """
    model.requires_grad_(False)
    inside = set(find_layers(model).modules())
    for module in model.modules():
        if isinstance(module, FSDPModule) and module not in inside:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
