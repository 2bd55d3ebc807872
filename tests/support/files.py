"""Prompts, JSON files and folders of models as many tests write and change them."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from dpace.prompts.prompts import Prompt

HOLD = """
import sys, time
from dpace.system.ledger import lock_folder
with lock_folder(sys.argv[1]), lock_folder(sys.argv[1]):
    pass
with lock_folder(sys.argv[1]):
    with lock_folder(sys.argv[1]):
        pass
    print("held", flush=True)
    time.sleep(60)
"""
"""A program that holds a folder, also where it has locked it twice, until it is killed."""


def make_prompts(texts: Iterable[str], name: str = "s") -> list[Prompt]:
    """Prompts of one turn each, numbered from 0."""
    return [Prompt(str(i), name, [[{"role": "user", "content": text}]]) for i, text in enumerate(texts)]


def write_rows(path: Path, rows: Iterable[dict]) -> str:
    """A line of JSON for each row, or a table or a list of JSON where the suffix says so; gives the file's name."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return str(path)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = f"[{','.join(lines)}]" if path.suffix == ".json" else "\n".join([*lines, ""])
    path.write_bytes(text.encode())
    return str(path)


def write_prompts(path: Path, texts: Iterable[str]) -> str:
    return write_rows(path, ({"prompt": text} for text in texts))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
"""Where an adapter has the two factors of a projection, A and B."""


def write_adapter(base_folder: Path, folder: Path | None = None, width: int = 128, **changes) -> Path:
    """An adapter as peft writes it, without peft: rank 2 on one layer's query projection, by default beside its base.

    `width` is the number of columns of the projection, which has 128 rows.
    """
    folder = folder or base_folder.parent / "lora"
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_folder)}
    settings |= {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], **changes}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(1)
    weights = {f"{QUERY}A.weight": torch.randn(2, width), f"{QUERY}B.weight": torch.randn(128, 2)}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def changed_json(path: Path) -> Iterator[Any]:
    """What a file holds; what the body makes of it is written."""
    value = read_json(path)
    yield value
    path.write_text(json.dumps(value))


def change_json(path: Path, **changes: object) -> None:
    with changed_json(path) as value:
        value.update(changes)


def change_config(folder: Path, **changes: object) -> Path:
    """Other values in a model's config, also inside `dflash_config` where they stand there; None removes a key."""
    with changed_json(folder / "config.json") as config:
        nested = config.get("dflash_config", {})
        for name, value in changes.items():
            for values in (config, nested) if name in nested else (config,):
                values[name] = value
                if value is None:
                    del values[name]
    return folder


@contextmanager
def changed_weights(folder: Path, name: str = "model.safetensors") -> Iterator[dict[str, torch.Tensor]]:
    """The same for the tensors of a folder."""
    weights = load_file(folder / name)
    yield weights
    weights = {key: tensor.detach().clone().contiguous() for key, tensor in weights.items()}
    save_file(weights, folder / name, {"format": "pt"})
