"""The DFlash network, which computes hidden states of blocks from the target's features.

`save_pretrained` copies this file beside the weights, so that transformers runs the network that was trained
(`trust_remote_code=True`). It therefore imports torch and transformers only.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, Qwen3Config, initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

SMALL_SHARED_MEMORY = 101_376
"""Bytes of shared memory that a block of threads has on most cards with 24 GB; those with 80 GB have more."""
Mask = Any
"""A dense mask over all keys, a `BlockMask` of flex_attention, or None."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotation, each "rows new dim"."""
Part = Callable[[Tensor], Tensor]
"""Computes a part of a layer, or its norm, from rows."""
NO_WINDOW = 2**31 - 1
"""Window of a layer with full attention: longer than any text."""


class DFlashAttention(Qwen3Attention):
    """Attention of block tokens to the target's features and to each other.

    Keys and values of both use the same projections. A layer of kind `sliding_attention` sees the tokens and slots
    whose positions differ from the slot's own by less than `sliding_window`. So the window moves with the slot, and its
    own block counts: the first slot of a block sees `sliding_window - 1` tokens before it, the next one token less.
    With `is_causal` a slot sees no slot after it. Where the config does not say, sliding layers are causal and others
    are not.

    Source: `_attention_mask` of dflash 0.1.0; vLLM's `_resolve_layer_attention` and llama.cpp's standard window have
    the same rule. speculators 0.9 trains with another one, which differs at the far end of the window only: all slots
    see the `sliding_window` tokens before the anchor.
    """

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        self.kind = config.layer_types[layer]
        is_sliding = self.kind == "sliding_attention"
        self.window: int = config.sliding_window if is_sliding else NO_WINDOW
        is_causal = getattr(config, "is_causal", None)
        self.is_causal: bool = is_sliding if is_causal is None else is_causal

    def forward(self, hidden: Tensor, context: Tensor, rope: Rope, mask: Mask, cache: Cache | None) -> Tensor:
        """Compute the attention's output.

        Shapes are as in `DFlashDraftModel.forward`; `context` are the features after `fc` and their norm.
        """
        # Rows of the text's new tokens come first, and of the slots last: "batch new hidden".
        keys_from = torch.cat([context, hidden], dim=1)
        heads = (-1, self.head_dim)
        # All three are "batch head row dim".
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(keys_from).unflatten(-1, heads)).transpose(1, 2)
        v = self.v_proj(keys_from).unflatten(-1, heads).transpose(1, 2)
        cos = rope[0][:, None]  # for all heads
        sin = rope[1][:, None]
        k = k * cos + rotate_half(k) * sin
        # Queries are the slots alone, whose positions are the last ones.
        cos = cos[..., -q.shape[2] :, :]
        sin = sin[..., -q.shape[2] :, :]
        q = q * cos + rotate_half(q) * sin
        q = q.to(v.dtype)  # under autocast the norms give fp32 and the projections bf16
        k = k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        mask = self.limit(mask, q.shape[2], k)
        if mask is None or isinstance(mask, Tensor):
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            tiles = _small_tiles(q.device, self.head_dim)
            out = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=tiles)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def limit(self, mask: Mask, num_slots: int, keys: Tensor) -> Mask:
        """Add window and causality to the mask of one block, whose slots are the last keys.

        A mask that differs by slot has them already. The rule is the one of `dpace.blocks.Reach`, for positions that
        follow one another; this file cannot import it.

        Args:
            mask: see `DFlashDraftModel.forward`.
            num_slots: queries.
            keys: "batch head key dim"; the slots are the last ones, and right before them are the tokens before them.
        """
        is_shared = mask is None or (isinstance(mask, Tensor) and mask.shape[2] == 1)
        if not is_shared or (self.window == NO_WINDOW and not self.is_causal):
            return mask
        places = torch.arange(keys.shape[2], device=keys.device)
        distance = places[-num_slots:, None] - places  # "slot key", below 0 where the key is a later slot
        nearest = -1 if self.is_causal else -self.window
        is_seen = (distance < self.window) & (distance > nearest)
        if mask is None:
            return is_seen[None, None]
        # The mask is of the whole text, of which the cache of a sliding layer keeps the last tokens only.
        return is_seen & mask[..., -keys.shape[2] :]


