"""The frozen target: features, embedding and LM head of any decoder-only Hugging Face model."""

import functools
from collections.abc import Callable, Collection, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dpace.config import Device, DeviceMap, TargetShard
from dpace.fast.cache import probe_cache
from dpace.fast.eight_bits import EightBitLinear, is_in_eight_bits, to_eight_bits
from dpace.fast.fusion import LayerOutputs, run_layers
from dpace.fast.packing import PackedLinear, refresh_copies
from dpace.fast.speed_up import speed_up
from dpace.system import ranks
from dpace.system.device import default_dtype, dtype_name, find_device
from dpace.system.progress import quoted
from dpace.system.provenance import FINGERPRINT_VALUES, fingerprint
from dpace.target.files import full_name, gather_tables, open_target
from dpace.target.head import LmHead
from dpace.target.probe import find_layers, find_tables

SAMPLE = """Question: A shop sells 12 boxes of 24 pencils for $3.50 each. How much is one pencil?
Answer: One box has 24 pencils, so a pencil costs 3.50 / 24 = 0.15 dollars. **The answer is $0.15.**

def mean(values: list[float]) -> float:
    # An empty list has no mean.
    return sum(values) / len(values) if values else 0.0

{"name": "Ada Lovelace", "born": 1815, "city": "London", "fields": ["mathematics", "computing"]}

The river rises in the mountains, and in spring it carries so much water that the old bridge has to be closed. Wir gehen
heute nach Hause; il fait beau, y mañana también. Dear Dr. Smith, thank you for your letter of 3 May!"""
"""Prose, arithmetic, code and data, for which the channels of a target in 8 bits are scaled."""
MIN_SHARED = 16
"""Least number of shared first tokens that are worth a forward pass of their own."""
MIN_SAVED = 1 / 8
"""Least share of tokens that this has to save: on a CPU, 0.09 takes 1.03 times as long, and 0.19 takes 0.94."""


def stop_tokens(config: Any) -> list[int]:
    """Return the tokens that end a response by a config, of generation or of a model: none, one or several.

    Raises:
        ValueError: it names what is no token.
    """
    eos = config.eos_token_id
    if eos is None:
        return []
    tokens = list(eos) if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in tokens):
        raise ValueError(
            f"the target's eos_token_id is {quoted(eos)}, expected a token's number or a list of them; correct its "
            "generation_config.json"
        )
    return tokens


def answer_end(token_ids: Sequence[int], stops: Collection[int]) -> int | None:
    """Return the number of tokens up to and with the first stop token; None without one."""
    return next((i for i, token in enumerate(token_ids, start=1) if token in stops), None)


