"""Read the tokenizer of a GGUF file, so that it gives the tokens of llama.cpp.

transformers reads vocabulary and merges. How a text is split before they are used, what a space becomes and which
tokens end a text is written here, from the names that the file gives.

Source: `src/llama-vocab.cpp` of ggml-org/llama.cpp.
"""

from pathlib import Path

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
    get_merges,
)

from dpace.system.ledger import JsonObject
from dpace.system.progress import describe_error, quoted

NAME_UNQUANTIZED = "name the folder or Hub id of the model that is not quantized"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    **{
        name: (rule.replace(_UPPER, r"((?=\p{L})[^a-z])").replace(_LOWER, r"((?=\p{L})[^A-Z])"),)
        for name, rule in GGUF_PRE_TOKENIZER_SPLITS.items()
    },
    **dict.fromkeys("gpt-2 phi-2 mpt olmo jais gigachat mellum exaone4 trillion".split(), (_GPT2,)),
    **dict.fromkeys("smollm starcoder refact command-r codeshell exaone minerva-7b".split(), (r"\p{N}", _GPT2)),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""Each `tokenizer.ggml.pre` that is read, and its rules: each rule splits what the rule before it has left whole."""
WHOLE_WORDS = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken".split()
"""Those of which a word that is a token stays whole, whatever the merges say."""
ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> "
    "<fim-repo> <REPO> <reponame> <|file_sep|>".split()
)
"""Tokens at which llama.cpp ends an answer because of their text, also where the file calls another one the end."""
NAMED_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
NO_ENDS = {"<|return|>": "<|end|>", "<|flush|>": "<|end|>", "<|tool_response>": "</s>"}
"""Beside the first token the second one ends no answer, but a part of one."""


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a GGUF file.

    Raises:
        ValueError: there is none, it splits texts in a way that is not known, or its parts do not fit one another.
    """
    try:
        architecture, parts, settings = get_gguf_tokenizer(str(path))
        kind = parts["tokenizer_type"]
        if kind == "gpt2":
            backend = _byte_tokenizer(parts)
        else:
            backend, _ = convert_gguf_tokenizer(architecture, parts)
        if kind == "llama":
            _set_spaces(backend, parts.get("add_prefix_space", True))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"cannot read the tokenizer of {path}: {describe_error(error)}; {NAME_UNQUANTIZED}") from error


def _byte_tokenizer(parts: JsonObject) -> Tokenizer:
    """Make a tokenizer whose letters are bytes."""
    split = parts.get("pre_tokenizer_type", "default")
    if split not in SPLITS:
        raise ValueError(f"it splits texts as {quoted(split)}, which dpace does not know")
    vocabulary = {token: number for number, token in enumerate(parts["tokens"])}
    backend = Tokenizer(models.BPE(vocabulary, get_merges(parts), ignore_merges=split in WHOLE_WORDS))
    rules = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in SPLITS[split]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*rules, to_bytes])
    backend.decoder = decoders.ByteLevel()
    whole = []
    for token, kind in zip(vocabulary, parts["token_type"], strict=True):
        if TokenType.NORMAL < kind < TokenType.UNUSED or token in ENDS:
            whole.append(AddedToken(token, special=kind != TokenType.USER_DEFINED))
    backend.add_tokens(whole)
    return backend


def _set_spaces(backend: Tokenizer, num_before: int) -> None:
    """Write spaces as a tokenizer of sentencepiece does, with so many before each text and after each special token."""
    prefix = normalizers.Prepend("▁" * num_before)
    backend.normalizer = normalizers.Sequence([prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", num_before, 0),
        ]
    )


def stop_tokens(values: JsonObject) -> list[int]:
    """Return the tokens that end a text or a turn: those that the file names, and then those that llama.cpp knows."""
    tokens = values["tokenizer.ggml.tokens"]
    known = ENDS.intersection(tokens)
    known -= {NO_ENDS.get(text) for text in known}
    named = [values[key] for key in NAMED_ENDS if key in values]
    return list(dict.fromkeys([*named, *sorted(map(tokens.index, known))]))
