"""Decode several prompts together, and prompts call after call.

`Batch` takes checked requests and runs the steps of `dpace.decode.steps` until all are done, as they are or compiled.
`Decoder` decodes one or several prompts at a time, and keeps what later calls can use.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from dpace.config import Width
from dpace.decode.generation import Continuation, Generation, SamplingOptions, collect, make_continuation
from dpace.decode.loop import generate
from dpace.decode.pace import Paces
from dpace.decode.sampling import verify_draft
from dpace.decode.steps import State, draft_step, verify_step
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.attention import EXACT as EXACT_ATTENTION, NAME as GROUPED_ATTENTION
from dpace.fast.cache import RaggedCache, fill_places, is_full_attention
from dpace.fast.packing import refresh_copies
from dpace.fast.top import argmax
from dpace.target import Target
from dpace.target.beginnings import read_texts

COMPILED_COLUMNS = 256
"""Compiled steps round the number of columns up to a multiple of this, so that other prompts have the same shapes."""


def batch_fault(target: Target, lengths: Sequence[tuple[int, int]] = ()) -> str:
    """Say why a target cannot decode texts of different lengths together.

    Args:
        target: the model.
        lengths: of each text, tokens of the prompt, and tokens that the text may have in the end.

    Returns:
        The reason, and how to decode instead; empty where it can.
    """
    implementation = target.config._attn_implementation
    if target.is_spread or implementation not in ("sdpa", "eager", GROUPED_ATTENTION, EXACT_ATTENTION):
        return (
            f"the target's attention is {implementation}, or its layers are on several devices; a batch needs one "
            "device and a 4-D mask: load it with attn_implementation='sdpa' and on one, or decode one prompt "
            "at a time, with `generate`"
        )
    if not is_full_attention(DynamicCache(config=target.config)):
        return (
            f"{target.config.model_type} has layers that are not full attention; a batch needs full attention in all "
            "layers: decode one prompt at a time with `generate`"
        )
    for num_prompt, num_tokens in lengths:
        if fault := target.rotation_fault(len(lengths), num_prompt, num_tokens):
            return fault
    return ""


class Caches:
    """The caches of target and drafter for several rows of at most `capacity` tokens.

    Memory: keys and values of `capacity` tokens a row in both, allocated at the first step.
    """

    def __init__(self, target: Target, drafter: Drafter | None, capacity: int):
        self.target = RaggedCache(target.config, capacity, target.model.dtype)
        self.drafter = None
        if drafter is not None:
            self.drafter = RaggedCache(drafter.config, capacity, drafter.dtype, drafter.num_slots, drafter.reaches)


class Unread(NamedTuple):
    """What the drafter has not read yet of each row, and reads before it drafts."""

    features: Float[Tensor, "batch new feature"]
    positions: Int[Tensor, "batch new"]


class Batch:
    """The rows that are not done, and where they are.

    Without a drafter a block is a token. Steps read as few columns of the caches as they can, and rows that are done
    leave. Compiled steps have fixed shapes instead: whole blocks, all columns, and rows that are done stay to the end.
    A step is one graph: drafting, its head, verification, its head and, at temperature 0, the target's tokens. Above
    temperature 0 they are drawn after the graph.

    Args:
        target: verifies; all its layers have full attention.
        drafter: None for plain decoding.
        rows: at least one.
        kept_caches: with room for the longest text: steps are compiled, and graphs refer to them.

    Raises:
        ValueError: a drafter for another target, or what `batch_fault` finds.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rows: Sequence[Continuation],
        kept_caches: Caches | None = None,
    ):
        if fault := batch_fault(target, [(row.num_prompt, row.limit + 1) for row in rows]):
            raise ValueError(fault)
        vocabulary = None
        self.block_size = 1
        self.layer_ids: Sequence[int] = ()
        if drafter is not None:
            drafter.check_target(target)
            refresh_copies(drafter)
            vocabulary = drafter.vocabulary
            self.block_size = drafter.block_size
            self.layer_ids = drafter.target_layer_ids
        self.target = target
        self.drafter = drafter
        self.rows = list(rows)
        self.caches = kept_caches or Caches(target, drafter, 1 + max(row.limit for row in rows))
        self.is_compiled = kept_caches is not None
        self.is_greedy = all(row.sampler.temperature == 0 and not row.sampler.processors for row in rows)
        if self.is_compiled and vocabulary is not None and vocabulary.head is None:
            vocabulary = None  # the number of choices would differ from prompt to prompt
        prompt_tokens = chain.from_iterable(row.token_ids for row in rows)
        self.draft_rows = PackedRows(target, vocabulary, prompt_tokens)
        self.compiled: Any = None

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Read the prompts, then take steps until all rows are done."""
        unread = self.read_prompts()
        yield
        while self.rows:
            unread = self.step(unread)
            yield
        self.compiled = None  # it refers to this batch, whose caches would live on

    def read_prompts(self) -> Unread:
        """Read the prompts, each shared beginning once, emit the first tokens, and drop the rows that are done."""
        prompts = [row.token_ids for row in self.rows]
        hidden, features = read_texts(self.target, prompts, self.caches.target, self.layer_ids)
        # The drafter also reads the padding after shorter prompts. No slot sees it, and later tokens overwrite it.
        positions = torch.arange(features.shape[1], device=hidden.device).expand(len(hidden), -1)
        row_logits = self.target.logits(hidden).split(1)
        drawn = torch.cat([row.draw(logits) for row, logits in zip(self.rows, row_logits, strict=True)])
        for row, token in zip(self.rows, drawn.tolist(), strict=True):
            row.take(0, [token], width=0)
        return self.drop_done(Unread(features, positions))

    def step(self, unread: Unread) -> Unread:
        """Emit the tokens of one draft and its verification in every row, and drop the rows that are done."""
        width = self.block_size
        if not self.is_compiled:
            width = self.read_few_columns()
        # One transfer to the device, (batch, 3)
        ends = torch.tensor([(row.token_ids[-1], row.start, row.limit) for row in self.rows], device=self.target.device)
        last_ids, starts, limits = ends.split(1, dim=1)
        state = State(last_ids, starts, limits, unread.features, unread.positions)
        draft_and_verify = self.compiled or self.draft_and_verify
        blocks, drawn, features, positions = draft_and_verify(state, width)
        if self.is_compiled:
            # A CUDA graph writes its results to the same place each time, and frees them before it runs again.
            features, positions = features.clone(), positions.clone()
            # Only now, because the first step reads prompts, of any length, and makes the drafter's cache.
            self.compiled = self.compiled or torch.compile(self.draft_and_verify, mode="reduce-overhead", dynamic=False)
        if not self.is_greedy:
            drawn = torch.stack([row.draw(logits) for row, logits in zip(self.rows, drawn, strict=True)])
        # (batch, 2, width): the only wait for the device
        token_ids = torch.stack([blocks, drawn], dim=1).tolist()
        for row, (block, target_tokens) in zip(self.rows, token_ids, strict=True):
            if not row.is_done:  # rows that are done stay where steps are compiled
                draft = block[1 : row.remaining + 1]
                row.take(verify_draft(draft, target_tokens), target_tokens, width=len(draft) + 1)
        return self.drop_done(Unread(features, positions))

    def read_few_columns(self) -> int:
        """Let the next step read as few columns of the caches as it can, and return its number of slots."""
        width = self.block_size
        if self.caches.drafter is not None:
            # The slots have the first columns, and then come the tokens before the anchors.
            self.caches.drafter.end = width + max(row.start for row in self.rows)
            width = min(width, 1 + max(row.remaining for row in self.rows))
        # Up to the last slot of the longest text, at most to its limit, as `verify_step` places them.
        self.caches.target.end = 1 + max(min(row.start + width - 1, row.limit) for row in self.rows)
        return width

    def draft_and_verify(self, state: State, width: int) -> tuple[Int[Tensor, "batch width"], Tensor, Tensor, Tensor]:
        """Draft a block after each text, and let the target verify it.

        Args:
            state: where the texts end, and what the drafter reads.
            width: number of slots that are verified, the anchor included.

        Returns:
            The blocks, which are the last tokens without a drafter; the target's own tokens, "batch width", or logits
            to draw them from, "batch width vocab"; and features and positions of the blocks.
        """
        blocks = state.last_ids
        if self.drafter is not None and self.caches.drafter is not None:
            blocks, _ = draft_step(self.drafter, self.draft_rows, self.caches.drafter, state, width)
        logits, features, positions = verify_step(
            self.target, self.caches.target, self.layer_ids, blocks, state.starts, state.limits
        )
        drawn = logits
        if self.is_greedy:
            drawn = argmax(logits.float())  # in fp32 several times faster than in bf16
        return blocks, drawn, features, positions

    def drop_done(self, unread: Unread) -> Unread:
        """Drop the rows that are done, here and in the caches; compiled steps end when all are."""
        open_rows = fill_places([not row.is_done for row in self.rows])
        if len(open_rows) == len(self.rows) or (open_rows and self.is_compiled):
            return unread
        self.rows = [self.rows[number] for number in open_rows]
        if self.rows:
            self.caches.target.keep_rows(open_rows)
            if self.caches.drafter is not None:
                self.caches.drafter.keep_rows(open_rows)
        return Unread(unread.features[open_rows], unread.positions[open_rows])


class Decoder:
    """A target with its drafter, for many prompts.

    It keeps what was learned about the drafter and the answers to copy from (`Paces`) and, with `compile`, the caches
    that compiled steps refer to. So the steps are compiled once for each number of prompts and length.

    Memory: at most `recall_mib` MiB of answers; with `compile`, keys and values of the longest text in target and
    drafter, for each number of prompts that are decoded at once.

    Args:
        target: the model whose text is kept.
        drafter: trained for this target; without it single prompts copy, and batches are decoded plainly.
        width: verification length of single prompts, as in `generate`; compiled steps verify whole blocks.
        compile: `torch.compile` the steps after the first, with fixed shapes and, on a GPU, CUDA graphs, and keep them
            and the caches that these refer to. Compiling takes a minute or more.
        max_length: with `compile`, tokens of the longest prompt and response. Longer ones compile the steps again; by
            default that happens whenever a text is longer than all before.
        recall_mib: MiB of memory of answers, which single prompts with width `auto` copy from and are added to; 0 keeps
            none.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        width: Width = "auto",
        compile: bool = False,
        max_length: int | None = None,
        recall_mib: float = 64.0,
    ):
        if compile and target.dtype_name == "int8":
            raise ValueError("a target in int8 has steps that cannot be compiled; leave compile out, or use float32")
        self.target = target
        self.drafter = drafter
        self.width: Width = width
        self.compile = compile
        self.paces = Paces(recall_mib)
        self.columns = 0
        self._caches: dict[int, Caches] = {}
        self.make_room(max_length or 1)

    def generate(self, token_ids: Sequence[int], **options: Unpack[SamplingOptions]) -> Generation:
        """Decode one prompt; arguments and errors as in `generate`."""
        if self.compile:
            return self.generate_batch([token_ids], **options)[0]
        return generate(self.target, self.drafter, token_ids, width=self.width, paces=self.paces, **options)

    def generate_batch(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Decode several prompts at once; arguments and errors as in `generate_batch`."""
        seed = options.get("seed")
        rows = []
        for number, token_ids in enumerate(prompts):
            if seed is not None:
                options["seed"] = seed + number
            rows.append(make_continuation(self.target, token_ids, **options))
        if not rows:
            return []
        caches = None
        if self.compile:
            self.make_room(1 + max(row.limit for row in rows))
            # Caches have no memory until something is read: where old ones are found, the new ones cost nothing.
            caches = self._caches.setdefault(len(rows), Caches(self.target, self.drafter, self.columns))
        batch = Batch(self.target, self.drafter, rows, caches)
        try:
            return collect(rows, batch.steps(), batch.block_size, self.target.device)
        except BaseException:
            self._caches.pop(len(rows), None)  # they may be half written
            raise

    def make_room(self, num_tokens: int) -> None:
        """Let the caches of compiled steps have room for texts of this length, and keep none that have not."""
        if num_tokens > self.columns:
            self.columns = math.ceil(num_tokens / COMPILED_COLUMNS) * COMPILED_COLUMNS
            self._caches.clear()


def generate_batch(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    **options: Unpack[SamplingOptions],
) -> list[Generation]:
    """Decode several prompts at once with a drafter, each with the text that it gets alone.

    Each step drafts a block for every row and verifies the whole blocks (`width="full"`, `verify_rule="equality"` of
    `generate`). Rows accept different numbers of tokens, and leave the batch when they are done. In fp32 a row's text
    and accepted lengths are as `generate` gives them, above temperature 0 with the row's own seed. With a draft
    vocabulary, tokens of other prompts may be drafted too. In low precision, rounding depends on the size of the batch.

    Memory: keys and values of the longest prompt, its response and a block, for each row, in target and drafter; logits
    of one block a row.

    Args:
        target: the model whose text is kept; all its layers must have full attention.
        drafter: trained for this target; None gives plain decoding, one token a step.
        prompts: decoded all at once; memory limits their number.
        options: `SamplingOptions`; with a `seed`, prompt `i` draws with `seed + i`.

    Returns:
        One `Generation` a prompt, in order. Each has the seconds of the whole batch: do not add them up.

    Raises:
        ValueError: as `generate`; also a layer without full attention, an attention implementation that accepts no 4-D
            mask, or layers on several devices.
    """
    return Decoder(target, drafter).generate_batch(prompts, **options)
