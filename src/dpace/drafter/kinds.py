"""The kinds of drafters: what each adds to DFlash's network, in one place.

A kind knows its tensors and config keys under the names of each engine, which formats cannot hold it, and how hidden
states become a proposal, and with what loss a head learns. `KINDS` has them by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, Strict
from torch import Tensor

from dpace.drafter.vocabulary import DraftHead
from dpace.target import Target

Tensors = Mapping[str, tuple[str, str]]
"""Published name of each tensor, its axes, and llama.cpp's name."""

TENSORS: Tensors = {
    "fc.weight": ("hidden feature", "fc.weight"),
    "hidden_norm.weight": ("hidden", "enc.output_norm.weight"),
    "norm.weight": ("hidden", "output_norm.weight"),
}
LAYER_TENSORS: Tensors = {
    "input_layernorm.weight": ("hidden", "attn_norm.weight"),
    "self_attn.q_proj.weight": ("query hidden", "attn_q.weight"),
    "self_attn.k_proj.weight": ("key hidden", "attn_k.weight"),
    "self_attn.v_proj.weight": ("key hidden", "attn_v.weight"),
    "self_attn.o_proj.weight": ("hidden query", "attn_output.weight"),
    "self_attn.q_norm.weight": ("head", "attn_q_norm.weight"),
    "self_attn.k_norm.weight": ("head", "attn_k_norm.weight"),
    "post_attention_layernorm.weight": ("hidden", "ffn_norm.weight"),
    "mlp.gate_proj.weight": ("inner hidden", "ffn_gate.weight"),
    "mlp.up_proj.weight": ("inner hidden", "ffn_up.weight"),
    "mlp.down_proj.weight": ("hidden inner", "ffn_down.weight"),
}
"""`query` is heads x head_dim, `key` the same for key heads."""
SELECTOR_TENSORS: Tensors = {
    "candidate_selector.predecessor_codebook": ("vocab rank", "selector_predecessor.weight"),
    "candidate_selector.successor_codebook": ("vocab rank", "selector_successor.weight"),
    "candidate_selector.hidden_projection.weight": ("rank hidden", "selector_hidden.weight"),
}
CONVOLUTION_TENSORS: Tensors = {
    "attention_conv.base_kernel": ("side tap hidden", "attn_conv_base"),
    "attention_conv.kernel_projection.weight": ("kernel hidden", "attn_conv_proj.weight"),
    "mlp_conv.base_kernel": ("side tap hidden", "ffn_conv_base"),
    "mlp_conv.kernel_projection.weight": ("kernel hidden", "ffn_conv_proj.weight"),
}
"""`kernel` is sides x taps x groups of channels."""
TABLES: Tensors = {
    "embed_tokens.weight": ("vocab hidden", "token_embd.weight"),
    "lm_head.weight": ("choice hidden", "output.weight"),
    "d2t": ("choice", "d2t"),
}
"""Tensors that drafters may have of their own: embedding, LM head, and the tokens of a head with fewer rows."""
CE_WEIGHT = 0.25
"""Weight of a head's cross-entropy beside the loss of the blocks, as published."""
WITHOUT_HEAD = "write it without the head, as DFlash's, with --plain"
LILICORR = "lilicorr."
"""Beginning of the names of the head's tensors and, with `_` for the point, of its config keys."""
LINEARS = {
    "pass_hidden_proj": "correlator hidden",
    "context_proj": "correlator hidden",
    "feature_mlp.1": "correlator five",
    "feature_mlp.3": "correlator correlator",
    "factor_input_proj": "correlator joined",
    "out_head": "factor correlator",
    "in_head": "factor correlator",
    "anchor_out_head": "factor correlator",
}
"""Axes of the head's linear layers, all of which have a bias."""
LINEARS_OF_LAYER = {
    "attn.out_proj": "correlator correlator",
    "mlp.0": "wide correlator",
    "mlp.2": "correlator wide",
}
VECTORS = {
    "feature_mlp.0.weight": "five",
    "feature_mlp.0.bias": "five",
    "slot_embedding": "one one draft one correlator",
    "rank_embedding": "one one one candidate correlator",
    "relative_slot_bias": "heads distance",
    "same_slot_bias": "heads",
    "output_norm.weight": "correlator",
    "anchor_norm.weight": "correlator",
}
VECTORS_OF_LAYER = {
    "attn_norm.weight": "correlator",
    "mlp_norm.weight": "correlator",
    "attn.in_proj_weight": "joined correlator",
    "attn.in_proj_bias": "joined",
}
NEWER_NAMES = {
    "feature_norm": "feature_mlp.0",
    "feature_mlp.up_proj": "feature_mlp.1",
    "feature_mlp.down_proj": "feature_mlp.3",
    "mlp.up_proj": "mlp.0",
    "mlp.down_proj": "mlp.2",
}
"""Names of parts of the head in newer checkpoints, and the older ones, which every engine but mlx2 reads."""


