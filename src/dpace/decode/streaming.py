"""Streaming of text, and decoding through transformers' own `generate`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dpace.config import VerifyRule, Width
from dpace.decode.generation import Continuation, SamplingOptions, Step, make_continuation
from dpace.decode.loop import Speculation
from dpace.decode.pace import Paces
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
        if piece := pieces.add(step.token_ids, is_last=text.is_done):
            yield piece


class TextPieces:
    """A converter of tokens to text, piece by piece.

    Some tokens are decoded again with the next piece, because their text may depend on the tokens before them.
    """

    def __init__(self, tokenizer: Any):
        self.decode = partial(tokenizer.decode, skip_special_tokens=True)
        self.token_ids: list[int] = []
        self.first = 0
        self.num_shown = 0

    def add(self, token_ids: Sequence[int], *, is_last: bool = False) -> str:
        """Add tokens and return the text that they add; empty while a character is not whole."""
        self.token_ids += token_ids
        text = self.decode(self.token_ids[self.first :])
        if text.endswith("\ufffd") and not is_last:
            return ""
        piece = text[len(self.decode(self.token_ids[self.first : self.num_shown])) :]
        if piece:  # tokens without text do not keep the space that the next ones begin with
            self.first = self.num_shown
        self.num_shown = len(self.token_ids)
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
        # Not a named argument: transformers would pass the mask twice.
        attention_mask = model_inputs.get("attention_mask")
        has_embeddings = model_inputs.get("inputs_embeds") is not None or not input_ids.numel()
        refused = {
            "another model than the drafter's target": model is not target.model,
            "several prompts or beams": len(input_ids) > 1 or generation_config.num_beams > 1,
            "return_dict_in_generate": generation_config.return_dict_in_generate,
            "a padded prompt": attention_mask is not None and not attention_mask.all(),
            "images or embeddings": has_embeddings or model_inputs.get("mm_encoder_outputs"),
            "guidance_scale": generation_config.guidance_scale not in (None, 1),
            "SynthID's watermark, which counts its calls": hasattr(generation_config.watermarking_config, "ngram_len"),
        }
        if found := [name for name, is_asked in refused.items() if is_asked]:
            raise ValueError(
                f"the call has {', '.join(found)}; a drafter decodes the tokens of one prompt for its target, and "
                "returns tokens: leave this out, or the drafter, and for several prompts call dpace.generate_batch"
            )
        prompt = input_ids[0].tolist()
        target.refuse_rotation(1, len(prompt), generation_config.max_length)
        target.refresh_copies()
        sampler = Sampler(float(generation_config.do_sample), processors=logits_processor)
        stops = set(stop_tokens(generation_config))
        text = Continuation(prompt, len(prompt), generation_config.max_length - 1, stops, sampler)
        speculation = Speculation(target, drafter, text, width=width, verify_rule=verify_rule, paces=paces)
        written = input_ids
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for token in (token for step in speculation.steps() for token in step.token_ids):
            written = torch.cat([written, written.new_tensor([[token]])], dim=1)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if bool(stopping_criteria(written, None).all()):
                break
        if streamer is not None:
            streamer.end()
        return written

    return decode
