"""Decode several prompts at once, each with the text that it gets alone."""

from collections.abc import Callable, Sequence
from typing import Unpack

import torch

from dpace.decode.costs import DRAFT
from dpace.decode.fixed import FixedBatch
from dpace.decode.generation import Generation, read_clock
from dpace.decode.loop import generate, generate_plain
from dpace.decode.request import Continuation, SamplingOptions, make_continuation
from dpace.decode.rows import Batch, Buffers, Row
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.fast.attention import NAME as GROUPED_ATTENTION
from dpace.target import Target

COMPILED_COLUMNS = 256
"""Compiled steps round the number of columns up to a multiple of this, so that other prompts have the same shapes."""


def compiled_columns(num_tokens: int) -> int:
    """Round the longest length of a text up to that of the caches of compiled steps."""
    return -(-num_tokens // COMPILED_COLUMNS) * COMPILED_COLUMNS


def batch_steps(
    target: Target, drafter: Drafter, num_rows: int, *, temperature: float = 0.0, context: int
) -> Callable[[int], None]:
    """Make a function that runs one step of `generate_batch` with `num_rows` rows.

    It takes the same argument as the function that `dpace.decode.costs.single_steps` makes. A verification of one token
    runs as it does without a drafter.

    Memory: keys and values of the context in all rows, and its features.
    """
    size, filler = drafter.block_size, [drafter.mask_token_id] * context
    samplers = [Sampler(temperature, seed=0, device=target.device) for _ in range(num_rows)]
    rows = [Row(Continuation(filler[:], context, 2 * size, set(), sampler)) for sampler in samplers]
    with torch.inference_mode(), target.capture(drafter.target_layer_ids) as captured:
        batch = Batch(target, drafter, rows, captured)
        batch.prefill()
        prompt_inputs = batch.positions, batch.features
    blocks = torch.full((num_rows, size), drafter.mask_token_id, device=target.device)

    @torch.inference_mode()
    def step(width: int) -> None:
        for row in rows:
            del row.text.text[context + 1 :]
        if width == 1:
            batch.captured = []
            batch.verify(blocks[:, :1])
        elif width > 1:
            with target.capture(drafter.target_layer_ids) as batch.captured:
                batch.verify(blocks[:, :width])
        else:
            batch.positions, batch.features = (x[:, :size] if width == DRAFT else x for x in prompt_inputs)
            batch.draft().tolist()  # waits for the device, as drawing does

    return step


def generate_batch(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    compile: bool = False,
    **options: Unpack[SamplingOptions],
) -> list[Generation]:
    """Decode several prompts at once with a drafter, each with the text that it gets alone.

    Each step drafts a block for every row and verifies the whole blocks (`width="full"`, `verify_rule="equality"` of
    `generate`). Rows accept different numbers of tokens, and leave the batch when they are done. In fp32 a row's text
    and accepted lengths are those of `generate`, above temperature 0 with the row's own seed; with a draft vocabulary,
    tokens of other prompts may be drafted too. In low precision, rounding depends on the size of the batch.

    Memory: keys and values of the longest prompt, its response and a block, for each row, in target and drafter; logits
    of one block a row.

    Args:
        target: the model whose text is kept; for more than one prompt, all its layers must have full attention.
        drafter: trained for this target; None gives plain decoding, one token a step.
        prompts: decoded all at once; memory limits their number.
        compile: `torch.compile` the steps after the first, with fixed shapes and, on a GPU, CUDA graphs. The first call
            takes a minute or more. For further calls take a `Decoder`, which keeps the caches that graphs refer to.
        options: see `SamplingOptions`; with a `seed`, prompt `i` draws with `seed + i`.

    Returns:
        One `Generation` a prompt, in order. The seconds of each are those of the whole batch: do not add them up.

    Raises:
        ValueError: as `generate`; for more than one prompt also a layer without full attention, or an attention
            implementation that accepts no 4-D mask.
    """
    if len(prompts) == 1 and not compile:
        if drafter is None:
            return [generate_plain(target, prompts[0], **options)]
        return [generate(target, drafter, prompts[0], width="full", **options)]
    return decode_rows(target, drafter, prompts, compile=compile, **options)


def decode_rows(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    compile: bool,
    find_buffers: Callable[[int, int], Buffers] | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Generation]:
    """Decode prompts as rows of a batch.

    Args:
        target: the model.
        drafter: None for plain decoding.
        prompts: any number.
        compile: see `generate_batch`.
        find_buffers: gives the caches of compiled steps for a number of rows and their longest text.
        options: see `SamplingOptions`.
    """
    if drafter is not None:
        drafter.check_target(target)
    rows, seed = [], options.pop("seed", None)
    for number, token_ids in enumerate(prompts):
        row_options: SamplingOptions = {**options, "seed": None if seed is None else seed + number}
        rows.append(Row(make_continuation(target, token_ids, **row_options)))
    if not rows:
        return []
    _check_batch(target, rows, compile=compile)
    started, longest = read_clock(target.device), 1 + max(row.limit for row in rows)
    with torch.inference_mode(), target.capture(drafter.target_layer_ids if drafter is not None else ()) as captured:
        if compile:
            columns = compiled_columns(longest)
            buffers = find_buffers(len(rows), columns) if find_buffers else Buffers(target, drafter, columns)
            batch = FixedBatch(target, drafter, rows, captured, buffers)
        else:
            batch = Batch(target, drafter, rows, captured)
        batch.prefill()
        first = read_clock(target.device)
        batch.drop_done()
        while batch.rows:
            batch.verify(batch.draft())
            batch.drop_done()
    seconds = (first - started, read_clock(target.device) - first)
    return [row.generation(drafter.block_size if drafter is not None else 1, seconds) for row in rows]


def _check_batch(target: Target, rows: Sequence[Row], *, compile: bool) -> None:
    """Refuse targets whose attention or rotary embedding does not allow rows of different lengths."""
    implementation = target.config._attn_implementation
    if implementation not in ("sdpa", "eager", GROUPED_ATTENTION):
        raise ValueError(
            f"the target's attention is {implementation}, which takes no 4-D mask; load it with "
            "attn_implementation='sdpa', or decode one prompt at a time with `generate`"
        )
    if compile and target.is_spread:
        raise ValueError("the target's layers are on several devices, which cannot be compiled; leave --compile out")
    boundary, longest = target.rotation_boundary, 1 + max(row.limit for row in rows)
    if boundary and len(rows) > 1 and longest > boundary:
        raise ValueError(
            f"a text may have {longest} tokens; past {boundary} this target rotates all positions of a batch anew: "
            "decode one prompt at a time with `generate`"
        )
