"""The DFlash drafter: making, checking, saving and loading it."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dpace.modeling_dflash
from dpace.blocks import Reach, build_target_layer_ids
from dpace.config import DrafterConfig
from dpace.drafter.selector import Selector
from dpace.drafter.spec import (
    FIX,
    SAME_AS_OPTIONS,
    SCALES,
    SELECTORS,
    UNREAD,
    DrafterSpec,
    as_float32,
    read_folder,
)
from dpace.drafter.vocabulary import DraftVocabulary, drafted_tokens, load_vocabulary, read_tokens
from dpace.fast.speed_up import speed_up
from dpace.modeling_dflash import DFlashDraftModel
from dpace.system.device import dtype_name
from dpace.system.ledger import JsonObject, filling
from dpace.system.loading import quiet_library, refuse_infinite, refuse_mismatch, translate_library_errors
from dpace.target import Target
from dpace.target.locate import find_drafter
from dpace.target.probe import rope_of

CONV_GROUP_SIZE = 16
"""Channels that share what a convolution adds to its taps, as published."""
ANSWERS_FILE = "answers.json"
"""Tokens of the answers that the drafter was trained on; engines that do not know it load the drafter unchanged."""


def facts_of(target: Target) -> JsonObject:
    """Return the values of a spec that have to be the target's own."""
    return {
        "num_target_layers": target.num_layers,
        "vocab_size": len(target.head.weight),
        "hidden_size": target.hidden_size,
        "rope_parameters": rope_of(target.config),
        **scales_of(target),
    }


def size_fault(spec: DrafterSpec, target: Target) -> str:
    """Say which size of a drafter shows that it was trained for another target; empty where none does."""
    facts = facts_of(target)
    for name in ("hidden_size", "vocab_size", "num_target_layers"):
        if getattr(spec, name) != facts[name]:
            return f"{name} is {getattr(spec, name)} and the target {target.name} has {facts[name]}"
    return ""


def scales_of(target: Target) -> dict[str, float | None]:
    """Return what the target does to embeddings and logits, with which a drafter decodes whatever its config says."""
    values = target.embed_scale, target.head.multiplier, target.head.softcap
    return {name: value and as_float32(value) for name, value in zip(SCALES, values, strict=True)}