class Lattice(NamedTuple):
    """A head's scores of the candidates of each slot; a walk through it, from slot to slot, is a draft.

    A score after a token says nothing about the token itself: no logit of the drafter is added.
    """

    candidates: Int[Tensor, "batch draft choice"]
    """Tokens, the drafter's best first."""
    start: Float[Tensor, "batch choice"]
    """Scores of the first slot's candidates."""
    pairs: Float[Tensor, "batch pair choice choice"]
    """Scores of a slot's candidates after each of the slot's before."""


class Draft(NamedTuple):
    """What a drafter proposes behind each text."""

    tokens: Int[Tensor, "batch draft"]
    """The best token of each slot."""
    scores: Float[Tensor, "batch draft choice"]
    """Logits of each slot's choices, of which the token is the best: with a head, after the tokens before."""
    lattice: Lattice | None = None
    """The scores that a head walked by; None without a head."""


Positive = Annotated[int, Strict(), Field(ge=1, le=2**20)]
Scale = Annotated[float, Strict(), Field(gt=0, lt=1e30)]


@dataclass(frozen=True)
class HeadSpec:
    """Sizes and constants of a LiLiCorr head; published config keys are these names after `lilicorr_`."""

    candidate_topk: Annotated[int, Strict(), Field(ge=1, le=1024)]
    """Best tokens of each slot that it chooses from."""
    hidden_size: Annotated[int, Strict(), Field(ge=0, le=2**20)]
    """Its width; 0 for the drafter's."""
    num_heads: Positive
    factor_dim: Positive
    """Length of the vectors whose products are the scores."""
    num_layers: Annotated[int, Strict(), Field(ge=1, le=100)]
    mlp_ratio: Scale
    vector_eps: Scale
    logit_scale: Scale


