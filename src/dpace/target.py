"""The frozen target: the features of chosen layers, the embedding and the LM head of any decoder-only Hugging Face model."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpace.fast.packing import PackedLinear, Product, pack, packed_product
from dpace.fast.speed_up import speed_up
from dpace.fast.stack import FusedStack, stack_layers
from dpace.head import Head

MIN_SHARED = 16
"""Shared beginnings shorter than this, in tokens, are not worth a forward pass of their own."""


def shared_prefix(rows: list[list[int]]) -> int:
    """Length of the beginning that all rows share."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


class _StopForward(Exception):
    """Ends a forward pass that runs for its features only."""


class Target:
    """A causal LM whose text is kept. It is never trained and only read through this class.

    Args:
        model: decoder layers, a norm and an LM head; put in eval mode, its parameters frozen.
        tokenizer: its tokenizer; only needed for text.

    Raises:
        ValueError: the model has no list of decoder layers, or its embedding or head is more than a scaled table.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self.model: Any = model.eval().requires_grad_(False)  # transformers types its models too narrowly
        self.tokenizer: Any = tokenizer
        self.thinking = False  # what chat templates that have this switch are given
        self.config = model.config.get_text_config(decoder=True)
        self.decoder: Any = model.get_decoder()
        self.layers = self._find_layers()
        self.embed_scale, self.head = self._probe()

    @classmethod
    def load(
        cls, name: str, *, dtype: torch.dtype | None = None, device: str | None = None, thinking: bool = False
    ) -> "Target":
        """Load model and tokenizer from a folder, the Hugging Face cache or the Hub.

        Memory: the weights; on a CPU twice, where there is room (see `dpace.fast.packing`).

        Args:
            name: folder or Hub id.
            dtype: of the weights; by default bf16 on a GPU, and fp32 on a CPU, where texts are then equal token for token.
            thinking: let chat templates that have this switch turn thinking on.
            device: by default this process's GPU (`LOCAL_RANK` under torchrun) where there is one, else `cpu`.

        Raises:
            OSError: nothing of that name can be read.
        """
        device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model = model.to(device)
        speed_up(model)
        target = cls(model, AutoTokenizer.from_pretrained(name))
        target.thinking = thinking
        return target

    @property
    def name(self) -> str:
        """Where the model came from: a Hub id, or the full path of a folder; empty for one that was made in memory."""
        name = self.model.config._name_or_path
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name

    @property
    def short_name(self) -> str:
        """The model's own name, without owner, folder or revision; empty for one that was made in memory."""
        parts = Path(self.name).parts
        if (
            len(parts) > 2 and parts[-2] == "snapshots"
        ):  # models--owner--name/snapshots/revision of the Hugging Face cache
            return parts[-3].split("--")[-1]
        return Path(self.name).name

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.device

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of one layer's output."""
        return self.config.hidden_size

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a response, from the generation config."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else self.config.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def hidden(
        self,
        token_ids: Int[Tensor, "batch seq"],
        *,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Run the decoder and its final norm: what the LM head reads. Arguments as the model's own.

        Args:
            token_ids: behind those in the cache.
            cache: receives their keys and values.
            attention_mask: "batch 1 seq key", added to the scores; by default each token sees those before it and itself.
            position_ids: by default those behind the cached tokens.
        """
        found = self._stack and self._stack.run(token_ids, cache, attention_mask, position_ids)
        if found is not None:
            return found
        kwargs = {"cache": cache, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.decoder(token_ids, use_cache=True, **kwargs).last_hidden_state

    @functools.cached_property
    def _stack(self) -> FusedStack | None:
        """All layers in one loop, where they are fused."""
        return stack_layers(self.decoder)

    def logits(self, hidden: Float[Tensor, "row hidden"]) -> Float[Tensor, "row vocab"]:
        """Logits of a few rows, as decoding computes them: `head.logits` up to rounding.

        Memory: on a CPU a second copy of the head, see `dpace.fast.packing`.
        """
        if self._head_product is None:
            return self.head.logits(hidden)
        return self.head.finish(self._head_product(hidden.to(self.head.weight.dtype)))

    @functools.cached_property
    def _head_product(self) -> Product | None:
        """With the packed copy of the head's weight, where there is one."""
        layer = self.model.get_output_embeddings()
        return packed_product(layer) if isinstance(layer, PackedLinear) else pack(self.head.weight)

    def embed(self, token_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        """Input embeddings as the first layer sees them."""
        weight = self.model.get_input_embeddings().weight
        return nn.functional.embedding(token_ids, weight) * self.embed_scale

    @contextmanager
    def capture(self, target_layer_ids: Sequence[int]) -> Iterator[list[Tensor]]:
        """Collect the outputs of chosen layers while the model runs inside the `with` block.

        The yielded list holds, after each forward pass, the last outputs in the order of `target_layer_ids`; nothing else is
        kept. Layer `i` is the 0-based decoder layer, its output `hidden_states[i + 1]` of transformers.
        """
        captured: list[Tensor] = [torch.empty(0)] * len(target_layer_ids)

        def keep(index):
            def hook(_module, _args, output):
                captured[index] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.layers[layer].register_forward_hook(keep(i)) for i, layer in enumerate(target_layer_ids)]
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def features(
        self, token_ids: Int[Tensor, "batch seq"], target_layer_ids: Sequence[int], *, with_head_input: bool = False
    ) -> Float[Tensor, "batch seq feature"]:
        """Concatenate the outputs of the chosen layers; layers above the last one and the LM head do not run.

        Rows may be padded on the right: the model is causal, so real tokens do not see the padding. A beginning that all rows
        share, such as a system prompt with examples, is read once.

        Memory: O(tokens x feature) for the result, and one layer's activations.

        Args:
            token_ids: any text.
            target_layer_ids: 0-based decoder layers whose output is used.
            with_head_input: run all layers and append what the LM head reads.

        Returns:
            `feature = len(target_layer_ids) * hidden`, and `hidden` more `with_head_input`, in the dtype of the target, detached.
        """
        num_shared = shared_prefix(token_ids.tolist())
        if len(token_ids) == 1 or not MIN_SHARED <= num_shared < token_ids.shape[1]:
            return self._run(token_ids, target_layer_ids, with_head_input=with_head_input, cache=None)
        cache: Any = DynamicCache(config=self.config)
        shared = self._run(token_ids[:1, :num_shared], target_layer_ids, with_head_input=with_head_input, cache=cache)
        for layer in cache.layers if with_head_input else cache.layers[: max(target_layer_ids) + 1]:
            layer.batch_repeat_interleave(len(token_ids))
        rest = self._run(token_ids[:, num_shared:], target_layer_ids, with_head_input=with_head_input, cache=cache)
        return torch.cat([shared.expand(len(token_ids), -1, -1), rest], dim=1)

    def _run(self, token_ids, target_layer_ids: Sequence[int], *, with_head_input: bool, cache: Cache | None) -> Tensor:
        """Run as far as is needed: to the last of the layers, or to the head's input."""
        head_input = []

        def stop(_module, args, _output=None):
            head_input.extend(args if with_head_input else ())
            raise _StopForward

        with self.capture(target_layer_ids) as captured:
            if with_head_input:
                handle = self.model.get_output_embeddings().register_forward_pre_hook(stop)
            else:
                handle = self.layers[max(target_layer_ids)].register_forward_hook(stop)
            try:
                self.model(token_ids, cache=cache, use_cache=cache is not None)
            except _StopForward:
                pass
            finally:
                handle.remove()
            return torch.cat([*captured, *head_input], dim=-1)

    def _find_layers(self) -> nn.ModuleList:
        found = [child for child in self.decoder.children() if isinstance(child, nn.ModuleList)]
        layers = [child for child in found if len(child) == self.config.num_hidden_layers]
        if len(layers) != 1:
            raise ValueError(
                f"{type(self.model).__name__} has {len(layers)} lists of {self.config.num_hidden_layers} decoder layers; "
                "dpace needs a model built as embedding, one list of decoder layers, norm and LM head"
            )
        return layers[0]

    @torch.no_grad()
    def _probe(self) -> tuple[float, Head]:
        """Run one token to learn the scale of the embedding and of the logits, and that nothing else is applied."""
        seen = {}
        head_module = self.model.get_output_embeddings()
        hooks = [
            self.layers[0].register_forward_pre_hook(
                lambda _module, args, kwargs: seen.update(first=args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            ),
            head_module.register_forward_pre_hook(lambda _module, args: seen.update(last=args[0])),
            self.decoder.register_forward_hook(lambda _module, _args, out: seen.update(decoded=out.last_hidden_state)),
        ]
        try:
            token = torch.tensor([[self.config.vocab_size // 2]], device=self.model.device)
            logits = self.model(token, use_cache=False).logits.float().flatten()
        finally:
            for hook in hooks:
                hook.remove()
        if not torch.equal(seen["decoded"].flatten(), seen["last"].flatten()):
            raise ValueError(
                f"{type(self.model).__name__} changes its hidden states between decoder and LM head: dpace drafters share "
                "the target's head and cannot use it"
            )
        row = self.model.get_input_embeddings().weight[token[0, 0]].float()
        first = seen["first"].float().flatten()
        scale = self._ratio(first, row, "input embedding")
        softcap = getattr(self.config, "final_logit_softcapping", None)
        raw = head_module.weight.float() @ seen["last"].float().flatten()
        uncapped = logits if softcap is None else softcap * torch.atanh((logits / softcap).clamp(-0.999999, 0.999999))
        return scale, Head(head_module.weight, self._ratio(uncapped, raw, "LM head"), softcap)

    def _ratio(self, found: Tensor, table: Tensor, what: str) -> float:
        """The factor between what the model computed and the plain table, 1 where they agree up to rounding."""
        ratio = float(found @ table / (table @ table))
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 3e-2
        error = float((found - ratio * table).norm() / found.norm())
        if not error <= tolerance:
            raise ValueError(
                f"the {what} of {type(self.model).__name__} is more than a scaled table (relative difference {error:.2g}): "
                "dpace drafters share the target's embedding and head and cannot use it"
            )
        return 1.0 if abs(ratio - 1) < tolerance else ratio