def sizes_of(config: Any) -> JsonObject:
    """Return the values of a spec that are as in a target's config, or the usual ones where it lacks them."""
    width = config.hidden_size
    num_heads = getattr(config, "num_attention_heads", None) or max(1, width // 64)
    sizes = {
        "intermediate_size": 4 * width,
        "num_key_value_heads": num_heads,
        "head_dim": width // num_heads,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    }
    for name, usual in sizes.items():
        sizes[name] = getattr(config, name, None) or usual  # some families have it as None
    return sizes | {"num_attention_heads": num_heads}


def fit(config: DrafterConfig, target: Target) -> DrafterConfig:
    """Give options that are `auto` the numbers that follow from a target.

    The scale of the norm has two digits, which are the same in each precision of the weights.
    """
    numbers: JsonObject = {}
    if config.norm_scale == "auto":
        numbers["norm_scale"] = float(f"{target.norm_mean / 10:.2g}")
    if config.intermediate_size == "auto":
        numbers["intermediate_size"] = sizes_of(target.config)["intermediate_size"] // 2
    return replace(config, **numbers)


def reach_of(config: DrafterConfig) -> JsonObject:
    """Return `layer_types` and `is_causal` of a spec.

    Raises:
        ValueError: `full_layers` that are no layers, all layers, or set without a window.
    """
    layers = range(config.num_layers)
    full_layers = config.full_layers
    has_window = config.sliding_window is not None
    if full_layers and (not has_window or len(full_layers) >= len(layers) or max(full_layers) not in layers):
        raise ValueError(
            f"full_layers is {list(full_layers)}; name some, not all, of the layers 0 .. {layers[-1]}, together with "
            "sliding_window"
        )
    layer_types = []
    if has_window:
        layer_types = ["sliding_attention"] * len(layers)
        for layer in full_layers:
            layer_types[layer] = "full_attention"
    return {"layer_types": tuple(layer_types), "is_causal": config.causal}


def choose_mask_token(target: Target) -> int:
    """Pick a token that no text contains: an unused row of the embedding, else a reserved special token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    tokenizer = target.tokenizer
    num_rows = len(target.head.weight)
    if tokenizer is None:
        return num_rows - 1
    if len(tokenizer) < num_rows:
        return len(tokenizer)
    free_ids = [token_id for token_id in sorted(tokenizer.added_tokens_decoder) if not _use_of(token_id, target)]
    if not free_ids:
        raise ValueError(
            f"no token of {target.name} is free to be the mask token: all {num_rows} rows of the embedding are in use; "
            "set a reserved one with --drafter.mask-token-id"
        )
    # One whose name says that it is for such a use; otherwise any.
    for token_id in free_ids:
        text = tokenizer.added_tokens_decoder[token_id].content.lower()
        if any(word in text for word in ("mask", "reserved", "unused")):
            return token_id
    return free_ids[0]


def _use_of(token_id: int, target: Target) -> str:
    """Say what a target uses a token for; empty where it uses it for nothing."""
    tokenizer = target.tokenizer
    if token_id in target.stop_token_ids:
        return "ends the target's responses"
    if tokenizer is None or token_id >= len(tokenizer):
        return ""
    if token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        return "is padding, or begins or ends text"
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return f"is ordinary text ({tokenizer.convert_ids_to_tokens(token_id)!r})"
    if added.content in str(tokenizer.chat_template):
        return "is used by the chat template"
    return ""


class Drafter(DFlashDraftModel):
    """A DFlash network that fits a target and drafts a block in one pass.

    `save_pretrained` writes the published layout, which z-lab's `DFlashDraftModel` and the engines load unchanged.
    """

    d2t: Tensor
    """Offset from each row of an own head to its token, where the head has rows for some tokens only."""
    vocabulary: DraftVocabulary | None = None
    """The tokens that decoding drafts; None for all."""
    answers: list[int] = []
    """Tokens of the answers that it was trained on, one answer after the other; decoding can copy from them."""
    _spec: DrafterSpec
    _spec_values: JsonObject | None = None
    """The config that `_spec` was read from."""

    def __init__(self, config: Any):
        super().__init__(config)
        sizes = self.spec.selector
        self.selector = sizes.selector(getattr(self, sizes.name)) if sizes else Selector()
        if self.selector.num_candidates > config.vocab_size:
            raise ValueError(
                f"the selector chooses from {self.selector.num_candidates} tokens, and there are {config.vocab_size}; "
                "take fewer candidates"
            )

    @property
    def spec(self) -> DrafterSpec:
        """All that an engine must know about it, apart from its weights; read again where the config has changed."""
        values = self.config.to_dict()
        if values != self._spec_values:
            self._spec_values = values
            self._spec = DrafterSpec.from_config(values)
        return self._spec

    @property
    def num_slots(self) -> int:
        """Number of slots that the network reads, the anchor included."""
        return self.config.block_size

    @property
    def first_slot(self) -> int:
        """The slot that predicts the first draft token: 1, or 0 where blocks begin at the anchor."""
        return 0 if self.config.dflash_config.get("sample_from_anchor") else 1

    @property
    def block_size(self) -> int:
        """Number of tokens that are verified at once: the anchor and the draft tokens."""
        return self.num_slots + 1 - self.first_slot

    @property
    def mask_token_id(self) -> int:
        """The token in slots that are not drafted yet."""
        return self.config.mask_token_id

    @property
    def target_layer_ids(self) -> list[int]:
        """0-based target layers whose outputs are the features."""
        return self.config.target_layer_ids

    @property
    def reaches(self) -> dict[str, Reach]:
        """How far the layers of each kind see."""
        attentions: Any = [layer.self_attn for layer in self.layers]
        return {attention.kind: Reach(attention.window, attention.is_causal) for attention in attentions}

    @property
    def num_context(self) -> int:
        """Number of tokens before an anchor that a layer sees at most; larger than any text without a window."""
        return max(reach.window for reach in self.reaches.values()) - 1

    @property
    def confidence_temperature(self) -> float:
        """The divisor of logits for confidences, fitted on responses; 1 where it was not fitted."""
        if self.vocabulary is not None:
            return self.vocabulary.confidence_temperature
        return (getattr(self.config, "dpace", None) or {}).get("confidence_temperature", 1.0)

    def confidences(
        self, scores: Float[Tensor, "draft choice"], temperature: float | None = None
    ) -> Float[Tensor, " draft"]:
        """Estimate how likely each slot's token is accepted, given that the tokens before it are.

        The estimate is the calibrated probability of the slot's most likely token. With a selector it is the
        probability of the best candidate after the tokens before, times the probability of all candidates.

        Args:
            scores: see `dpace.drafter.selector.Draft`.
            temperature: the divisor of `scores`; by default `confidence_temperature`.
        """
        scores = scores.float()
        temperature = temperature or self.confidence_temperature
        # Relative to the most likely choice: no overflow. In place is fast.
        odds = (scores - scores.amax(-1, keepdim=True)).div_(temperature).exp_()
        # The last choice of a selector stands for all other tokens, and may be the most likely one.
        best = 1.0 if self.selector.num_candidates == 1 else odds[..., :-1].amax(-1)
        return best / odds.sum(-1)

    @classmethod
    def from_target(cls, target: Target, *, seed: int = 0, **options: Any) -> "Drafter":
        """Make an untrained drafter with the target's width, heads and rotary embedding.

        Args:
            target: the model to draft for.
            seed: seed of the initial weights; the layers have the same ones with and without a selector.
            options: fields of `dpace.config.DrafterConfig`, with its defaults; `init` is not read.

        Raises:
            ValueError: an option outside its range, or a layer id or mask token that cannot work with this target.
        """
        config = fit(DrafterConfig(**options), target)
        values = {name: getattr(config, name) for name in SAME_AS_OPTIONS} | reach_of(config)
        values["target_layer_ids"] = tuple(cls.layer_ids(target, config))
        if config.mask_token_id is None:
            values["mask_token_id"] = choose_mask_token(target)
        if config.conv_kernel_size:
            # Groups have equally many channels, so their size divides the width.
            values["conv_group_size"] = math.gcd(CONV_GROUP_SIZE, target.hidden_size)
        if config.selector:
            values["selector"] = SELECTORS[config.selector].chosen(config, target.hidden_size)
        sizes = sizes_of(target.config)
        values["intermediate_size"] = config.intermediate_size or sizes["intermediate_size"]
        spec = DrafterSpec(**(facts_of(target) | sizes | values))
        spec.check()
        # The caller's random numbers go on as if none were drawn here.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drafter: Any = cls(spec.config())
        nn.init.constant_(drafter.norm.weight, float(config.norm_scale))
        drafter.check_target(target)
        return drafter.to(target.device)

    def start_for(self, target: Target, *, seed: int = 0) -> "Drafter":
        """Copy this drafter as the start of a training for a target, in fp32 and on the target's device.

        Vocabulary, scales and cap become the target's, as fine-tuned targets often have some more tokens. In a
        selector's tables of tokens, new ones begin with untrained rows, which `seed` draws.

        Raises:
            ValueError: see `check_target`.
        """
        spec = replace(
            self.spec,
            vocab_size=len(target.head.weight),
            **scales_of(target),
            has_own_embed_tokens=False,
            has_own_lm_head=False,
            draft_vocab_size=0,
            record={},
        )
        if spec.sample_from_anchor:
            raise ValueError(
                "sample_from_anchor is true: training of blocks whose first slot predicts is not implemented; start "
                "from another drafter, or leave --drafter.init out"
            )
        for name, is_shared in find_shared_tables(self.state_dict(), target).items():
            if not is_shared:
                raise ValueError(
                    f"the drafter has an {name} of its own, which training does not use; start from a drafter with the "
                    "target's, or leave --drafter.init out"
                )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drafter: Any = Drafter(spec.config())
        new_weights = drafter.state_dict()
        for name, trained in self.named_parameters():
            if name not in UNREAD:
                # The target may have more tokens than before, or fewer: the rows that both have are copied.
                new_weights[name][: len(trained)].copy_(trained.detach()[: len(new_weights[name])])
        drafter.check_target(target)
        return drafter.to(target.device)

    def share_tables(self, target: Target) -> None:
        """Drop own tables for all tokens that are the target's, see `find_shared_tables`."""
        for name, is_shared in find_shared_tables(self.state_dict(), target).items():
            if is_shared and f"has_own_{name}" in vars(self.config):
                setattr(self, name, None)
                setattr(self.config, f"has_own_{name}", False)

    @staticmethod
    def layer_ids(target: Target, config: DrafterConfig) -> list[int]:
        """Return the layers whose outputs are the features."""
        if config.target_layer_ids:
            return list(config.target_layer_ids)
        return build_target_layer_ids(target.num_layers, config.num_features or config.num_layers)

    def check_target(self, target: Target) -> None:
        """Refuse a target that this drafter cannot draft for.

        Raises:
            ValueError: names the value found, the value expected and what to do.
        """
        spec = self.spec
        fault = size_fault(spec, target)
        if fault:
            raise ValueError(
                f"the drafter's {fault}: the drafter was trained for another target; "
                "train one for this target with `dpace train`"
            )
        if not target.can_take_back:
            raise ValueError(
                f"{type(target.model).__name__} cannot read several tokens at once after a text that it has read, so "
                "it cannot verify drafts: decode it without a drafter"
            )
        spec.check()
        if use := _use_of(self.mask_token_id, target):
            raise ValueError(
                f"mask token {self.mask_token_id} {use}; it must be a reserved token that no text contains: "
                "name another one, or leave it out to have one chosen"
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
        """Read a drafter's folder, or a repository of the Hub: every tensor, in its shape and finite.

        Nothing that its config names is run or downloaded. Weights are in `dtype`, by default as in the files.

        Raises:
            ValueError: a config that no drafter has, or weights that are damaged or do not fit it; names the value or
                the tensors.
        """
        spec, tensors = read_folder(find_drafter(str(folder)))
        return make_drafter(spec, _in_dtype(tensors, dtype), f"the drafter {folder}")

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Write `config.json` and `model.safetensors` in the published layout, and the network's code.

        transformers needs the code to load it. Files are written all or nothing, the config last, tensors in `dtype`.
        """
        with filling(save_directory) as aside, quiet_library():
            super().save_pretrained(aside, state_dict=_in_dtype(self.state_dict(), dtype), **kwargs)
            path = aside / "config.json"
            config = self.spec.published(json.loads(path.read_text()) | {"dtype": dtype_name(dtype or self.dtype)})
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            shutil.copy(dpace.modeling_dflash.__file__, aside)


def _in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Convert floating-point tensors, and leave the others as they are; without a dtype, leave all."""
    if dtype is None:
        return tensors
    converted = {}
    for name, tensor in tensors.items():
        converted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return converted


def make_drafter(spec: DrafterSpec, tensors: Mapping[str, Tensor], what: str = "the drafter") -> Drafter:
    """Put weights into a drafter as they are, dtype included; tables that the spec calls the target's are left out.

    Args:
        spec: of the drafter.
        tensors: by their published names.
        what: name of the drafter, for messages.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, no numbers with a point, or not finite.
    """
    shapes = spec.shapes
    unused = UNREAD - shapes.keys()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    mismatched = []
    for name, tensor in tensors.items():
        if name != "d2t" and not tensor.is_floating_point():
            raise ValueError(f"{what} has {name} in {tensor.dtype}, expected numbers with a point; {FIX}")
        expected = shapes.get(name, tensor.shape)
        if tensor.shape != expected:
            mismatched.append((name, tensor.shape, expected))
    info = {"missing_keys": shapes.keys() - tensors.keys(), "mismatched_keys": mismatched}
    refuse_mismatch(what, info, FIX, unknown=tensors.keys() - shapes.keys())
    if "d2t" in tensors:
        drafted_tokens(tensors["d2t"], spec.vocab_size)  # refuses damaged offsets
        tensors["d2t"] = tensors["d2t"].long()
    # On the device `meta` no memory is taken for weights, which the files' weights replace at once.
    with translate_library_errors(what, FIX), torch.device("meta"):
        drafter = Drafter(spec.config())
        drafter.load_state_dict(tensors, assign=True)
    drafter.rotary_emb = type(drafter.rotary_emb)(drafter.config)  # the only part that is in no file
    refuse_infinite(what, drafter, FIX)
    return drafter.eval()


def find_shared_tables(tensors: Mapping[str, Tensor], target: Target) -> dict[str, bool]:
    """Say of each table among a drafter's tensors whether it is the target's, up to rounding in bf16.

    Tables are `embed_tokens`, and `lm_head` with a row for each token or each one that `d2t` names.

    Raises:
        ValueError: see `drafted_tokens`.
    """
    tables = {"embed_tokens": target.model.get_input_embeddings().weight, "lm_head": target.head.weight}
    if "d2t" in tensors:
        token_ids = drafted_tokens(tensors["d2t"], len(target.head.weight))
        tables["lm_head"] = target.head.weight[token_ids.to(target.device)]
    are_shared = {}
    for name, table in tables.items():
        weight = tensors.get(f"{name}.weight")
        if weight is not None:
            are_shared[name] = weight.shape == table.shape and torch.allclose(weight, table.to(weight), rtol=1e-2)
    return are_shared


def load_drafter(folder: str | Path, target: Target) -> Drafter:
    """Read a drafter's folder for decoding with a target.

    The drafter gets the target's dtype and device, and is in eval mode.

    Args:
        folder: of the drafter, or what else `find_drafter` finds.
        target: its target.

    Raises:
        ValueError: no such folder, damaged weights, or a drafter for another target.
    """
    folder = find_drafter(str(folder))
    drafter = Drafter.from_pretrained(folder, dtype=target.model.dtype)
    drafter.check_target(target)
    drafter.to(target.device)
    drafter.share_tables(target)
    num_tokens = len(target.head.weight)
    vocabulary = load_vocabulary(folder, num_tokens)  # also where it is not used: a damaged file is refused
    if drafter.lm_head is not None:
        token_ids = range(num_tokens)
        if drafter.spec.draft_vocab_size > 0:
            token_ids = drafted_tokens(drafter.d2t, num_tokens).tolist()
        drafter.vocabulary = DraftVocabulary(token_ids, drafter.confidence_temperature, drafter.lm_head)
    elif vocabulary is not None and vocabulary.pays(target):
        drafter.vocabulary = vocabulary
    answers = Path(folder) / ANSWERS_FILE
    if answers.exists():
        drafter.answers = read_tokens(answers, num_tokens).token_ids
    speed_up(drafter)
    return drafter
