"""Versions, hardware and hashes that belong to a measured number."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dpace


def find_versions() -> dict[str, str]:
    """Give the versions of dpace, torch, transformers and Python."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"dpace": dpace.__version__, **packages, "python": platform.python_version()}


def find_hardware(device: torch.device) -> dict[str, Any]:
    """Name the device, and count the processor's cores and torch's threads."""
    is_cpu = device.type == "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else find_processor()
    return {
        "device": name if is_cpu or device.type == "cuda" else f"{device.type}, {name}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def find_processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def hash_json(value: Any) -> str:
    """Hash a value that JSON can hold: sha256, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
