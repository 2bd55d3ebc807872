"""Speculative and plain decoding of one prompt: whole, piece by piece, or inside of transformers' `generate`.

`generate` takes a prompt and returns the response with its verifications and times. `Speculation` is the loop of steps:
plan, draft, verify, emit. `steps` has what the models compute in a step.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Unpack, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dpace.config import VerifyRule, Width
from dpace.decode.copies import PromptLookup
from dpace.decode.generation import Continuation, Generation, SamplingOptions, Step, collect, make_continuation
from dpace.decode.pace import Paces, Plan, widest_step
from dpace.decode.sampling import Sampler, verify_draft, verify_sampled
from dpace.decode.steps import State, draft_step, verify_step
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.cache import TextCache
from dpace.fast.packing import refresh_copies
from dpace.target import Target, stop_tokens


def generate(
    target: Target,
    drafter: Drafter | None,
    token_ids: Sequence[int] | Int[Tensor, "..."],
    *,
    width: Width = "auto",
    verify_rule: VerifyRule = "equality",
    paces: Paces | None = None,
    **options: Unpack[SamplingOptions],
) -> Generation:
    """Decode with a drafter or copies, which give the target's own text in fewer forward passes of the target.

    A step drafts a block after the last token. With width `auto` it sometimes copies the tokens that followed the last
    ones before instead, in the text (`PromptLookup`) or in earlier answers (`Recall`). The target reads the last token
    and the proposed ones, accepts a beginning of them, and adds its own next token.

    Memory: keys and values of prompt, response and block in target and drafter; logits of one block; on a CPU a second
    copy of the LM head.

    Args:
        target: the model whose text is kept.
        drafter: trained for this target; without it steps copy only.
        token_ids: the prompt, one row.
        width: the verification length. `full` verifies the whole block; a number from 2 to the drafter's block size
            verifies that number of tokens, the last one included; `auto` chooses the fastest length at each step, after
            it has measured this machine for about a second; `copies` does so and never drafts, as a baseline.
        verify_rule: `equality` drafts greedily and accepts tokens that equal the target's own draw; `speculative` draws
            the draft and accepts by speculative sampling. Both are the same at temperature 0.
        paces: measurements, experience and answers of earlier calls with width `auto`; without it each call measures
            the machine again.
        options: `SamplingOptions`. With the rule `equality` a `seed` gives the same text as in `generate_plain`, up to
            rounding.

    Returns:
        The response with its verifications and times.

    Raises:
        ValueError: an empty or over-long prompt, an option outside its range, or a drafter for another target.

    Source: DFlash (arXiv 2602.06036), `dflash_generate` of z-lab/dflash.
    """
    text = make_continuation(target, token_ids, **options)
    speculation = Speculation(target, drafter, text, width=width, verify_rule=verify_rule, paces=paces)
    return collect([text], speculation.steps(), widest_step(drafter, width), target.device)[0]


def generate_plain(
    target: Target, token_ids: Sequence[int] | Int[Tensor, "..."], **options: Unpack[SamplingOptions]
) -> Generation:
    """Decode one token at a time with the target alone, as the baseline.

    Arguments as in `generate`.
    """
    text = make_continuation(target, token_ids, **options)
    return collect([text], plain_steps(target, text), 1, target.device)[0]


@torch.inference_mode()
def plain_steps(target: Target, text: Continuation) -> Iterator[Step]:
    """Yield one token a step, decoded by the target alone."""
    cache = TextCache(target.config, text.limit + 1)
    inputs = torch.tensor([text.token_ids], device=target.device)
    width = 0  # of the step that reads the prompt
    while not text.is_done:
        hidden = target.hidden(inputs, cache)
        # (1, 1): the token stays on the device, where the next step reads it.
        inputs = text.draw(target.logits(hidden[0, -1:]))[None]
        yield text.take(0, inputs[0].tolist(), width=width)
        width = 1


class Speculation:
    """The loop of decoding one response.

    Between steps the target's cache holds exactly the tokens before the last one; the drafter's cache and the unread
    features together cover the same tokens.

    Attributes:
        max_width: largest number of tokens of a draft that the target verifies at once, the last token included.
        widest: the same of a step, which may also be a copy.
        pace: chooses at each step the verification length, and between drafts and copies; None always verifies
            `max_width` tokens of a draft.
        can_draft: whether the pace may choose a draft.

    Raises:
        ValueError: a drafter for another target, or a width outside its range.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        text: Continuation,
        *,
        width: Width = "auto",
        verify_rule: VerifyRule = "equality",
        paces: Paces | None = None,
    ):
        if drafter is not None:
            drafter.check_target(target)
            refresh_copies(drafter)
        elif not target.can_take_back:
            width = "full"  # of a block of one token: plain decoding
        size = widest_step(drafter, "full")
        rules = get_args(VerifyRule)
        if width not in ("full", "auto", "copies", *range(2, size + 1)) or verify_rule not in rules:
            raise ValueError(
                f"width is {width} and verify_rule {verify_rule}; a block of {size} has 2 to {size} tokens to verify: "
                f"give such a number, 'full', 'auto' or 'copies', and one of the rules {', '.join(rules)}"
            )
        self.target = target
        self.drafter = drafter
        self.text = text
        self.max_width = width if isinstance(width, int) else size
        self.can_draft = drafter is not None and width != "copies"
        self.widest = widest_step(drafter, width)
        # The text ends at position `limit`; after it there is room for the tokens of a step.
        capacity = text.limit + 1 + self.widest
        self.layer_ids: Sequence[int] = ()
        self.num_context = 0
        if drafter is not None:
            self.num_context = drafter.num_context
            self.layer_ids = drafter.target_layer_ids if self.can_draft else ()
            self.draft_rows = PackedRows(target, drafter.vocabulary, text.token_ids)
            self.drafter_cache = TextCache(drafter.config, capacity, drafter.num_slots)
        self.pace = self.recall = None
        if width in ("auto", "copies"):
            paces = paces or Paces()
            self.pace = paces.get(target, drafter, text.sampler.temperature)
            self.recall = paces.recall(drafter)
        self.samples_draft = verify_rule != "equality" and text.sampler.temperature > 0
        self.cache = TextCache(target.config, capacity)
        self.cache.record(self.widest)
        self.limits = torch.tensor([[text.limit]], device=target.device)
        self.unread: list[Float[Tensor, "1 new feature"]] = []
        self.num_read = 0
        self.lookup = PromptLookup(text.token_ids)

    @torch.inference_mode()
    def steps(self) -> Iterator[Step]:
        """Yield the first token, then the tokens that each verification emits."""
        text = self.text
        prompt = torch.tensor([text.token_ids], device=self.target.device)
        hidden, features = self.target.read(prompt, self.cache, self.layer_ids)
        self.unread.append(features)
        step = text.take(0, text.draw(self.target.logits(hidden[0, -1:])).tolist(), width=0)
        self.lookup.read()
        try:
            yield step
            while not text.is_done:
                yield self.step()
        finally:  # also where the caller stops early
            if self.recall:
                self.recall.add(text.token_ids, text.num_prompt)

    def step(self) -> Step:
        """Propose tokens, emit those that the target accepts and its own next one, and learn from the step."""
        started = time.perf_counter()
        text = self.text
        plan = self.plan()
        copied = plan.copy.token_ids[: plan.width - 1]
        # One transfer to the device: the position of the last token, then this token and the copied ones.
        row = torch.tensor([[text.start, text.token_ids[-1], *copied]], device=self.target.device)
        starts, block = row.tensor_split([1], dim=1)
        draft_probs = None
        if plan.is_drafted:
            plan, block, draft_probs = self.draft(plan, block, starts)
        width = block.shape[1]
        (logits,), features, _ = verify_step(self.target, self.cache, self.layer_ids, block, starts, self.limits)
        accepted, token_ids = self.accept(block[0, 1:], logits, draft_probs)
        step = text.take(accepted, token_ids, width=width, is_copied=not plan.is_drafted)
        # Of the tokens that were read, as many stay as were emitted: the last emitted token is read in the next step.
        num_kept = len(step.token_ids)
        self.unread.append(features[:, :num_kept])
        if not text.is_done:
            self.cache.crop(num_kept - width)  # also where none is taken back: once after each pass
        if self.pace is not None:
            seconds = time.perf_counter() - started  # of the whole step: reading the tokens waited for the device
            self.pace.learn(plan, step.token_ids, step.accepted, seconds=seconds, lookups=self.lookup.read())
        return step

    def plan(self) -> Plan:
        """Choose between a draft, a copy of the tokens that followed the last ones before, and a plain step."""
        if self.pace is None:
            return Plan(is_drafted=self.can_draft)
        # The target adds a token of its own to those that are copied.
        count = min(self.widest, self.text.remaining) - 1
        copies = [self.lookup.propose(count)]
        if self.recall:
            copies.append(self.recall.propose(self.text.token_ids, count))
        num_unread = min(self.text.start - self.num_read, self.num_context)
        return self.pace.plan(copies, num_unread, can_draft=self.can_draft)

    def draft(
        self, plan: Plan, last_ids: Int[Tensor, "1 1"], starts: Int[Tensor, "1 1"]
    ) -> tuple[Plan, Int[Tensor, "1 width"], Float[Tensor, "draft vocab"] | None]:
        """Draft a block, and choose how much of it the target verifies.

        Returns:
            The plan with this width; the last token and the draft tokens; and the distributions that these were drawn
            from, None where they are not draws.
        """
        drafter = self.drafter
        assert drafter is not None
        start = self.text.start
        features = self.unread[0]
        if len(self.unread) > 1:  # since the last draft there were steps without one
            features = torch.cat(self.unread, dim=1)
        features = features[:, -self.num_context :]  # no layer sees what is before
        # The features are of the last tokens before the anchor.
        positions = torch.arange(start - features.shape[1], start, device=features.device)[None]
        state = State(last_ids, starts, self.limits, features, positions)
        width = min(self.text.remaining + 1, self.max_width)
        block, draft = draft_step(drafter, self.draft_rows, self.drafter_cache, state, width)
        self.unread.clear()
        self.num_read = start
        if self.pace is not None:
            plan = self.pace.choose_width(plan, drafter.confidences(draft.scores[0]).tolist())
            block = block[:, : plan.width]
        num_draft = block.shape[1] - 1
        if not self.samples_draft or not num_draft:
            return plan, block, None
        # Only now, because the width has been chosen from the best tokens: it must not depend on what is drawn.
        tokens, probs = draft.draw(num_draft, self.text.sampler)
        return plan, torch.cat([last_ids, tokens[None]], dim=1), probs

    def accept(
        self,
        proposed: Int[Tensor, " draft"],
        logits: Float[Tensor, "slot vocab"],
        draft_probs: Float[Tensor, "draft vocab"] | None,
    ) -> tuple[int, list[int]]:
        """Accept the proposed tokens that the verify rule allows.

        Returns:
            Their number, and the tokens to emit: at least these and the target's next one.
        """
        text = self.text
        if draft_probs is not None:
            draft = proposed.tolist()
            target_probs = text.sampler.probs(text.sampler.scores(logits))
            accepted, next_token = verify_sampled(draft, draft_probs, target_probs, text.sampler)
            return accepted, [*draft[:accepted], next_token]
        drawn = text.draw(logits, proposed.tolist() if text.sampler.processors else ())
        # Proposed and drawn tokens come in one copy, because each copy waits for the device.
        token_ids = torch.cat([proposed, drawn]).tolist()
        draft = token_ids[: len(proposed)]
        target_tokens = token_ids[len(proposed) :]
        return verify_draft(draft, target_tokens), target_tokens


