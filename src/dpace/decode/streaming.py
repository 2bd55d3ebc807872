"""Streaming of text, and decoding through transformers' own `generate`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Unpack

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dpace.config import VerifyRule, Width
from dpace.decode.generation import Step
from dpace.decode.loop import Speculation
from dpace.decode.pace import Paces
from dpace.decode.request import Continuation, SamplingOptions, make_continuation
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.target import Target, stop_tokens


def stream(
    target: Target,
    drafter: Drafter,
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
    tokens is held back until it is whole. Arguments as in `generate`; `on_step` is called with each `Step` before its
    text is yielded.
    """
    text = make_continuation(target, token_ids, **options)
    speculation = Speculation(target, drafter, text, width=width, verify_rule=verify_rule, paces=paces)
    pieces = TextPieces(target.tokenizer)
    for step in speculation.steps():
        on_step(step)
        piece = pieces.add(step.token_ids)
        if piece:
            yield piece
    if rest := pieces.flush():
        yield rest


class TextPieces:
    """A converter of tokens to text, piece by piece.

    Some tokens are decoded again with the next piece, because their text may depend on the tokens before them.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self._start = self._num_returned = 0

    def _text(self, end: int | None = None) -> str:
        return self.tokenizer.decode(self.token_ids[self._start : end], skip_special_tokens=True)

    def add(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that they add; empty while a character is not whole."""
        self.token_ids += token_ids
        return "" if not token_ids or self._text().endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        """Return the text that was held back."""
        piece = self._text()[len(self._text(self._num_returned)) :]
        if piece:  # tokens without text do not keep the space that the next ones begin with
            self._start = self._num_returned
        self._num_returned = len(self.token_ids)
        return piece


def custom_generate(
    target: Target,
    drafter: Drafter,
    *,
    width: Width = "auto",
    verify_rule: VerifyRule = "equality",
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
        width: as in `generate`.
        verify_rule: as in `generate`.
        streamer: receives prompt and tokens. Give it here, because `generate` does not pass its own streamer on.
    """
    drafter.check_target(target)
    paces = Paces()

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_inputs):
        if model is not target.model:
            raise ValueError("custom_generate was made for another model; make it with Target(model)")
        if len(input_ids) != 1 or generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
            raise ValueError(
                f"the call has {len(input_ids)} prompts, {generation_config.num_beams} beams and "
                f"return_dict_in_generate {generation_config.return_dict_in_generate}; a drafter decodes one prompt "
                "without beams and returns tokens: for several prompts use dpace.decode.generate_batch"
            )
        # Not a named argument: transformers would pass the mask twice.
        attention_mask = model_inputs.get("attention_mask")
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "the attention_mask hides tokens of the prompt; a drafter reads all of them: give a prompt without "
                "padding"
            )
        is_embedded = not input_ids.numel() or model_inputs.get("inputs_embeds") is not None
        if is_embedded or model_inputs.get("mm_encoder_outputs"):
            raise ValueError("the prompt has images or embeddings; a drafter decodes text only: give `input_ids` alone")
        guidance = generation_config.guidance_scale
        if guidance not in (None, 1) or hasattr(generation_config.watermarking_config, "ngram_len"):
            raise ValueError(
                f"guidance_scale is {guidance}, or the watermark is SynthID's, which counts its calls; a drafter "
                "cannot follow these: leave them out"
            )
        num_prompt = input_ids.shape[1]
        sampler = Sampler(float(generation_config.do_sample), processors=logits_processor)
        max_new_tokens = generation_config.max_length - num_prompt
        target.refuse_crossing(num_prompt, max_new_tokens)
        stops = set(stop_tokens(generation_config))
        text = Continuation(input_ids[0].tolist(), num_prompt, max_new_tokens, stops, sampler)
        target.refresh_copies()
        speculation = Speculation(target, drafter, text, width=width, verify_rule=verify_rule, paces=paces)
        written = input_ids[0].tolist()
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for token in (token for step in speculation.steps() for token in step.token_ids):
            written.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if bool(stopping_criteria(torch.tensor([written], device=input_ids.device), None).all()):
                break
        if streamer is not None:
            streamer.end()
        return torch.tensor([written], device=input_ids.device)

    return decode
