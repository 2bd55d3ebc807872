"""Plain decoding with compiled steps: the baseline that a drafter has to beat where compiling pays."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from dpace.config import BenchConfig
from dpace.decode import Decoder, Generation, generate_plain
from dpace.decode.batch import compiled_columns
from dpace.progress import printable
from dpace.target import Target

WARM_UP_TOKENS = 6
"""Tokens that are decoded after steps of other shapes were compiled: CUDA graphs are recorded in the first ones."""
RECOMPILE_LIMIT = 256
"""Shapes that may be compiled; past torch's own limit of 8, steps would not be compiled, and nothing says so."""


class CompiledPlain:
    """Decodes plainly with `torch.compile`; what compiling takes is not counted.

    Steps are compiled for each length of a text, rounded up, see `dpace.decode.batch.compiled_columns`.
    """

    def __init__(self, target: Target):
        self.target, self.decoder = target, Decoder(target, None, compile=True)
        self._ready: set[int] = set()

    def can_decode(self, token_ids: Sequence[int], max_new_tokens: int) -> bool:
        """Compile the steps of a prompt; say why that cannot be done where it is so."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            self.prepare(token_ids, max_new_tokens)
        except (ValueError, torch.OutOfMemoryError, TorchDynamoException) as error:
            reason = " ".join(str(error).split())[:300]
            print(printable(f"plain decoding with compiled steps is left out: {reason}"), file=sys.stderr)
            return False
        return True

    def prepare(self, token_ids: Sequence[int], max_new_tokens: int) -> None:
        """Compile the steps of a prompt, if they are not yet, by decoding its first tokens."""
        columns = compiled_columns(len(token_ids) + max_new_tokens)
        if columns in self._ready:
            return
        tokens = generate_plain(
            self.target, token_ids, max_new_tokens=min(2 * WARM_UP_TOKENS, max_new_tokens)
        ).token_ids
        ends = set(tokens[WARM_UP_TOKENS:]) - set(tokens[:WARM_UP_TOKENS])  # the texts' longest length is kept
        stops = [*ends, *self.target.stop_token_ids]
        self._decode(token_ids, max_new_tokens=max_new_tokens, stop_token_ids=stops)
        self._ready.add(columns)

    def decode(self, token_ids: Sequence[int], *, max_new_tokens: int, **options: Any) -> Generation:
        """Decode a prompt; options are those of `generate_plain`."""
        self.prepare(token_ids, max_new_tokens)
        return self._decode(token_ids, max_new_tokens=max_new_tokens, **options)

    def _decode(self, token_ids: Sequence[int], **options: Any) -> Generation:
        import torch._dynamo

        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return self.decoder.generate(token_ids, **options)


def find_compiled(target: Target, config: BenchConfig) -> CompiledPlain | None:
    """Give compiled plain decoding where the options ask for it: by default on an accelerator only."""
    is_wanted = config.compiled == "always" or (config.compiled == "auto" and target.device.type != "cpu")
    return CompiledPlain(target) if is_wanted else None
