"""Whatever a drafter's files hold, readers give a value or a ValueError or OSError."""

import shutil
from pathlib import Path

from hypothesis import HealthCheck, given, settings, strategies as st

from dpace.engines.read import read_drafter

MANY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path) -> None:
    try:
        read_drafter(path, num_target_layers=6)
    except (ValueError, OSError) as error:
        assert str(error) and len(str(error)) < 2000


def garbled(data, whole: bytes) -> bytes:
    """Cut, and other bytes at a few places near the start, where the numbers are."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(3000, len(whole) - 1)))
        changed[place] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.sampled_from([len(whole), *range(0, len(whole), len(whole) // 40)]))])


@MANY
@given(data=st.data())
def test_safetensors(random_drafter_folder, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "weights"
    shutil.copytree(random_drafter_folder, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").write_bytes(garbled(data, (folder / "model.safetensors").read_bytes()))
    read(folder)


@MANY
@given(data=st.data())
def test_gguf(random_drafter_gguf, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "d.gguf"
    path.write_bytes(garbled(data, random_drafter_gguf))
    read(path)
