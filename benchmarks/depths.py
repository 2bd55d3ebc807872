r"""Find how many draft tokens pay with llama.cpp, by kind of text: a server for each number, and one without a drafter.

    pip install xllamacpp
    python benchmarks/depths.py TARGET.gguf DRAFTER.gguf --depths 1 3 7 15 15@0.5 --threads 1 --bench \
        --target TARGET --sets gsm8k math500 mbpp --num-prompts 8 --bench.max-new-tokens 64 --temperatures 0

What stands after `--bench` goes to `dpace bench`, which prints the table. The servers' ports are fixed, so the same
command goes on where it was interrupted.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass

import tyro
from llamacpp import serving

from dpace import cli
from dpace.measure.results import split_depth


@dataclass
class Options:
    """Servers to start."""

    target: tyro.conf.Positional[str]
    """A GGUF file."""
    drafter: tyro.conf.Positional[str]
    """The GGUF file of its drafter."""
    depths: tuple[str, ...] = ("1", "3", "7", "15")
    """Numbers of draft tokens, as `dpace bench` takes them."""
    threads: int = 1
    """Threads of each server; one works at a time."""
    port: int = 8390
    """Port of the server without a drafter; the others have the next ones."""


def main(options: Options, bench: list[str]) -> int:
    """Start the servers and run `dpace bench` with these options more; return its exit code."""
    with ExitStack() as stack:
        urls = []
        for number, depth in enumerate(("0", *options.depths)):
            count, p_min, ngrams = split_depth(depth)
            server = serving(
                options.target,
                drafter=options.drafter if number else None,
                num_draft_tokens=count,
                p_min=float(p_min or 0),
                ngrams=ngrams,
                num_threads=options.threads,
                port=options.port + number,
            )
            urls.append(stack.enter_context(server))
        plain, *drafting = urls
        servers = ["--bench.plain-server", plain, "--bench.server", *drafting, "--bench.depths", *options.depths]
        return cli.main(["bench", *servers, *bench])


if __name__ == "__main__":
    words = sys.argv[1:]
    end = words.index("--bench") if "--bench" in words else len(words)
    if code := main(tyro.cli(Options, args=words[:end], description=__doc__), words[end + 1 :]):
        sys.exit(code)
