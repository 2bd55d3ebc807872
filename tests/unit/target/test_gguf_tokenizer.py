"""The tokenizer of a GGUF file: its tokens and the ends of its answers are those of llama.cpp, which is asked."""

import json
import random
import urllib.request
from pathlib import Path

import pytest
from llamacpp import serving
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from dpace.target.gguf_tokenizer import SPLITS, stop_tokens
from dpace.target.locate import TARGET_ID, cache_folder, find_target
from tests.support.cases import wide
from tests.support.families import make_sharp_target
from tests.support.models import write_target_gguf

WORDS = (
    "a: it's We'LL I'M x1 v2.50 100,000 1234567 -3.5e10 0x1F ½ Ⅷ १२३ ٤٥٦ naïve ÉCOLE camelCase HTTPServer don’t "
    "def f(x): x[3]=y**2 {'k':[1]} </p> a/b\\c $9.99 #tag @me C++ => != && … — «ß» Привет, мир! 价格是5元。 こんにちは "
    "한국어 שלום مرحبا हिन्दी ไทย 🙂👍🏽 e\u0301 \u200b | |-|:-: ## * 1. ``` <|im_end|> <think> [INST] [/INST] "
    "<s> <｜User｜>"
).split()
GAPS = ("", " ", "  ", "    ", "\n", "\n\n", "\n\n\n", "\t", " \n", "\n ", "\r\n", "\u00a0", "\u3000")
_choose = random.Random(0)
TEXTS = ["a:\n\n1. b", "  two", "trail ", "\n", "|a|1|\n|-|-|\n|  2|b|\n", "if x:\n\n    y = 10\n\n\treturn y\n"]
TEXTS += ["".join(_choose.choice(WORDS) + _choose.choice(GAPS) for _ in range(20)) for _ in range(94)]
CONTROL = ["<unk>", "<s>", "</s>", "<|im_end|>", "[INST]", "[/INST]", "<｜User｜>"]


def learn(letters: list[str], texts: list[str], size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of texts that nothing splits, so that each place of a split can be seen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    )
    found = json.loads(tokenizer.to_str())["model"]
    return sorted(found["vocab"], key=found["vocab"].get), [" ".join(pair) for pair in found["merges"]]


def write(path: Path, tokens: list[str], special: dict[str, int], **facts) -> Path:
    tokens = list(dict.fromkeys(tokens))  # each once
    types = [special.get(token, 1) for token in tokens]
    target = make_sharp_target("qwen3", vocab_size=len(tokens))
    facts = {"token_list": tokens, "token_types": types, "unk_token_id": 0, "bos_token_id": 1, **facts}
    return write_target_gguf(target, path, eos_token_id=2, **facts)


def write_bytes(path: Path, split: str | None) -> Path:
    """A file whose letters are bytes, and whose words run over all boundaries."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [to_bytes.pre_tokenize_str(text)[0][0] for text in TEXTS]
    tokens, merges = learn(pre_tokenizers.ByteLevel.alphabet(), texts, 1500)
    special = dict.fromkeys(CONTROL, 3) | {"<unk>": 2, "<think>": 4}
    facts = {"tokenizer_model": "gpt2", "token_merges": merges} | ({} if split is None else {"tokenizer_pre": split})
    return write(path, [*CONTROL, "<think>", *tokens], special, **facts)


def write_pieces(path: Path, has_prefix: bool | None) -> Path:
    """A file of sentencepiece."""
    texts = [text.replace(" ", "▁") for text in TEXTS]
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens, _ = learn([], texts, 1500)
    special = dict.fromkeys(CONTROL, 3) | dict.fromkeys(letters, 6) | {"<unk>": 2}
    tokens = [*CONTROL, *letters, *tokens]
    facts = {} if has_prefix is None else {"add_space_prefix": has_prefix}
    return write(path, tokens, special, token_scores=[-float(number) for number in range(len(tokens))], **facts)


def ask(url: str, path: str, request: dict) -> dict:
    return json.load(urllib.request.urlopen(f"{url}{path}", json.dumps(request).encode()))


def compare(path: Path, name: str) -> None:
    """Ask llama.cpp for the tokens of each text."""
    tokenizer = AutoTokenizer.from_pretrained(find_target(name))
    with serving(path) as url:
        for text in TEXTS:
            theirs = ask(url, "/tokenize", {"content": text, "add_special": False})["tokens"]
            assert tokenizer(text, add_special_tokens=False).input_ids == theirs, text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("split", wide([None, *SPLITS], None, "smollm", "qwen2"))
def test_a_text_is_split_as_llamacpp_splits_it(split, tmp_path, cache):
    path = write_bytes(tmp_path / "x.gguf", split)
    compare(path, str(path))


@pytest.mark.parametrize("has_prefix", [None, True, False])
def test_spaces_are_those_of_the_file(has_prefix, tmp_path, cache):
    path = write_pieces(tmp_path / "x.gguf", has_prefix)
    compare(path, str(path))


STOPS = {
    # tokens of the file beside `eos`, which is 1: the ends of its answers
    "<|end_of_text|> <|im_end|> <|eom_id|> <|im_start|>": [1, 2, 3, 4],
    "<|end|> <|call|> <|return|> <|message|>": [1, 3, 4],  # a channel's end is none
    "<|end|> <|assistant|>": [1, 2],
    "</s> <|tool_response> <turn|>": [1, 3, 4],
    "</S> <s> word": [1],
}


@pytest.mark.parametrize("texts", STOPS)
def test_answers_end_where_llamacpp_ends_them(texts):
    values = {"tokenizer.ggml.tokens": ["a", "eos", *texts.split()], "tokenizer.ggml.eos_token_id": 1}
    assert stop_tokens(values) == STOPS[texts]


@pytest.mark.slow
def test_the_demos_target_gives_the_tokens_of_llamacpp():
    compare(cache_folder() / "SmolLM2-135M-Instruct.gguf", TARGET_ID)
