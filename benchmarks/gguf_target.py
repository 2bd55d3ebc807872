"""How far is dpace, on the numbers of a GGUF file, from llama.cpp, which computes with the quantized blocks?

    pip install xllamacpp
    python benchmarks/gguf_target.py FILE.gguf --data FOLDER --sets gsm8k math500 mbpp
    python benchmarks/gguf_target.py FILE.gguf --write-as Q4_0 OTHER.gguf

llama.cpp rounds what enters a quantized matrix to 8 bits; dpace does not. The first command answers prompts of FOLDER
greedily with llama.cpp, one at a time and four at a time, and with dpace. It prints the share of llama.cpp's tokens
that dpace also chooses after the same text, and how many texts are equal. llama.cpp four at a time is the control.
The second command writes the file again with matrices of another kind.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
import tyro
from llamacpp import serving

from dpace.decode import generate_plain
from dpace.metrics import estimate
from dpace.prompts.prompts import first_of_each_set
from dpace.prompts.public_sets import read_sets
from dpace.servers.apis import connect
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import find_target

Kind = Literal["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
NUM_PARALLEL = 4
BLOCK = 32
"""Numbers that share a scale; a matrix of another width stays in f32."""


def write_file_as(kind: Kind, source: str | Path, path: str | Path) -> None:
    """Write a target's GGUF file again with matrices of another kind, and vectors in f32.

    Matrices in f16 and f32 round a block and a single token alike, so that no drafter changes the text; quantized ones
    do not.
    """
    import gguf  # here, since the other command needs none of this

    from dpace.engines.gguf import copy_field, open_gguf, write_file

    reader, values = open_gguf(source)
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            copy_field(writer, field)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        is_whole = numbers.ndim == 2 and numbers.shape[1] % BLOCK == 0
        of_tensor = gguf.GGMLQuantizationType[kind if is_whole else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, of_tensor), raw_dtype=of_tensor)
    write_file(writer)


def ask(url: str, max_new_tokens: int, prompt: list[int]) -> list[int]:
    """Let a server answer greedily."""
    return connect(url).answer(prompt, max_new_tokens, 0.0, 0).token_ids


def num_chosen(target: Target, prompt: list[int], answer: list[int]) -> int:
    """Count the tokens of an answer that the target would choose too, after the same text."""
    text = torch.tensor([prompt + answer])
    with torch.inference_mode():
        logits = target.model(text).logits[0, len(prompt) - 1 : -1]
    return int((logits.argmax(-1) == torch.tensor(answer)).sum())


def num_alike(text: list[int], other: list[int]) -> int:
    """Count the tokens before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def main(
    file: tyro.conf.Positional[Path],
    data: Path | None = None,
    sets: tuple[str, ...] = ("gsm8k", "math500", "mbpp"),
    num_prompts: int = 8,
    max_new_tokens: int = 64,
    threads: int = 1,
    write_as: tuple[Kind, Path] | None = None,
) -> None:
    """Compare texts, or write the file again.

    Args:
        file: a target that transformers and llama.cpp read.
        data: folder with the sets as JSONL files; by default they are downloaded.
        sets: names of public sets.
        num_prompts: of each set.
        max_new_tokens: of each answer.
        threads: of llama.cpp.
        write_as: a kind of matrices and a new file, instead of comparing.
    """
    if write_as is not None:
        write_file_as(write_as[0], file, write_as[1])
        return
    target = Target.load(find_target(str(file)))
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in first_of_each_set(read_sets(sets, data), num_prompts)]
    with serving(file, num_threads=threads) as url:
        texts = [ask(url, max_new_tokens, prompt) for prompt in prompts]
    with serving(file, num_threads=threads, num_parallel=NUM_PARALLEL) as url, ThreadPoolExecutor(NUM_PARALLEL) as pool:
        at_once = list(pool.map(partial(ask, url, max_new_tokens), prompts))
    stops = target.stop_token_ids
    ours = [generate_plain(target, prompt, max_new_tokens=max_new_tokens).token_ids for prompt in prompts]
    counts = [[num_chosen(target, prompt, text), len(text)] for prompt, text in zip(prompts, texts, strict=True)]
    print(f"tokens of llama.cpp that dpace chooses too: {shown(counts)}")
    for name, others in {"dpace": ours, f"llama.cpp, {NUM_PARALLEL} at a time": at_once}.items():
        pairs = [(without(stops, text), without(stops, other)) for text, other in zip(texts, others, strict=True)]
        num_equal = sum(text == other for text, other in pairs)
        alike = shown([[num_alike(text, other), len(text)] for text, other in pairs])
        print(f"{name}: {num_equal}/{len(pairs)} texts equal to llama.cpp's, tokens before a difference {alike}")


def shown(counts: list[list[int]]) -> str:
    """Write the share of some tokens of each prompt among all of its tokens, with its interval over prompts."""
    share, low, high = estimate([[counts]])
    return f"{share:.1%} [{low:.1%}, {min(high, 1):.1%}]"


def without(stops: list[int], text: list[int]) -> list[int]:
    """Leave out stop tokens, because only some engines return them."""
    return [token for token in text if token not in stops]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
