"""Drafters of several kinds that accept something, and their exports."""

import shutil
from pathlib import Path

import pytest
import torch

from dpace.engines.engine import Request
from dpace.engines.export import Exported, export
from tests.conftest import make_drafter
from tests.support.files import change_config

WINDOWS = {
    "windows": {"sliding_window": 8},
    "causal windows": {"sliding_window": 8, "causal": True},
    "mixed layers": {"sliding_window": 8, "full_layers": (1,)},
    "causal": {"causal": True},
}
KINDS = {"random": {}, "trained": {}, "convolutions": {"conv_kernel_size": 2}, **WINDOWS}
"""Options of each kind; all but the first have the weights of one training, in which there were none of them."""


@pytest.fixture(scope="session")
def folders(language_drafter, language_target, tmp_path_factory) -> dict[str, Path]:
    """A drafter of each kind, in fp32 and with values that 16 bits change."""
    made = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    for kind, options in KINDS.items():
        drafter = make_drafter(language_target, block_size=6, **options).requires_grad_(False)
        if kind != "random":
            drafter.load_state_dict(language_drafter.state_dict(), strict=False)
        for name, parameter in drafter.named_parameters():
            if "selector" not in name:
                parameter.mul_(1.001)
            if "_conv." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        drafter.save_pretrained(made / kind)
    return {kind: made / kind for kind in KINDS}


@pytest.fixture(scope="session")
def folder(folders) -> Path:
    return folders["trained"]


@pytest.fixture
def do_export(language_target, folders, target_gguf, tmp_path):
    def run(to, kind="trained", folder=None, **options) -> Exported:
        settings = {"output": tmp_path / to, "name": "tiny-dflash", "target_name": "some/target"}
        request = Request(to=to, **{**settings, "target_gguf": target_gguf, **options})
        return export(folder or folders[kind], language_target, request)

    return run


@pytest.fixture
def edit(folder, tmp_path):
    """Makes a copy of the trained one with another config; None removes a key."""

    def run(path="x", **changes) -> Path:
        return change_config(shutil.copytree(folder, tmp_path / path), **changes)

    return run
