"""Targets and drafters on paper: shapes and dtypes from `config.json`, no weights."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)

from dpace.drafter import Drafter
from dpace.head import Head
from dpace.loading import attention_of, one_line
from dpace.probe import find_layers
from dpace.target import Target
from dpace.target_files import find_places


class PaperTarget(Target):
    """A target of fake tensors: it has shapes and dtypes, and computes nothing.

    Whether embedding and head are plain tables is not looked at, since that takes weights.
    """

    cache_ability: Any = "crop"

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer: Any = None
        self.thinking = False
        self.config = model.config.get_text_config(decoder=True)
        self.decoder: Any = model.get_decoder()
        self.layers = find_layers(self.model, self.decoder, self.config)
        weight = self.model.get_output_embeddings().weight
        self.embed_scale, self.head = 1.0, Head(weight, 1.0, getattr(self.config, "final_logit_softcapping", None))

    def features(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> Tensor:
        """Give features of the right shape."""
        width = (len(target_layer_ids) + with_head_input) * self.hidden_size
        return self.head.weight.new_empty(*token_ids.shape, width)

    @torch.no_grad()
    def run(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool) -> None:
        """Run the operations that compute features, for those who count them."""
        self._run(token_ids, target_layer_ids, with_head_input=with_head_input, cache=None)


def read_shape(name: str) -> PretrainedConfig:
    """Read the config of a target; nothing else of it is needed.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know.
    """
    with one_line(f"the config of {name}", "name the folder or the Hub id of a causal LM"):
        config = find_places(name).config
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"transformers has no causal LM for {type(config).__name__}")
        return config


@contextmanager
def on_paper(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Let all tensors made inside the `with` block be fake: shapes without values or memory.

    Args:
        mode: that an earlier block yielded, to go on with its tensors.
    """
    with mode or FakeTensorMode() as entered, initialization.no_init_weights():
        yield entered


def make_target(config: PretrainedConfig, dtype: torch.dtype) -> PaperTarget:
    """Make a target on paper; call it inside `on_paper`.

    Raises:
        ValueError: a config that its own class refuses.
    """
    attention = attention_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    with one_line(f"a model of {type(config).__name__}", "name another target"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
        model.tie_weights()
    return PaperTarget(model)


def make_drafter(target: PaperTarget, options: dict[str, Any]) -> Drafter:
    """Make a drafter for a target on paper; call it inside `on_paper`."""
    shape = {name: value for name, value in options.items() if name != "init"}
    return Drafter.from_target(target, **shape).requires_grad_(True)
