"""The device that computes: a CPU, or whatever accelerator torch knows (CUDA, ROCm, XPU, MPS)."""

import os
import platform
from pathlib import Path

import torch

from dpace.config import Device

TILED = ("cuda", "xpu")
"""Types of device with a kernel of `flex_attention` that has a backward pass; `cuda` is ROCm too."""


def find_device(name: Device = "auto") -> torch.device:
    """Choose the device to compute on.

    Args:
        name: `auto` is the accelerator where there is one, else the CPU. Of several devices of a kind it is the one
            of this process (`LOCAL_RANK` under torchrun), else the first.

    Raises:
        ValueError: torch has no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    kind = kinds[0] if name == "auto" else name
    if kind not in kinds:
        raise ValueError(f"torch {torch.__version__} finds no {kind} here; choose one of: auto, {', '.join(kinds)}")
    if kind == "cpu":
        return torch.device(kind)
    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.accelerator.device_count()
    if index >= count:
        raise ValueError(f"LOCAL_RANK is {index}, and torch finds {count} {kind} here; start one process for each")
    return torch.device(kind, index)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a target's weights: bf16, and fp32 on a CPU.

    In fp32 texts are equal token for token.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as configs have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return the name of the device as its maker does."""
    if device.type == "cpu":
        return processor_name()
    module = torch.get_device_module(device)
    # torch.mps has no such function: there the GPU is a part of the processor.
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else processor_name()
    return name if device.type == "cuda" else f"{device.type}, {name}"


def processor_name() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()  # such as arm64, where the system is not Linux or tells no name