def stream(
    target: Target,
    drafter: Drafter | None,
    token_ids: Sequence[int] | Int[Tensor, "..."],
    *,
    width: Width = "auto",
    verify_rule: VerifyRule = "equality",
    paces: Paces | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    **options: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Yield the response's text as it is emitted, a piece for each pass of the target.

    Joined, the pieces are the text of `generate` with the same arguments. A character whose bytes are spread over
    tokens is held back until it is whole, so a piece may be empty. Arguments as in `generate`; `on_step` is called with
    each `Step` before its text is yielded.
    """
    text = make_continuation(target, token_ids, **options)
    speculation = Speculation(target, drafter, text, width=width, verify_rule=verify_rule, paces=paces)
    decode = partial(target.tokenizer.decode, skip_special_tokens=True)
    # The text up to `end` is out. Tokens from `start` on are decoded again with the next piece, because their text may
    # depend on the tokens before them.
    start = end = text.num_prompt
    for step in speculation.steps():
        on_step(step)
        new = decode(text.token_ids[start:])
        piece = ""
        if text.is_done or not new.endswith("\ufffd"):  # which stands for a character whose bytes are not whole
            piece = new[len(decode(text.token_ids[start:end])) :]
            if piece:  # tokens without text do not keep the space that the next ones begin with
                start = end
            end = len(text.token_ids)
        yield piece


def custom_generate(
    target: Target,
    drafter: Drafter,
    *,
    width: Width = "auto",
    streamer: BaseStreamer | None = None,
) -> Callable[..., Tensor]:
    """Make the argument of transformers' `generate` that lets it decode with a drafter.

        model.generate(**inputs, custom_generate=custom_generate(target, drafter), max_new_tokens=200)

    All of transformers' filters, stopping criteria and processors apply as usual, apart from `guidance_scale`, which is
    refused; `model` is `target.model`. Criteria are checked after every token, in the order of the text. Only one
    prompt of text, no beams, and only tokens as output are supported.

    Args:
        target: made from the model whose `generate` is called.
        drafter: trained for this target.
        width: as in `generate`. Drafts are verified by the rule `equality`.
        streamer: receives prompt and tokens. Give it here, because `generate` does not pass its own streamer on.
    """
    drafter.check_target(target)
    paces = Paces()

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Callable[..., Tensor],
        generation_config: Any,
        **model_inputs: Any,  # with the attention mask: transformers would pass a named one twice
    ) -> Tensor:
        _refuse_call(target, model, input_ids, generation_config, model_inputs)
        prompt = input_ids[0].tolist()
        target.refuse_rotation(1, len(prompt), generation_config.max_length)
        target.refresh_copies()
        sampler = Sampler(float(generation_config.do_sample), processors=logits_processor)
        stops = set(stop_tokens(generation_config))
        text = Continuation(prompt, len(prompt), generation_config.max_length - 1, stops, sampler)
        speculation = Speculation(target, drafter, text, width=width, paces=paces)
        show = streamer.put if streamer is not None else lambda tokens: None
        show(input_ids.cpu())
        written = input_ids
        # One token at a time: a criterion may end the text inside of what a step emits.
        for token in chain.from_iterable(step.token_ids for step in speculation.steps()):
            written = torch.cat([written, written.new_tensor([[token]])], dim=1)
            show(torch.tensor([token]))
            if bool(stopping_criteria(written, None).all()):
                break
        if streamer is not None:
            streamer.end()
        return written

    return decode


def _refuse_call(
    target: Target, model: PreTrainedModel, input_ids: Tensor, config: Any, model_inputs: Mapping[str, Any]
) -> None:
    """Refuse what a call of transformers' `generate` asks for and `custom_generate` does not do.

    Raises:
        ValueError: names all of it.
    """
    attention_mask = model_inputs.get("attention_mask")
    has_embeddings = model_inputs.get("inputs_embeds") is not None or not input_ids.numel()
    refused = {
        "another model than the drafter's target": model is not target.model,
        "several prompts or beams": len(input_ids) > 1 or config.num_beams > 1,
        "return_dict_in_generate": config.return_dict_in_generate,
        "a padded prompt": attention_mask is not None and not attention_mask.all(),
        "images or embeddings": has_embeddings or model_inputs.get("mm_encoder_outputs"),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "SynthID's watermark, which counts its calls": hasattr(config.watermarking_config, "ngram_len"),
    }
    asked = [feature for feature, is_asked in refused.items() if is_asked]
    if asked:
        raise ValueError(
            f"the call has {', '.join(asked)}; a drafter decodes the tokens of one prompt for its target, and "
            "returns tokens: leave this out, or the drafter, and for several prompts call dpace.generate_batch"
        )