class Features(NamedTuple):
    """What a training reads of the target for each token of one or several texts."""

    layers: Float[Tensor, "*batch seq feature"]
    """Outputs of the chosen layers, side by side."""
    head_input: Float[Tensor, "*batch seq hidden"] | None = None
    """Input of the LM head; None where it was not asked for."""

    def change(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """Apply a function to what there is."""
        head_input = self.head_input
        if head_input is not None:
            head_input = function(head_input)
        return Features(function(self.layers), head_input)


class Target:
    """A causal LM whose text is kept; it is never trained.

    Fast copies of its weights are made (`dpace.fast`). They are compared with the weights once a request: decoding and
    `features` see changes that torch counts. Changes through `.data` are not seen, and a call of `model` itself sees
    none before `refresh_copies`: who edits weights in these ways does it at their own risk.

    Args:
        model: decoder layers, a norm and an LM head; it is put in eval mode and its parameters are frozen.
        tokenizer: its tokenizer; only needed for text.

    Raises:
        ValueError: the model has no list of decoder layers, or its embedding or head is more than a scaled table.
    """

    is_sharded = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self.model: Any = model.eval().requires_grad_(False)  # transformers types its models too narrowly
        self.tokenizer: Any = tokenizer
        self.thinking = False  # passed to chat templates that have this switch
        self._outputs = LayerOutputs()
        self.config = model.config.get_text_config(decoder=True)
        self.decoder: Any = model.get_decoder()
        self.layers = find_layers(self.model)
        refresh_copies(self.model)
        self.embed_scale, self.head = self._find_tables()

    def _find_tables(self) -> tuple[float, LmHead]:
        return find_tables(self)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: Device = "auto",
        device_map: DeviceMap = None,
        thinking: bool = False,
        shard: TargetShard = "none",
    ) -> "Target":
        """Load model and tokenizer from a folder, a GGUF file, the Hugging Face cache or the Hub.

        Memory: the weights; on a CPU twice, where there is room (see `dpace.fast.packing`).

        Args:
            name: folder or Hub id, of a model or of a LoRA adapter, which is merged; or a GGUF file. It is found as
                the command line finds it, see `dpace.target.locate.find_target`.
            dtype: dtype of the weights; by default bf16 on a GPU, and fp32 on a CPU, where texts are then equal token
                for token.
            thinking: turn thinking on in chat templates that have this switch.
            device: `auto` is this process's accelerator (`LOCAL_RANK` under torchrun) where there is one, else `cpu`.
            device_map: `auto` spreads the layers over all GPUs.
            shard: how the layers are spread over the ranks of a training, see `ShardedTarget`.

        No code that a checkpoint names is run, and attention is torch's own whatever the config names.

        Raises:
            OSError: there is no readable model of that name.
            ValueError: see `dpace.target.files.open_target`.
        """
        place = find_device(device)
        in_eight_bits = dtype == torch.int8
        if in_eight_bits:
            dtype = torch.float32
            if place.type != "cpu" or shard != "none":
                raise ValueError(
                    f"--dtype int8 is for one process on a CPU, and this is {place.type} with --train.target-shard "
                    f"{shard}; use bfloat16"
                )
        model, tokenizer = open_target(
            name, dtype=dtype or default_dtype(place), device=place, device_map=device_map, shard=shard
        )
        if shard != "none" and ranks.num_ranks() > 1:
            target = ShardedTarget(model, tokenizer)
        else:
            target = cls(model, tokenizer)
            if in_eight_bits:
                to_eight_bits(model, target.layers, tokenizer(SAMPLE, return_tensors="pt").input_ids)
            speed_up(model)
        target.thinking = thinking
        return target

    @property
    def name(self) -> str:
        """The model's Hub id, full path of its folder or name of its GGUF file; empty for a model made in memory."""
        return full_name(self.model.config._name_or_path)

    @property
    def short_name(self) -> str:
        """The model's own name, without owner or folder; empty for a model made in memory."""
        return Path(self.name).name

    @property
    def dtype_name(self) -> str:
        """Dtype of what it multiplies with, as configs have it: `int8`, or that of its weights."""
        return "int8" if is_in_eight_bits(self.model) else dtype_name(self.model.dtype)

    @property
    def norm_mean(self) -> float:
        """Mean of the factors of the final norm, the last one beside the layers; 1 where there are none."""
        mean = 1.0
        for child in self.decoder.children():
            factors = next(child.parameters(recurse=False), self.head.weight)
            if factors.dim() == 1:
                # No norm changes these numbers itself, so what comes out are its factors; some families store others.
                signs = torch.ones_like(factors)
                signs[::2] = -1
                mean = float((child(signs) * signs).mean())
        return mean

    @property
    def sha256(self) -> str:
        """Fingerprint of its weights."""
        return fingerprint(self.model, num_values=FINGERPRINT_VALUES)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where all that a target takes and gives is; its layers may be on others."""
        return self.model.get_input_embeddings().weight.device

    @property
    def is_spread(self) -> bool:
        """Whether the layers are on several devices."""
        return len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of one layer's output."""
        return self.config.hidden_size

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a response, from the generation config."""
        return stop_tokens(self.model.generation_config or self.config)

    @property
    def context(self) -> int | None:
        """Longest text in tokens; None where there is no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def rotation_boundary(self) -> int | None:
        """Text length past which all positions of a batch are rotated anew (longrope, dynamic); else None."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") not in ("longrope", "dynamic"):
            return None
        return rope.get("original_max_position_embeddings") or self.config.max_position_embeddings

    def read(
        self,
        token_ids: Int[Tensor, "batch seq"],
        cache: Cache | None = None,
        layer_ids: Sequence[int] = (),
        *,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq feature"]]:
        """Run the decoder and its final norm.

        Args:
            token_ids: new tokens, which follow those in the cache.
            cache: receives their keys and values.
            layer_ids: 0-based decoder layers whose outputs are the features.
            attention_mask: "batch 1 seq key", added to the scores; by default each token sees itself and those before
                it.
            position_ids: by default the positions after the cached tokens.

        Returns:
            The LM head's input; and the features, `len(layer_ids) * hidden` wide.
        """
        # `run_layers` needs no hooks, but a compiled step after it does, and cannot add them.
        with self._outputs.record(self.layers, layer_ids) as recorded:
            done = run_layers(self.decoder, token_ids, cache, layer_ids, mask=attention_mask, position_ids=position_ids)
            if done is None:  # the decoder's own code has to run
                out = self.decoder(
                    token_ids,
                    cache=cache,
                    position_ids=position_ids,
                    attention_mask=attention_mask,
                    use_cache=cache is not None,
                )
                done = out.last_hidden_state.to(self.device), [recorded[layer_id] for layer_id in layer_ids]
        hidden, outputs = done
        features = self._join(outputs) if outputs else hidden[..., :0]
        return hidden, features

    def hidden(self, token_ids: Int[Tensor, "batch seq"], cache: Cache | None = None) -> Tensor:
        """Run the decoder and its final norm, and return the LM head's input, "batch seq hidden"; see `read`."""
        return self.read(token_ids, cache)[0]

    @functools.cached_property
    def can_take_back(self) -> bool:
        """Whether its caches can take back a rejected draft; tried out once, when it is first asked for."""
        return probe_cache(self)

    def logits(self, hidden: Float[Tensor, "row hidden"]) -> Float[Tensor, "row vocab"]:
        """Compute logits of a few rows for decoding; equal to `head.logits` up to rounding.

        Memory: on a CPU a second copy of the head, see `dpace.fast.packing`.
        """
        layer = self.model.get_output_embeddings()
        if not isinstance(layer, (PackedLinear, EightBitLinear)):
            return self.head.logits(hidden)
        return self.head.finish(layer(hidden.to(self.head.weight.dtype)))

    def refresh_copies(self) -> None:
        """Drop fast copies of weights that have changed; every request calls it once."""
        refresh_copies(self.model)

    def embed(self, token_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        """Compute the input embeddings as the first layer sees them."""
        weight = self.model.get_input_embeddings().weight
        return nn.functional.embedding(token_ids, weight) * self.embed_scale

    def features(
        self, token_ids: Int[Tensor, "batch seq"], layer_ids: Sequence[int]
    ) -> Float[Tensor, "batch seq feature"]:
        """Return `read_features` of the layers alone."""
        return self.read_features(token_ids, layer_ids).layers

    @torch.no_grad()
    def read_features(
        self, token_ids: Int[Tensor, "batch seq"], layer_ids: Sequence[int], *, with_head_input: bool = False
    ) -> Features:
        """Concatenate the outputs of the chosen layers; higher layers do not run, and the LM head never does.

        Rows may be padded on the right: the model is causal, so real tokens do not see the padding. A beginning that
        all rows share, such as a system prompt with examples, is read once.

        Memory: O(tokens x feature) for the result, and one layer's activations.

        Args:
            token_ids: any text; from the CPU it is read without waiting for the device.
            layer_ids: 0-based decoder layers whose output is used.
            with_head_input: run all layers, and return the LM head's input too.

        Returns:
            Features, detached, in the dtype of the target. `feature` is `len(layer_ids) * hidden`.
        """
        num_rows, num_tokens = token_ids.shape
        self.refuse_rotation(num_rows, num_tokens, num_tokens)
        self.refresh_copies()
        num_shared = len(commonprefix(token_ids.tolist()))
        token_ids = token_ids.to(self.device, non_blocking=True)
        is_part = MIN_SHARED <= num_shared < num_tokens
        # The first row reads what is shared for all others.
        is_worth_it = num_shared * (num_rows - 1) >= MIN_SAVED * num_rows * num_tokens
        if self.is_sharded or not is_part or not is_worth_it or not self.can_take_back:
            return self._run(token_ids, layer_ids, with_head_input)
        cache: Any = DynamicCache(config=self.config)
        shared = self._run(token_ids[:1, :num_shared], layer_ids, with_head_input, cache)
        cache.reorder_cache(token_ids.new_zeros(num_rows))  # row 0 for each
        rest = self._run(token_ids[:, num_shared:], layer_ids, with_head_input, cache)
        joined = []
        for beginning, end in zip(shared, rest, strict=True):
            if beginning is not None and end is not None:
                joined.append(torch.cat([beginning.expand(num_rows, -1, -1), end], dim=1))
        return Features(*joined)

    def join_features(self, layer_ids: Sequence[int], *, with_head_input: bool = False) -> None:
        """Take part in the calls of `read_features` by other ranks, where this one has no text left."""
        self.read_features(torch.zeros(1, 1, dtype=torch.long), layer_ids, with_head_input=with_head_input)

    def rotation_fault(self, num_rows: int, num_prompt: int, num_tokens: int) -> str:
        """Say what is wrong with a text that grows past the rotation's boundary, or with several where one is longer.

        Args:
            num_rows: number of texts, which may have different lengths.
            num_prompt: tokens that are read at once.
            num_tokens: tokens that a text may have in the end.

        Returns:
            The length, the boundary and what to do; empty where nothing is wrong.
        """
        boundary = self.rotation_boundary
        if not boundary or num_tokens <= boundary or (num_rows == 1 and num_prompt > boundary):
            return ""
        return (
            f"a text may have {num_tokens} tokens; past {boundary} this target rotates all positions anew: ask for "
            "fewer tokens, decode long prompts one prompt at a time with `generate`, and train with "
            f"--train.max-length {boundary}"
        )

    def refuse_rotation(self, num_rows: int, num_prompt: int, num_tokens: int) -> None:
        """Refuse what `rotation_fault` finds.

        Raises:
            ValueError: the fault.
        """
        if fault := self.rotation_fault(num_rows, num_prompt, num_tokens):
            raise ValueError(fault)

    def _run(
        self, token_ids: Tensor, layer_ids: Sequence[int], with_head_input: bool, cache: Cache | None = None
    ) -> Features:
        """Run the model up to the last of the layers, or up to the head's input."""
        if with_head_input:
            head_input, layers = self.read(token_ids, cache, layer_ids)
            return Features(layers, head_input)

        with self._outputs.record(self.layers, layer_ids, is_last=True) as recorded:
            self.model(token_ids, cache=cache, use_cache=cache is not None)
        return Features(self._join([recorded[layer_id] for layer_id in layer_ids]))

    def _join(self, outputs: Sequence[Tensor]) -> Tensor:
        """Concatenate the outputs of layers, which may be on several devices."""
        return torch.cat([output.to(self.device) for output in outputs], dim=-1)


class ShardedTarget(Target):
    """A target for training, of which each rank has a share of the layers, and both tables.

    All ranks have to call its methods together, as often and in the same order, each with a text of its own. A layer's
    weights are gathered where it runs. A beginning that rows share is read once for each row.

    Memory: the layers' weights over the number of ranks, the tables, and one whole layer.
    """

    is_sharded = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._sha256 = fingerprint(model, num_values=FINGERPRINT_VALUES)
        gather_tables(model)
        super().__init__(model, tokenizer)

    @property
    def sha256(self) -> str:
        """Fingerprint of its weights, the same as of the whole target."""
        return self._sha256
