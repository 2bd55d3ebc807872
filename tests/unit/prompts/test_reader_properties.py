"""Whatever a drafter's files and a server's events hold, readers give a value or a ValueError or OSError."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dpace.engines.read import read_drafter
from dpace.servers.apis import LlamacppServer, SglangServer, VllmServer
from dpace.servers.transport import Address

MANY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | WORD


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


KEYS = (
    "choices token_ids finish_reason tokens stop stop_type timings predicted_n draft_n draft_n_accepted meta_info "
    "output_ids completion_tokens spec_verify_ct spec_accept_histogram truncated tokens_predicted usage matched"
).split()
EVENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.integers(0, 63), max_size=4)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.mark.wide
@pytest.mark.parametrize("kind", [VllmServer, SglangServer, LlamacppServer])
@settings(MANY, max_examples=40)
@given(
    is_stream=st.booleans(),
    events=st.lists(st.dictionaries(st.sampled_from(KEYS), EVENTS, max_size=5), max_size=4),
)
def test_events_of_servers(kind, is_stream, events, monkeypatch):
    monkeypatch.setattr(Address, "get", lambda *_: '{"data": [{"id": "m"}]}')
    monkeypatch.setattr(Address, "events", lambda *_: (event for event in events))
    try:
        answer = kind(Address("http://x"), 64).answer([1, 2], 8, 0.0, 0, stream=is_stream)
    except ValueError as error:
        assert "http://x" in str(error) and "\n" not in str(error)
    else:
        assert len(answer.token_ids) <= 8 and all(type(t) is int and 0 <= t < 64 for t in answer.token_ids)