def head_for(hidden_size: int, num_candidates: int, width: int | None = None) -> HeadSpec:
    """Choose the sizes of a head.

    Published ones are a quarter as wide as the drafter (1024 at 4096). There the head is 3 % of a step. Next to a small
    target on a CPU it would be more than 10 %, so below 1024 a sixth is taken, 96 at 576, which is about 5 %.

    Args:
        hidden_size: of the drafter.
        num_candidates: of each slot.
        width: of the head; by default as above.
    """
    narrow = max(8, hidden_size // 48 * 8)
    width = width or (hidden_size // 4 if hidden_size >= 1024 else narrow)
    num_heads = next(count for count in (8, 4, 2, 1) if width % count == 0 and width >= 24 * count or count == 1)
    return HeadSpec(
        candidate_topk=num_candidates,
        hidden_size=0 if width == hidden_size else width,
        num_heads=num_heads,
        factor_dim=width,
        num_layers=2,
        mlp_ratio=2.0,
        vector_eps=1e-4,
        logit_scale=8.0,
    )


@dataclass(frozen=True)
class Kind:
    """A kind of drafter. This one is DFlash's, which adds nothing.

    Source: DFlash (arXiv 2602.06036).
    """

    architecture: str = "DFlashDraftModel"
    """Name of the network's class, by which engines choose their own."""
    other_tensors: Tensors = field(default_factory=lambda: TENSORS)
    layer_tensors: Tensors = field(default_factory=lambda: LAYER_TENSORS)
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Formats that cannot hold such a drafter, with the reason and a way out."""
    num_candidates: int = 1
    """Tokens of each slot that a head chooses from; 1 without a head."""

    def tensors(self, num_layers: int) -> dict[str, tuple[str, str]]:
        """Return axes and llama.cpp's name of every tensor of a drafter, by its published name.

        Nothing is permuted for llama.cpp, because the drafter's rotary embedding is NeoX's.
        """
        tensors = dict(self.other_tensors)
        for layer in range(num_layers):
            for name, (axes, gguf) in self.layer_tensors.items():
                tensors[f"layers.{layer}.{name}"] = axes, f"blk.{layer}.{gguf}"
        return tensors

    def axis_sizes(self, spec: Any) -> dict[str, int]:
        """Return the length of each axis of the tensors of a drafter with this `DrafterSpec`."""
        return {
            "hidden": spec.hidden_size,
            "feature": len(spec.target_layer_ids) * spec.hidden_size,
            "query": spec.num_heads * spec.head_dim,
            "key": spec.num_key_value_heads * spec.head_dim,
            "head": spec.head_dim,
            "inner": spec.intermediate_size,
            "vocab": spec.vocab_size,
            "choice": spec.draft_vocab_size or spec.vocab_size,
            "rank": 1,
            "side": 2,
            "tap": spec.conv_kernel_size,
            "kernel": 2 * spec.conv_kernel_size * (spec.hidden_size // max(1, spec.conv_group_size)),
        }

    def values(self, spec: Any) -> dict[str, Any]:
        """Return what the kind adds to `dflash_config`, under the published names."""
        return {}

    def facts(self, spec: Any) -> dict[str, str]:
        """Return rows of the model card about what the kind adds."""
        return {}

    def draft(
        self,
        drafter: Any,
        head: DraftHead,
        hidden: Float[Tensor, "batch slot hidden"],
        newest: Callable[[], Float[Tensor, "batch feature"]],
        width: int,
    ) -> Draft:
        """Make a proposal of `width - 1` tokens.

        Args:
            drafter: whose network computed the hidden states.
            head: for drafts.
            hidden: of whole blocks.
            newest: returns the features of the token before each anchor.
            width: number of slots that may be verified, the anchor included.
        """
        logits = head.logits(hidden[:, 1:width].flatten(0, 1))
        tokens = head.tokens(logits).unflatten(0, (len(hidden), -1))
        return Draft(tokens, logits.unflatten(0, tokens.shape))


class Convolutions(Kind):
    """DFlash2's convolutions, with a selector that changes no choice (`NeutralSelector`).

    Source: DFlash2, z-lab/dflash.
    """

    def values(self, spec: Any) -> dict[str, int]:
        """Return the sizes of convolutions and selector; llama.cpp wants k (k + 1) <= hidden size."""
        top_k = next((k for k in (16, 8, 4) if k * (k + 1) <= spec.hidden_size), 2)
        sizes = {"conv_kernel_size": spec.conv_kernel_size, "conv_group_size": spec.conv_group_size}
        return {**sizes, "selector_rank": 1, "selector_top_k": top_k}

    def facts(self, spec: Any) -> dict[str, str]:
        """Name the taps."""
        text = f"over {spec.conv_kernel_size} slots, as in DFlash2, with a candidate selector of zeros"
        return {"convolutions": text}


@dataclass(frozen=True)
class LiLiCorr(Kind):
    """A head that makes the slots of a draft agree, on DFlash's network or on one with convolutions.

    Source: LiLiCorr (arXiv 2608.20530); layout of NVIDIA's Model-Optimizer.
    """

    num_layers: int = 2
    """Layers of the head."""
    has_projection: bool = True
    """Whether the head is narrower than the drafter, and so has `token_proj`."""

    def tensors(self, num_layers: int) -> dict[str, tuple[str, str]]:
        """Return axes of every tensor; llama.cpp's names of the head are not known."""
        linears = {**LINEARS, **({"token_proj": "correlator hidden"} if self.has_projection else {})}
        others = dict(VECTORS)
        for layer in range(self.num_layers):
            linears |= {f"layers.{layer}.{name}": axes for name, axes in LINEARS_OF_LAYER.items()}
            others |= {f"layers.{layer}.{name}": axes for name, axes in VECTORS_OF_LAYER.items()}
        for name, axes in linears.items():
            others |= {f"{name}.weight": axes, f"{name}.bias": axes.split()[0]}
        return super().tensors(num_layers) | {LILICORR + name: (axes, "") for name, axes in others.items()}

    def axis_sizes(self, spec: Any) -> dict[str, int]:
        """Return the length of each axis, those of the head included."""
        head = spec.head
        width = head.hidden_size or spec.hidden_size
        return super().axis_sizes(spec) | {
            "one": 1,
            "five": 5,
            "candidate": head.candidate_topk,
            "draft": spec.block_size - 1,
            "distance": 2 * spec.block_size - 1,
            "heads": head.num_heads,
            "correlator": width,
            "joined": 3 * width,
            "wide": int(head.mlp_ratio * width),
            "factor": head.factor_dim,
        }

    def values(self, spec: Any) -> dict[str, Any]:
        """Return all keys of the head, and the sizes of convolutions where there are any."""
        keys = {f"lilicorr_{name}": value for name, value in vars(spec.head).items()}
        sizes = {"conv_kernel_size": spec.conv_kernel_size, "conv_group_size": spec.conv_group_size}
        more = sizes if spec.conv_kernel_size else {}
        return {"projector_type": "lilicorr", "lilicorr_enabled": True, **keys, **more}

    def facts(self, spec: Any) -> dict[str, str]:
        """Name the head and its sizes."""
        head = spec.head
        text = f"LiLiCorr, over the {head.candidate_topk} best tokens of each slot, {head.num_layers} layers"
        return {"head": f"{text} of width {head.hidden_size or spec.hidden_size}"}

    def draft(
        self,
        drafter: Any,
        head: DraftHead,
        hidden: Float[Tensor, "batch slot hidden"],
        newest: Callable[[], Float[Tensor, "batch feature"]],
        width: int,
    ) -> Draft:
        """Walk through the lattice of all slots, as in training, and propose the first `width - 1` tokens."""
        states = hidden[:, 1:]
        logits = head.logits(states.flatten(0, 1)).float()
        top, index = logits.topk(self.num_candidates)
        log_probs = (top - logits.logsumexp(-1, keepdim=True)).unflatten(0, states.shape[:2])
        tokens = (index if head.token_ids is None else head.token_ids[index]).view(log_probs.shape)
        lattice = make_lattice(drafter, head.target, tokens, log_probs, states, newest())
        index = take_walk(lattice)
        draft = tokens_of(lattice, index)[:, : width - 1]
        return Draft(draft, rows_after(lattice, index)[:, : width - 1], lattice)


def take_walk(lattice: Lattice) -> Int[Tensor, "batch draft"]:
    """Take the best candidate of each slot after that of the slot before; on ties the drafter's better one.

    Returns:
        Numbers of the candidates.
    """
    index = lattice.start.argmax(-1, keepdim=True)
    best = lattice.pairs.argmax(-1)
    taken = [index]
    for pair in range(best.shape[1]):
        index = best[:, pair].gather(1, index)
        taken.append(index)
    return torch.cat(taken, dim=1)


def rows_after(lattice: Lattice, index: Int[Tensor, "batch draft"]) -> Float[Tensor, "batch draft choice"]:
    """Return the scores of each slot's candidates after the candidates `index` of the slots before."""
    pairs = lattice.pairs
    chosen = index[:, : pairs.shape[1], None, None].expand(-1, -1, 1, pairs.shape[-1])
    return torch.cat([lattice.start[:, None], pairs.gather(2, chosen)[:, :, 0]], dim=1)


def tokens_of(lattice: Lattice, index: Int[Tensor, "batch draft"]) -> Int[Tensor, "batch draft"]:
    """Return the tokens of candidates."""
    return lattice.candidates.gather(-1, index[..., None])[..., 0]


def make_lattice(
    network: Any,
    target: Target,
    candidates: Int[Tensor, "block draft choice"],
    log_probs: Float[Tensor, "block draft choice"],
    hidden: Float[Tensor, "block draft hidden"],
    features: Float[Tensor, "block feature"],
    has_anchor: Bool[Tensor, " block"] | None = None,
) -> Lattice:
    """Score the candidates of blocks with the network's head.

    Args:
        network: of the drafter.
        target: has the embedding.
        candidates: best tokens of each slot.
        log_probs: theirs in the drafter's softmax, at temperature 1, in fp32.
        hidden: final hidden states of the slots.
        features: of the token before each anchor.
        has_anchor: whether there is such a token; by default there is.
    """
    anchor = network.anchor_rows(features)
    scores = network.lilicorr(target.embed(candidates), log_probs, hidden, anchor, has_anchor)
    return Lattice(candidates, *scores)


class WalkLosses(NamedTuple):
    """What a lattice is trained with, where the token before each slot is the target's own."""

    losses: Float[Tensor, "block draft"]
    """Cross-entropy and penalty, each times its weight; carries the gradient."""
    probs: Float[Tensor, "block draft"]
    """Probability of the target's token, detached; 0 where it cannot be taken."""
    is_candidate: Bool[Tensor, "block draft"]
    """Whether the target's token is a candidate."""


def walk_losses(
    lattice: Lattice,
    labels: Int[Tensor, "block draft"],
    target_logits: Float[Tensor, "block draft choice"] | None,
    penalty: float,
) -> WalkLosses:
    """Compute the loss of a walk that takes the target's tokens.

    With `r` the softmax of a slot's scores after the target's token before, it is `CE_WEIGHT * -log r[true]`, and
    `penalty` times `sum of r[j] * max(0, l[true] - l[j])`, where `l` are the target's logits: a wrong choice costs as
    much as the target dislikes it. A token that is no candidate is not put among them: its slot, and the one behind it,
    have no loss.

    Args:
        lattice: of whole blocks.
        labels: the target's tokens, as the lattice names its candidates.
        target_logits: the target's, of the candidates, without gradient; None without penalty.
        penalty: its weight.

    Source: LiLiCorr (arXiv 2608.20530), as in NVIDIA's Model-Optimizer.
    """
    is_true = lattice.candidates == labels[..., None]
    is_candidate = is_true.any(-1)
    index = is_true.int().argmax(-1)
    log_probs = rows_after(lattice, index).log_softmax(-1)
    own = log_probs.gather(-1, index[..., None])[..., 0]
    losses = -CE_WEIGHT * own
    if target_logits is not None:
        worse = (target_logits.gather(-1, index[..., None]) - target_logits).clamp_min(0)
        losses = losses + penalty * (log_probs.exp() * worse).sum(-1)
    before = torch.cat([torch.ones_like(is_candidate[:, :1]), is_candidate[:, :-1]], dim=1)
    can_take = is_candidate & before
    return WalkLosses(losses * can_take, own.detach().exp() * can_take, is_candidate)


KINDS: dict[str, Kind] = {
    "dflash": Kind(),
    "dflash2": Convolutions(
        "DFlash2DraftModel",
        {**TENSORS, **SELECTOR_TENSORS},
        {**LAYER_TENSORS, **CONVOLUTION_TENSORS},
        {
            "speculators": "the drafter has convolutions, and the format of speculators has none; give vLLM or SGLang "
            "the folder that `dpace train` writes"
        },
    ),
    "lilicorr": LiLiCorr(
        "LiLiCorrDraftModel",
        refusals={
            "speculators": "the drafter has a LiLiCorr head, and the format of speculators has none; give vLLM or "
            f"SGLang the folder that `dpace train` writes, or {WITHOUT_HEAD}",
            "gguf": "the drafter has a LiLiCorr head, and how llama.cpp names its tensors and keys is not known; "
            f"{WITHOUT_HEAD}",
        },
    ),
}
"""Every kind, by a name of ours; `find_kind` fits that with a head to its sizes."""


def find_kind(*, has_taps: bool, head: HeadSpec | None, hidden_size: int) -> Kind:
    """Return the kind of a drafter by what it adds to DFlash's network.

    Args:
        has_taps: whether it has convolutions.
        head: sizes of its head.
        hidden_size: of the drafter.
    """
    if head is None:
        return KINDS["dflash2" if has_taps else "dflash"]
    return _with_head(has_taps, head.num_layers, head.hidden_size not in (0, hidden_size), head.candidate_topk)


def kind_of_tensors(names: Iterable[str]) -> Kind:
    """Return the kind of a drafter by the published names of its tensors."""
    has_taps = "layers.0.mlp_conv.base_kernel" in names
    num_layers = count_head_layers(names)
    if not num_layers:
        return KINDS["dflash2" if has_taps else "dflash"]
    return _with_head(has_taps, num_layers, f"{LILICORR}token_proj.weight" in names)


def count_head_layers(names: Iterable[str]) -> int:
    """Count the layers of the head that have a tensor among these published names; 0 without a head."""
    return len({name.split(".")[2] for name in names if name.startswith(f"{LILICORR}layers.")})


def _with_head(has_taps: bool, num_layers: int, has_projection: bool, num_candidates: int = 2) -> Kind:
    """Fit the kind with a head to its sizes."""
    head: Any = KINDS["lilicorr"]
    return replace(
        head,
        layer_tensors={**LAYER_TENSORS, **(CONVOLUTION_TENSORS if has_taps else {})},
        num_layers=num_layers,
        has_projection=has_projection,
        num_candidates=num_candidates,
    )


def published_name(name: str) -> str:
    """Return the older name of a tensor of the head, which this project writes; other names stay as they are."""
    if not name.startswith(LILICORR):
        return name
    for newer, older in NEWER_NAMES.items():
        name = name.replace(f".{newer}.", f".{older}.")
    return name