class DFlashConvolution(nn.Module):
    """Short convolutions over the slots of a block, before and after a part of a layer.

    A slot then sees the slots before it:
    `out[i, c] = sum over t of (base[t, c] + added[i, t, c // group]) x[i - t, c]`, with 0 before the block's first
    slot. `added` is a projection of the input, for both sides at once. The initial weights change nothing.

    Source: DFlash2, z-lab/dflash.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.block_size = config.block_size
        self.group = config.dflash_config["conv_group_size"]
        taps = config.dflash_config["conv_kernel_size"]
        width = config.hidden_size
        self.base_kernel = nn.Parameter(torch.empty(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * width // self.group, bias=False)

    def initialize(self):
        """Let the slot itself be all that counts."""
        taps, width = self.base_kernel.shape[1:]
        init.zeros_(self.kernel_projection.weight)
        only_itself = torch.eye(taps)[:1, :, None]  # 1 at tap 0, which is the slot, and 0 at those before
        init.copy_(self.base_kernel, only_itself.expand(2, taps, width))

    def forward(self, rows: Tensor, part: Part, block_size: int | None = None) -> Tensor:
        """Compute `part` of the convolved rows, and convolve its output; all are "batch query hidden".

        The query is one block or its beginning, or several whole blocks of `block_size` slots.
        """
        # A query shorter than a block is the beginning of one.
        num_slots = min(block_size or self.block_size, rows.shape[1])
        taps = self.base_kernel.shape[1]
        # "batch query side tap group 1": one number for all channels of a group.
        added = self.kernel_projection(rows).unflatten(-1, (2, taps, -1, 1))
        out = part(self._convolve(rows, added, 0, num_slots))
        return self._convolve(out, added, 1, num_slots)

    def _convolve(self, rows: Tensor, added: Tensor, side: int, num_slots: int) -> Tensor:
        x = rows.unflatten(-1, (-1, self.group))  # "batch query group channel"
        base = self.base_kernel[side].unflatten(-1, (-1, self.group))  # "tap group channel"
        out = torch.addcmul(base[0] * x, added[:, :, side, 0], x)
        blocks = x.unflatten(1, (-1, num_slots))
        for tap in range(1, base.shape[0]):
            # Zeros before each block move its slots by `tap`, so that no slot reads one of another block.
            before = nn.functional.pad(blocks, (0, 0, 0, 0, tap, 0))[:, :, :num_slots].flatten(1, 2)
            out = torch.addcmul(out + base[tap] * before, added[:, :, side, tap], before)
        return out.flatten(-2)


class NeutralSelector(nn.Module):
    """Weights of a candidate selector that changes no choice; engines want one beside convolutions.

    DFlash2's selector adds to a candidate's logit how well it follows the token before; here that is 0. Other weights
    of rank 1, which no published drafter has, are read and not used.
    """

    def __init__(self, config: Any):
        super().__init__()
        for name in ("predecessor_codebook", "successor_codebook"):
            self.register_buffer(name, torch.zeros(config.vocab_size, 1))
        self.hidden_projection = nn.Module()
        self.hidden_projection.register_buffer("weight", torch.zeros(1, config.hidden_size))


class CandidateSelectorNetwork(nn.Module):
    """DFlash2's selector, which adds to a candidate's logit how well it follows the token before.

    After token `a`, at a slot with hidden state `h`, token `b` gets `<A[a] * (H h), B[b]>` more. At first `B` is 0, and
    no choice changes.

    Source: DFlash2, z-lab/dflash.
    """

    def __init__(self, config: Any):
        super().__init__()
        rank = config.dflash_config["selector_rank"]
        self.num_candidates: int = config.dflash_config["selector_top_k"]
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)

    @staticmethod
    def is_in(nested: Mapping[str, object]) -> bool:
        """Return whether a `dflash_config` has one; a `NeutralSelector` has rank 1 there."""
        return nested.get("selector_rank") not in (None, 1)

    def initialize(self):
        """Let it change nothing, with a gradient for the table of successors."""
        # Only one factor may be 0: the gradient of each is a product with the others.
        init.normal_(self.predecessor_codebook)
        init.zeros_(self.successor_codebook)
        init.normal_(self.hidden_projection.weight, std=self.hidden_projection.in_features**-0.5)

    def forward(self, before: Tensor, hidden: Tensor, candidates: Tensor) -> Tensor:
        """Compute what is added to logits, in fp32: "... slot before candidate".

        Args:
            before: "... slot before", tokens that may stand before each slot.
            hidden: "... slot hidden", of the slots, as the LM head reads them.
            candidates: "... slot candidate", tokens for it.
        """
        gate = self.hidden_projection(hidden.to(self.hidden_projection.weight.dtype))
        queries = nn.functional.embedding(before, self.predecessor_codebook) * gate[..., None, :]
        return (queries @ nn.functional.embedding(candidates, self.successor_codebook).mT).float()


class MarkovHead(nn.Module):
    """DSpark's head, which adds to a token's logit how well it follows the token before.

    After token `a`, token `b` gets `<W1[a], W2[b]>` more. A training begins with how often `b` follows `a` in the
    answers, and leaves `W2` as it is: its gradient would take as long as another loss.

    Source: DSpark (arXiv 2607.05147), `VanillaMarkov` of deepseek-ai/DeepSpec.
    """

    def __init__(self, config: Any):
        super().__init__()
        rank = config.dflash_config["markov_rank"]
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.vocab_size, bias=False).requires_grad_(False)

    @staticmethod
    def is_in(nested: Mapping[str, object]) -> bool:
        """Return whether a `dflash_config` has one; DeepSpec writes rank 0 for none."""
        return bool(nested.get("markov_rank"))


class DFlashLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer; the features enter its attention without the input norm."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer)
        self.mlp = Qwen3MLP(config)
        has_convolutions = published(config).get("conv_kernel_size")
        self.attention_conv = DFlashConvolution(config) if has_convolutions else None
        self.mlp_conv = DFlashConvolution(config) if has_convolutions else None
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        rope: Rope,
        mask: Mask,
        cache: Cache | None,
        block_size: int | None = None,
    ) -> Tensor:
        """Add attention and feed-forward to `hidden`."""

        def attend(rows: Tensor) -> Tensor:
            return self.self_attn(rows, context, rope, mask, cache)

        norms = self.input_layernorm, self.post_attention_layernorm
        return self.add_parts(hidden, norms, attend, self.mlp, block_size)

    def add_parts(
        self, hidden: Tensor, norms: Sequence[Part], attend: Part, feed_forward: Part, block_size: int | None
    ) -> Tensor:
        """Add two parts to `hidden`, each of its normalized rows and between its convolutions, if there are any.

        The parts and their norms are functions of rows: the layer's own, or faster ones.
        """
        parts = (self.attention_conv, norms[0], attend), (self.mlp_conv, norms[1], feed_forward)
        for convolution, norm, part in parts:
            rows = norm(hidden)
            out = part(rows) if convolution is None else convolution(rows, part, block_size)
            hidden = hidden + out
        return hidden


class LiLiCorrAttention(nn.MultiheadAttention):
    """Attention of all candidates of a block to one another, with learned biases by the distance of their slots.

    Weights, their names and their initial values are as in torch's own attention.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__(width, num_heads)
        self.out_proj: Any = nn.Linear(width, width)  # exactly this class, whose product decoding packs

    def forward(self, rows: Tensor, bias: Tensor) -> Tensor:
        """Compute the attention's output, "block entry width"; `bias` is "1 head entry entry"."""
        rows = nn.functional.linear(rows, self.in_proj_weight, self.in_proj_bias)
        # "block entry 3 head dim" to three of "block head entry dim": queries, keys and values.
        q, k, v = rows.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class LiLiCorrMLP(nn.Module):
    """Two linear layers with silu between them."""

    def __init__(self, width: int, inner: int, outer: int):
        super().__init__()
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, outer)

    def forward(self, rows: Tensor) -> Tensor:
        """Compute "... outer" from "... width"."""
        return self.down_proj(nn.functional.silu(self.up_proj(rows)))


