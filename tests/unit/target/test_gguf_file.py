"""A GGUF file as target: the weights that llama.cpp serves, or one line that says why not."""

import json
import re
from math import inf, nan
from pathlib import Path
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors.torch import load_file

from dpace.system.provenance import hash_file
from dpace.target import Target, gguf_file, locate
from dpace.target.chat import ChatTokenizer, encode_chat
from dpace.target.locate import find_target
from tests.support.cases import wide
from tests.support.families import make_sharp_target
from tests.support.models import BYTE_TOKENIZER, BYTE_TOKENS, write_target_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FILES = {
    # name: family and its settings, architecture of the file
    "heads of another width": ("qwen3", {"head_dim": 24}, "qwen3"),
    "tied tables": ("qwen3", {"tie_word_embeddings": True}, "qwen3"),
    "biases": ("qwen2", {}, "qwen2"),
    "a scaled rotary embedding": ("llama", {"rope_parameters": LLAMA3}, "llama"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpace" / locate.READ


def llama3_factors(target: Target) -> torch.Tensor:
    """What a wavelength is stretched by, as transformers computes it."""
    rotary = target.decoder.rotary_emb
    head_dim = target.layers[0].self_attn.head_dim
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    return plain / rotary.inv_freq


@pytest.mark.parametrize("name", FILES)
def test_the_target_is_the_file(name, tmp_path, cache, capsys):
    family, changes, architecture = FILES[name]
    expected = make_sharp_target(family, vocab_size=len(BYTE_TOKENS), **changes)
    others = {"rope_freqs.weight": llama3_factors(expected)} if "rope_parameters" in changes else {}
    path = tmp_path / "served.gguf"
    write_target_gguf(expected, path, architecture, quantized_kind="down_proj", other_tensors=others, **BYTE_TOKENIZER)
    folder = find_target(str(path))
    target = Target.load(folder)
    assert target.tokenizer("cab").input_ids == [BYTE_TOKENS.index("c"), BYTE_TOKENS.index("ab")]
    weights, other_weights = target.model.state_dict(), expected.model.state_dict()
    assert weights.keys() == other_weights.keys()
    for key, weight in other_weights.items():
        if "down_proj" in key:
            blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            numbers = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            weight = torch.from_numpy(numbers)
        assert torch.equal(weights[key], weight), key
    expected.model.load_state_dict(weights)
    text = torch.arange(10, 50)[None]
    assert torch.equal(target.model(text).logits, expected.model(text).logits)
    assert target.stop_token_ids == [257] and target.model.dtype == torch.float32
    printed = capsys.readouterr().err
    assert "first use of served.gguf" in printed and "served.gguf has no chat template" in printed
    assert find_target(str(path.rename(tmp_path / "served-2.gguf").rename(path))) == folder
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == [folder.rpartition("/")[2]]
    assert "first use" not in capsys.readouterr().err


def test_weights_that_fit_into_16_bits_stay_in_16_bits_and_the_file_is_read_once(tmp_path, monkeypatch):
    """Settings that say that nothing is done are no reason to refuse it."""
    unused = {"rope_scaling_type": gguf.RopeScalingType.NONE, "attn_logit_softcapping": 0.0}
    reader = gguf.GGUFReader
    read = Mock(wraps=reader._build_fields)
    monkeypatch.setattr(reader, "_build_fields", lambda *arguments: read(*arguments))
    target = make_sharp_target("qwen3", vocab_size=len(BYTE_TOKENS), tie_word_embeddings=True)
    target.model.bfloat16()
    folder = find_target(str(write_target_gguf(target, tmp_path / "x.gguf", **BYTE_TOKENIZER, **unused)))
    assert read.call_count == 1 and gguf.GGUFReader is reader
    config = json.loads((Path(folder) / "config.json").read_text())
    assert "lm_head.weight" not in load_file(f"{folder}/model.safetensors")
    assert config["dtype"] == "bfloat16" and Target.load(folder).model.dtype == torch.float32


def test_it_is_loaded_and_named_by_its_own_name(tmp_path):
    path = write_target_gguf(make_sharp_target("qwen3", vocab_size=260), tmp_path / "mine.gguf", **BYTE_TOKENIZER)
    target, chat = Target.load(str(path)), ChatTokenizer.load(str(path))
    assert target.name == target.short_name == chat.name == "mine.gguf"
    with pytest.raises(ValueError, match="the chat template of mine.gguf knows no `tool`"):
        encode_chat(chat, [{"role": "tool", "content": "a"}])


KINDS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ2_XS IQ3_S IQ4_NL IQ4_XS".split()


@pytest.mark.parametrize("kind", wide(KINDS, "Q5_0", "Q5_1", "Q4_K", "IQ4_XS"))
def test_blocks_of_each_kind_are_the_numbers_of_llamacpp(kind, tmp_path):
    """Q4_K_M and Q5_K_M have Q5_0, Q5_1 or Q8_0 where a row is no multiple of 256."""
    target = make_sharp_target("qwen2", vocab_size=len(BYTE_TOKENS), intermediate_size=256)
    blocks = {"quantized_kind": "down_proj", "quantization": gguf.GGMLQuantizationType[kind]}
    path = write_target_gguf(target, tmp_path / "x.GGUF", "qwen2", **blocks, **BYTE_TOKENIZER)
    weights = load_file(f"{find_target(str(path))}/model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer in range(target.config.num_hidden_layers):
        blocks = tensors[f"blk.{layer}.ffn_down.weight"]
        assert blocks.tensor_type.name == kind
        numbers = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.tensor_type))
        assert numbers.any() and torch.equal(weights[f"model.layers.{layer}.mlp.down_proj.weight"].float(), numbers)


def test_what_an_older_version_has_read_is_read_again(tmp_path, cache):
    path = write_target_gguf(make_sharp_target("qwen3", vocab_size=260), tmp_path / "x.gguf", **BYTE_TOKENIZER)
    old = cache.parent / "gguf" / f"x-{hash_file(path)[:16]}"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    assert Target.load(find_target(str(path))).tokenizer is not None


def test_a_file_that_is_replaced_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path, other = (
        write_target_gguf(
            make_sharp_target(family, vocab_size=260), tmp_path / f"{family}.gguf", family, **BYTE_TOKENIZER
        )
        for family in ("qwen3", "qwen2")
    )

    def hash_and_replace(path: Path) -> str:
        digest = hash_file(path)
        path.write_bytes(other.read_bytes())
        return digest

    first = path.read_bytes()
    monkeypatch.setattr(gguf_file, "hash_file", hash_and_replace)
    with pytest.raises(ValueError, match="qwen3.gguf was changed while it was read; run the same command again"):
        find_target(str(path))
    monkeypatch.undo()
    path.write_bytes(first)
    assert json.loads((Path(find_target(str(path))) / "config.json").read_text())["model_type"] == "qwen3"


def text(value: str) -> bytes:
    """A text as the file has it: its length, and its bytes."""
    return len(value).to_bytes(8, "little") + value.encode()


REFUSED = [
    # what the file has beside that of a good one, or in its place, and the message
    ("rope_scaling_type", gguf.RopeScalingType.YARN, "sets rope.scaling.type to 'yarn', which transformers does not "),
    ("rope_dimension_count", 6, "sets rope.dimension_count to 6, which transformers does not read; name the folder"),
    ("block_count", 3, "it has 4 layers, and its block_count is 3; write or download the file again"),
    ("block_count", 2**31, "it has 4 layers, and its block_count is 2147483648; write"),
    *[("rope_freq_base", base, f"its rope.freq_base is {base}, expected a po") for base in (nan, inf, 0.0, -1.0)],
    (
        "feed_forward_length",
        32,
        "have other shapes: model.layers.0.mlp.down_proj.weight is [48, 64], expected [48, 32]",
    ),
    ("tokenizer_pre", "deepseek-llm", "it splits texts as 'deepseek-llm', which dpace does not know; name the folder"),
]


@pytest.mark.parametrize(("fact", "value", "message"), REFUSED)
def test_what_would_be_read_wrongly_is_refused(fact, value, message, tmp_path):
    """As llama.cpp refuses it, or since transformers would leave it out."""
    target = make_sharp_target("qwen3", vocab_size=len(BYTE_TOKENS))
    path = write_target_gguf(target, tmp_path / "x.gguf", **BYTE_TOKENIZER, **{fact: value})
    with pytest.raises(ValueError, match=f"x.gguf.* {re.escape(message)}"):
        find_target(str(path))


@pytest.mark.parametrize("shift", [-32, 32])
def test_tensors_that_overlap_or_leave_gaps_are_refused(shift, tmp_path):
    target = make_sharp_target("qwen3", vocab_size=len(BYTE_TOKENS))
    path = write_target_gguf(target, tmp_path / "x.gguf", **BYTE_TOKENIZER)
    with path.open("r+b") as file:
        place = path.read_bytes().index(text("blk.1.attn_norm.weight")) + len(text("blk.1.attn_norm.weight")) + 16
        file.seek(place)  # after its name, its one size and its kind
        offset = int.from_bytes(file.read(8), "little")
        file.seek(place)
        file.write((offset + shift).to_bytes(8, "little"))
    with pytest.raises(ValueError, match=r"x.gguf: blk.1.attn_norm.weight begins at byte \d+, expected \d+; write"):
        find_target(str(path))


def test_weights_that_the_model_does_not_have_are_refused(tmp_path):
    """A file of Qwen3's architecture with the biases of Qwen2."""
    path = write_target_gguf(
        make_sharp_target("qwen3", vocab_size=len(BYTE_TOKENS)),
        tmp_path / "x.gguf",
        other_tensors={"blk.0.attn_q.bias": torch.ones(48)},
        **BYTE_TOKENIZER,
    )
    with pytest.raises(ValueError, match=r"has [\d,]+ weights, and the model that transformers makes .* [\d,]+; name"):
        find_target(str(path))


def test_files_that_are_no_targets_are_refused(tmp_path):
    target = make_sharp_target("qwen3", vocab_size=len(BYTE_TOKENS))
    whole = write_target_gguf(target, tmp_path / "whole.gguf", **BYTE_TOKENIZER).read_bytes()
    num_header = whole.index(b"output_norm")
    name = text("general.architecture")
    is_number, is_text, is_list = (kind.to_bytes(4, "little") for kind in (0, 8, 9))
    as_bytes = name + is_list + is_number + len(text("qwen3")).to_bytes(8, "little")
    files = {
        "numbers at byte [0-9]+ are past the end of the file; write": whole[:-1000],
        "18 numbers at byte [0-9]+ are past the end": whole[:num_header],
        "GGUF magic invalid": b"PK" + whole,
        "has the architecture 'qwen9', which transformers does not read": whole.replace(b"qwen3", b"qwen9"),
        "it has [0-9]+ layers, and its block_count is None": whole.replace(name + is_text, as_bytes) + bytes(64),
        "is one part of a split file; join the parts with llama-gguf-split --merge": (
            whole.replace(text("tokenizer.ggml.unknown_token_id"), text("split.count")) + bytes(64)
        ),
        "cannot read the tokenizer of .*tokens'; name the folder": whole.replace(
            b"tokenizer.ggml.tokens", b"tokenizer.ggml.takens"
        ),
    }
    for number, (message, content) in enumerate(files.items()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            find_target(str(path))
    assert not any((tmp_path / "cache").rglob("config.json"))
