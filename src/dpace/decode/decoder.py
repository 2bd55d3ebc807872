"""Decode call after call, and keep what later calls can use."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch

from dpace.config import Width
from dpace.decode.batch import Buffers, compiled_columns, decode_rows, generate_batch
from dpace.decode.generation import Generation
from dpace.decode.loop import generate, generate_plain
from dpace.decode.pace import Paces
from dpace.decode.request import SamplingOptions
from dpace.drafter import Drafter
from dpace.target import Target


class Decoder:
    """A target with its drafter, for many prompts.

    It keeps what was learned about the drafter (`Paces`) and, with `compile`, the caches that compiled steps refer to.
    So the steps are compiled once for each number of prompts and length.

    Memory: with `compile`, keys and values of the longest text in target and drafter, for each number of prompts that
    are decoded at once.

    Args:
        target: the model whose text is kept.
        drafter: trained for this target; None decodes plainly.
        width: see `generate`; compiled steps verify whole blocks.
        compile: see `generate_batch`.
        max_length: with `compile`, tokens of the longest prompt and response. Longer ones compile the steps again; by
            default that happens whenever a text is longer than all before.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        width: Width = "auto",
        compile: bool = False,
        max_length: int | None = None,
    ):
        self.target, self.drafter, self.compile = target, drafter, compile
        self.width: Width = width
        self.columns, self.paces = compiled_columns(max_length or 1), Paces()
        self._buffers: dict[int, Buffers] = {}

    def generate(self, token_ids: Sequence[int], **options: Unpack[SamplingOptions]) -> Generation:
        """Decode one prompt; arguments and errors as in `generate`."""
        if self.compile:
            return self.generate_batch([token_ids], **options)[0]
        if self.drafter is None:
            return generate_plain(self.target, token_ids, **options)
        return generate(self.target, self.drafter, token_ids, width=self.width, paces=self.paces, **options)

    def generate_batch(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Decode several prompts at once; arguments and errors as in `generate_batch`."""
        if not self.compile:
            return generate_batch(self.target, self.drafter, prompts, **options)
        chosen: Any = {"compile": True, "find_buffers": self._find_buffers, **options}
        return decode_rows(self.target, self.drafter, prompts, **chosen)

    def _find_buffers(self, num_rows: int, columns: int) -> Buffers:
        """Give the caches for a number of rows, with room for the longest text so far."""
        self.columns = max(self.columns, columns)
        known = self._buffers.get(num_rows)
        if known is None or known.capacity < self.columns:
            with torch.inference_mode():
                self._buffers[num_rows] = Buffers(self.target, self.drafter, self.columns)
        else:
            known.forget()
        return self._buffers[num_rows]