class LiLiCorrLayer(GradientCheckpointingLayer):
    """A pre-norm layer over the candidates of a block."""

    def __init__(self, width: int, inner: int, num_heads: int, eps: float):
        super().__init__()
        self.attn_norm = Qwen3RMSNorm(width, eps=eps)
        self.attn = LiLiCorrAttention(width, num_heads)
        self.mlp_norm = Qwen3RMSNorm(width, eps=eps)
        self.mlp = LiLiCorrMLP(width, inner, width)

    def forward(self, rows: Tensor, bias: Tensor) -> Tensor:
        """Add attention and feed-forward to `rows`."""
        rows = rows + self.attn(self.attn_norm(rows), bias)
        return rows + self.mlp(self.mlp_norm(rows))


class LiLiCorrNetwork(nn.Module):
    """A selector that scores how well each candidate of a slot follows each candidate of the slot before.

    All candidates of a block see one another, in two layers. Each gets a vector for the pair that it begins and one for
    the pair that it ends, and a pair's score is their product. Engines read the parts by these names.
    Slots and ranks count nothing at first. The factors' weights must not be 0: they would stay so.

    Source: LiLiCorr (arXiv 2608.20530), as in NVIDIA's Model-Optimizer.
    """

    def __init__(self, config: Any):
        super().__init__()
        sizes = {name.removeprefix("lilicorr_"): value for name, value in config.dflash_config.items()}
        outer = config.hidden_size
        block_size = config.block_size
        width = sizes["hidden_size"] or outer
        num_heads = sizes["num_heads"]
        self.block_size = block_size
        self.num_candidates: int = sizes["candidate_topk"]
        self.vector_eps: float = sizes["vector_eps"]
        self.logit_scale: float = sizes["logit_scale"]
        self.token_proj = nn.Identity() if width == outer else nn.Linear(outer, width)
        self.pass_hidden_proj = nn.Linear(outer, width)
        self.context_proj = nn.Linear(outer, width)
        # 5 facts of a candidate, which `forward` lists.
        self.feature_norm = nn.LayerNorm(5, eps=1e-5)
        self.feature_mlp = LiLiCorrMLP(5, width, width)
        self.slot_embedding = nn.Parameter(torch.zeros(1, 1, block_size - 1, 1, width))
        self.rank_embedding = nn.Parameter(torch.zeros(1, 1, 1, self.num_candidates, width))
        # One for each distance of two slots, from -(block_size - 1) to block_size - 1.
        self.relative_slot_bias = nn.Parameter(torch.zeros(num_heads, 2 * block_size - 1))
        self.same_slot_bias = nn.Parameter(torch.zeros(num_heads))
        inner = int(sizes["mlp_ratio"] * width)
        self.layers = nn.ModuleList(
            LiLiCorrLayer(width, inner, num_heads, config.rms_norm_eps) for _ in range(sizes["num_layers"])
        )
        self.output_norm = Qwen3RMSNorm(width, config.rms_norm_eps)
        self.anchor_norm = Qwen3RMSNorm(width, config.rms_norm_eps)
        self.factor_input_proj = nn.Linear(3 * width, width)
        self.out_head = nn.Linear(width, sizes["factor_dim"])
        self.in_head = nn.Linear(width, sizes["factor_dim"])
        self.anchor_out_head = nn.Linear(width, sizes["factor_dim"])

    @staticmethod
    def is_in(nested: Mapping[str, object]) -> bool:
        """Return whether a `dflash_config` has one."""
        return bool(nested.get("lilicorr_enabled"))

    def forward(self, embeds: Tensor, log_probs: Tensor, hidden: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Score the first candidates, and all pairs of candidates of neighbouring slots.

        Args:
            embeds: "block slot candidate hidden", target embeddings of the candidates of the first slots, best first.
            log_probs: "block slot candidate", in fp32, of the drafter's softmax over all tokens.
            hidden: "block slot hidden", of the slots, as the LM head reads them.
            anchor: "block hidden", the row that attention reads of the token before the anchor.

        Returns:
            Scores in fp32: "block candidate", after the anchor; and "block pair before after", where pair 0 is the one
            of the first two slots.
        """
        dtype = self.factor_input_proj.weight.dtype
        num_slots, num_candidates = log_probs.shape[1:]
        ranks = torch.arange(num_candidates, device=log_probs.device).expand_as(log_probs)
        below_best = log_probs - log_probs.amax(-1, keepdim=True)
        # From 0 for the best to 1 for the last; a single candidate has rank 0.
        relative_ranks = ranks / max(1, num_candidates - 1)
        facts = [log_probs, log_probs.exp(), below_best, relative_ranks, (ranks == 0).float()]
        # "block slot candidate width", until slots and candidates become the entries of a block.
        rows = self.feature_mlp(self.feature_norm(torch.stack(facts, dim=-1).to(dtype)))
        rows = rows + self.token_proj(embeds.to(dtype))
        rows = rows + self.pass_hidden_proj(hidden.to(dtype))[:, :, None]
        rows = (rows + self.slot_embedding[0, :, :num_slots] + self.rank_embedding[0]).flatten(1, 2)
        bias = self.bias(num_slots, num_candidates)[None]
        for layer in self.layers:
            rows = layer(rows, bias)
        context = self.anchor_norm(self.context_proj(anchor.to(dtype)))  # "block width"
        rows = self.output_norm(rows)
        factor_input = [rows, context[:, None].expand_as(rows), rows * context[:, None]]
        rows = nn.functional.silu(self.factor_input_proj(torch.cat(factor_input, dim=-1)))
        rows = rows.unflatten(1, (num_slots, num_candidates))
        before = self._unit(self.out_head(rows[:, :-1]))  # the last slot begins no pair
        after = self._unit(self.in_head(rows))
        first = self._unit(self.anchor_out_head(context))
        # Autocast would round scores to bf16: in steps of 1/32 near 8.
        with torch.autocast(rows.device.type, enabled=False):
            start = (after[:, 0] @ first[..., None])[..., 0]
            return self.logit_scale * start, self.logit_scale * before @ after[:, 1:].mT

    def bias(self, num_slots: int, num_candidates: int) -> Tensor:
        """Compute what attention adds to the scores of the first slots' candidates, "head entry entry"."""
        slots = torch.arange(num_slots, device=self.same_slot_bias.device)
        distance = slots[:, None] - slots
        # Distance 0 is the middle of the table.
        bias = self.relative_slot_bias[:, distance + self.block_size - 1]
        bias = bias + self.same_slot_bias[:, None, None] * (distance == 0)
        # From slots to entries: the candidates of a slot follow one another.
        return bias.repeat_interleave(num_candidates, 1).repeat_interleave(num_candidates, 2)

    def _unit(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors.float(), dim=-1, eps=self.vector_eps)


SELECTOR_NETWORKS = {
    "lilicorr": LiLiCorrNetwork,
    "candidate_selector": CandidateSelectorNetwork,
    "markov_head": MarkovHead,
}
"""Networks of selectors. A drafter has one as an attribute of this name where its config has it."""
TOKEN_TABLES = (
    "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook",
    "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight",
)
"""Parameters with a row for each token; Muon leaves them to AdamW."""


def published(config: Any) -> dict[str, Any]:
    """Return the part of a drafter's config that most engines read."""
    return getattr(config, "dflash_config", None) or {}


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Refuse the config of a drafter that this network would compute wrongly.

    Raises:
        ValueError: biases, sinks or scales of attention, windows in MiMo's spelling, another head of DSpark than its
            plain one, interleaved rotation, or another activation.
    """
    keys = ("attention_bias", "use_swa", "attention_sink_bias", "attention_value_scale", "rope_interleaved")
    usual = {"hidden_act": "silu", "is_neox_style": True, "rope_is_neox_style": True, "markov_head_type": "vanilla"}
    nested = config.get("dflash_config") or {}
    unknown = {}
    for prefix, group in (("", config), ("dflash_config.", nested)):
        for key in keys:
            value = group.get(key)
            # A scale of 1.0 changes nothing, but True, which equals it, turns something on.
            if value is True or value not in (None, False, 1.0):
                unknown[prefix + key] = value
        for name, expected in usual.items():
            if group.get(name) not in (None, expected):
                unknown[prefix + name] = group[name]
    if unknown:
        raise ValueError(
            f"the drafter's config has {unknown}; this network supports only attention without biases, sinks and "
            "scales, NeoX's rotation, silu, and of DSpark's heads the vanilla one: serve this drafter with the project "
            "that trained it"
        )


class DFlashDraftModel(Qwen3PreTrainedModel):
    """Qwen3 layers over `[anchor, mask, ...]` that attend to the target's features.

    It owns `fc`, `hidden_norm`, the layers and `norm`; the embedding and the LM head are the target's, or its own where
    the config says so. An own head may have fewer rows: row `i` is token `i + d2t[i]`. With
    `conv_kernel_size` in the config it is DFlash2's network without a selector; one of `SELECTOR_NETWORKS` is used by
    who runs it, not by `forward`. The arguments of `forward` are named as in transformers' DFlash generation, which
    takes this class as `assistant_model`.

    Raises:
        ValueError: a config of a variant that this network does not support.

    Source: DFlash (arXiv 2602.06036), section 4; checkpoint layout of z-lab/dflash.
    """

    config_class = Qwen3Config
    _no_split_modules = ["DFlashLayer"]

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        nested = published(config)
        # Published configs may have them in `dflash_config` only.
        for key in ("block_size", "mask_token_id", "target_layer_ids"):
            if key in nested:
                setattr(config, key, nested[key])
        refuse_variants(config.to_dict())
        self.layers = nn.ModuleList(DFlashLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.embed_tokens: nn.Embedding | None = None
        self.lm_head: nn.Linear | None = None
        if getattr(config, "has_own_embed_tokens", False):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        num_drafted = getattr(config, "draft_vocab_size", 0)
        if num_drafted or getattr(config, "has_own_lm_head", False):
            self.lm_head = nn.Linear(config.hidden_size, num_drafted or config.vocab_size, bias=False)
        if num_drafted:
            self.register_buffer("d2t", torch.zeros(num_drafted, dtype=torch.long))
        has_selector = any(network.is_in(nested) for network in SELECTOR_NETWORKS.values())
        with torch.random.fork_rng(devices=[]):  # so that all else starts as without a selector
            for name, network in SELECTOR_NETWORKS.items():
                setattr(self, name, network(config) if network.is_in(nested) else None)
        if nested.get("conv_kernel_size") and not has_selector:
            self.candidate_selector = NeutralSelector(config)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Initialize a module; called by transformers, for a part before its whole."""
        super()._init_weights(module)
        if hasattr(module, "initialize"):  # a class of this file with weights of its own
            module.initialize()

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: Mask | Mapping[str, Mask] = None,
        cache: Cache | None = None,
        block_size: int | None = None,
        past_key_values: Cache | None = None,
        **_: object,
    ) -> BaseModelOutput:
        """Compute the hidden states of blocks.

        Args:
            noise_embeds: "batch query hidden", target embeddings of the slots of one or more blocks.
            context_hidden_states: "batch context feature", features of the tokens that are not in the cache yet.
            position_ids: "batch new", absolute positions of the context, then of the slots (`new = context + query`).
            attention_mask: a dense mask over all keys (True: visible), a `BlockMask` of flex_attention, or one of these
                for each of the config's `layer_types`, by name; None where one block is drafted, whose slots see all
                that the layer lets them see. A 2-D padding mask is also accepted.
            cache: receives keys and values of the context and the slots; the caller removes the slots' own.
            block_size: slots of each block, where several are drafted; by default the config's.
            past_key_values: another name of `cache`, which transformers before 5.24 gives.

        Returns:
            `last_hidden_state`, "batch query hidden": the LM head's input. And one of `hidden_states`, "batch context
            hidden": the rows that attention reads of the context.
        """
        if cache is None:
            cache = past_key_values
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()  # "batch 1 1 key", the same for all heads and slots
        context = self.hidden_norm(self.fc(context_hidden_states.to(self.dtype)))
        hidden = noise_embeds.to(self.dtype)
        rope = self.rotary_emb(hidden, position_ids)
        layers: Any = self.layers
        for layer in layers:
            mask = attention_mask
            if isinstance(attention_mask, Mapping):
                mask = attention_mask[layer.self_attn.kind]
            # By position, as transformers' gradient checkpointing needs it.
            hidden = layer(hidden, context, rope, mask, cache, block_size)
        return BaseModelOutput(last_hidden_state=self.norm(hidden), hidden_states=(context,))


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _small_tiles(device: torch.device, head_dim: int) -> Any:
    """Return tiles for the backward pass of wide heads where shared memory is small; None where torch's own fit.

    Torch's may not fit there (pytorch issue 133254). Tiles of 32 fit for heads up to 256 (pytorch pull request 198228).
    """
    if torch.version.cuda is None or device.type != "cuda" or head_dim < 128:
        return None
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin > SMALL_SHARED_MEMORY:
        return None
    return {"bwd_num_stages": 2, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32}
