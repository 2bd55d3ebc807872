"""Run llama.cpp on GGUF files in a process of its own: its answers, accepted drafts and seconds, or its server.

This needs `pip install xllamacpp`, which has llama.cpp's server as a library. ggml ends its process where it meets
something that it does not know, so it gets one of its own.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """One response of llama.cpp."""

    token_ids: list[int]
    """The response without its prompt; the stop token is the last one."""
    num_drafted: int
    num_accepted: int
    decode_seconds: float
    """Seconds for all tokens after the first."""


def has_llamacpp() -> bool:
    """Return whether the package `xllamacpp` is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def run_llamacpp(
    target_gguf: str | Path,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    drafter_gguf: str | Path | None = None,
    num_draft_tokens: int = 0,
    is_dspark: bool = False,
    num_threads: int = 1,
) -> list[Answer]:
    """Answer prompts greedily, one after the other, after a first answer that is not counted.

    Args:
        target_gguf: the target; in f32 or f16 its text does not depend on the drafter.
        prompts: token ids.
        max_new_tokens: longest response in tokens.
        drafter_gguf: the drafter; plain decoding without it.
        num_draft_tokens: draft tokens of a block, `block_size - 1`.
        is_dspark: whether the drafter has DSpark's head, or slots that begin at the anchor.
        num_threads: more than one is slow where other programs want the cores too.

    Raises:
        ValueError: llama.cpp ended without an answer; its last lines are in the message.
    """
    server = {
        "target": str(target_gguf),
        "drafter": str(drafter_gguf or ""),
        "num_draft_tokens": num_draft_tokens,
        "is_dspark": is_dspark,
        "num_threads": num_threads,
    }
    request = {"server": server, "prompts": list(prompts), "max_new_tokens": max_new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = [sys.executable, __file__, str(answers)]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
        if done.returncode or not answers.exists():
            reason = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise ValueError(
                f"llama.cpp ended with code {done.returncode} and without an answer; its last lines say why: {reason}"
            )
        return [Answer(*row) for row in json.loads(answers.read_text())]


def make_server(
    target: str,
    drafter: str | None = None,
    *,
    num_draft_tokens: int = 0,
    p_min: float = 0.0,
    ngrams: str = "",
    is_dspark: bool = False,
    num_threads: int = 1,
    num_parallel: int = 1,
    is_exact: bool = False,
    port: int = 0,
) -> Any:
    """Make a server of xllamacpp in this process.

    Its threads slow down those of torch: call this in a process without torch's work. Arguments as in `run_llamacpp`;
    `p_min` ends a draft at a token of a lower probability; `ngrams`, such as `ngram-simple`, draft beside it;
    `num_parallel` texts are answered at once; `is_exact` keeps keys and values in f32, as this process does, and not in
    llama.cpp's default, f16; `port` is a free one by default.
    """
    xllamacpp: Any = importlib.import_module("xllamacpp")  # optional, and without types
    params = xllamacpp.CommonParams()
    params.model.path = target
    params.port = port
    params.n_ctx = 2048 * num_parallel
    params.n_parallel = num_parallel
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if is_exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if drafter:
        kinds = xllamacpp.common_speculative_type
        dspark = kinds.COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK
        types = [dspark if is_dspark else kinds.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH]
        if ngrams:
            types.append(getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{ngrams.replace('-', '_').upper()}"))
        params.speculative.types = types
        params.speculative.draft.mparams.path = drafter
        params.speculative.draft.n_max = num_draft_tokens
        params.speculative.draft.p_min = p_min
    return xllamacpp.Server(params)


@contextmanager
def serving(target: str | Path, **options: Any) -> Iterator[str]:
    """Give the address of a server in a process of its own, until it is left; options as in `make_server`."""
    command = [sys.executable, __file__, "serve", json.dumps({"target": str(target), **options})]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield next(line.strip() for line in process.stdout or () if line.startswith("http"))
        finally:
            process.kill()


def answer(server: Any, token_ids: Sequence[int], max_new_tokens: int) -> Answer:
    """Answer one prompt greedily."""
    request = {"prompt": list(token_ids), "temperature": 0, "max_tokens": max_new_tokens, "cache_prompt": False}
    reply = server.handle_completions({**request, "return_tokens": True, "verbose": True})["__verbose"]
    times = reply["timings"]
    drafted, accepted = times.get("draft_n", 0), times.get("draft_n_accepted", 0)
    return Answer(reply["tokens"], drafted, accepted, times["predicted_ms"] / 1000)


def _serve(request: dict) -> list[Answer]:
    """Answer the prompts of a request, after a first answer that is not counted."""
    server = make_server(**request["server"])
    prompts = request["prompts"]
    return [answer(server, token_ids, request["max_new_tokens"]) for token_ids in [prompts[0], *prompts]][1:]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        running = make_server(**json.loads(sys.argv[2]))
        print(running.listening_address, flush=True)
        sys.stdin.read()
    else:
        Path(sys.argv[1]).write_text(json.dumps(_serve(json.load(sys.stdin))))
