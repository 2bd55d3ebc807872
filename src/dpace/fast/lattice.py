"""LiLiCorr's network in half as many operations.

A block has some hundred narrow rows, so most of the time of `dpace.modeling_dflash.LiLiCorr` passes between its
products. `fuse_lattice` lets it compute with combined products; results are equal up to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpace.fast.packing import FastForm, FastModule
from dpace.modeling_dflash import LiLiCorr


def fuse_lattice(head: LiLiCorr) -> None:
    """Fuse a head on a CPU, in place; elsewhere it stays as it is.

    Memory: a copy of the head's weights, in place of packed copies.
    """
    if head.factor_input_proj.weight.device.type != "cpu":
        return
    for linear in head.modules():
        if isinstance(linear, nn.Linear):
            vars(linear).pop("fast", None)  # its packed copy
            linear.__class__ = nn.Linear
    head.__class__ = FusedLattice


class FusedLattice(FastModule, LiLiCorr):
    """A head whose own code still runs where the fused products cannot be used."""

    def forward(self, embeds, log_probs, hidden, anchor):
        """Score the candidates as `LiLiCorr.forward` does."""
        is_whole = log_probs.shape[1] == self.block_size - 1
        if not is_whole or not self.is_usable(hidden, torch.float32) or torch.compiler.is_compiling():
            return super().forward(embeds, log_probs, hidden, anchor)
        if self.fast is None:
            self.fast = LatticeForm(self)
        return self.fast.score(embeds, log_probs, hidden, anchor)


class LatticeForm(FastForm):
    """The head's weights as its products read them: turned, joined, and with the weights of norms inside them."""

    def __init__(self, head: Any):
        super().__init__(head)
        self.head = head
        k = head.num_candidates
        num_slots = head.block_size - 1
        slots = torch.arange(num_slots)
        distance = slots[:, None] - slots
        bias = head.relative_slot_bias[:, distance + num_slots]
        bias = bias + head.same_slot_bias[:, None, None] * (distance == 0)
        self.bias = bias.repeat_interleave(k, 1).repeat_interleave(k, 2)
        inputs = [head.feature_mlp.down_proj, head.pass_hidden_proj]
        self.token = None if isinstance(head.token_proj, nn.Identity) else head.token_proj.weight.T.contiguous()
        if self.token is not None:
            inputs.append(head.token_proj)
        self.places = head.slot_embedding[0] + head.rank_embedding[0] + sum(linear.bias for linear in inputs)
        self.feature = head.feature_mlp.down_proj.weight.T.contiguous()
        ranks = torch.arange(k).expand(num_slots, k)
        self.constants = torch.stack([ranks / max(1, k - 1), (ranks == 0).float()], dim=-1)
        self.epsilon = torch.tensor(head.output_norm.variance_epsilon)
        self.width = torch.tensor(float(len(head.output_norm.weight)))
        self.layers = [self._layer_weights(layer) for layer in head.layers]
        self.factors = head.factor_input_proj.weight.split(head.factor_input_proj.in_features // 3, dim=1)
        self.outputs = torch.cat([head.out_head.weight, head.in_head.weight]).T.contiguous()
        self.output_bias = torch.cat([head.out_head.bias, head.in_head.bias])

    def _layer_weights(self, layer: Any) -> list[Tensor]:
        """Return weight and bias of query, key and value; of the attention's output; and of the two of the MLP."""
        attention = layer.attn
        width = attention.embed_dim
        scales = torch.ones(3 * width)
        scales[:width] = (width // attention.num_heads) ** -0.5  # of the queries
        qkv = attention.in_proj_weight * layer.attn_norm.weight * scales[:, None]
        up = layer.mlp.up_proj.weight * layer.mlp_norm.weight
        linears = [attention.out_proj, layer.mlp.down_proj]
        out, down = (linear.weight.T.contiguous() for linear in linears)
        up_bias = layer.mlp.up_proj.bias
        pairs = [qkv.T.contiguous(), attention.in_proj_bias * scales, out, linears[0].bias]
        return [*pairs, up.T.contiguous(), up_bias, down, linears[1].bias]

    def norm(self, rows: Tensor) -> Tensor:
        """Apply an RMSNorm without weights, in half as many operations as torch's."""
        return rows * torch.addcdiv(self.epsilon, (rows * rows).sum(-1, keepdim=True), self.width).rsqrt_()

    def score(self, embeds: Tensor, log_probs: Tensor, hidden: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `LiLiCorr.forward` returns, of whole blocks."""
        head = self.head
        num_blocks, num_slots, k = log_probs.shape
        chances = torch.stack([log_probs, log_probs.exp(), log_probs - log_probs.amax(-1, keepdim=True)], dim=-1)
        features = torch.cat([chances, self.constants.expand(num_blocks, -1, -1, -1)], dim=-1)
        features = nn.functional.silu(head.feature_mlp.up_proj(head.feature_norm(features))).flatten(0, 2)
        start = self.places + (hidden @ head.pass_hidden_proj.weight.T)[:, :, None]
        rows = start.flatten(0, 2).addmm_(features, self.feature)
        if self.token is None:
            rows.add_(embeds.flatten(0, 2))
        else:
            rows.addmm_(embeds.flatten(0, 2), self.token)
        for weights in self.layers:
            self._add_layer(rows, num_blocks, *weights)
        context = head.anchor_norm(head.context_proj(anchor))
        own, by_context, of_both = self.factors
        product = head.output_norm.weight * (own + of_both * context[:, None])  # "block out in"
        offset = torch.addmm(head.factor_input_proj.bias, context, by_context.T)
        rows = self.norm(rows).unflatten(0, (num_blocks, -1))
        rows = nn.functional.silu(torch.baddbmm(offset[:, None], rows, product.mT)).flatten(0, 1)
        both = torch.addmm(self.output_bias, rows, self.outputs).view(num_blocks, num_slots, k, 2, -1)
        before, after = head._unit(both).unbind(3)
        return head._scores(before[:, :-1], after, head._unit(head.anchor_out_head(context)))

    def _add_layer(self, rows, num_blocks, qkv, qkv_bias, out, out_bias, up, up_bias, down, down_bias):
        """Add a layer's attention and feed-forward to `rows`, "entry width", in place."""
        num_heads, num_entries = self.bias.shape[:2]
        heads = torch.addmm(qkv_bias, self.norm(rows), qkv).view(num_blocks, num_entries, 3, num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).flatten(1, 2)
        bias = self.bias if num_blocks == 1 else self.bias.repeat(num_blocks, 1, 1)
        attended = torch.baddbmm(bias, query, key.mT).softmax(-1) @ value
        attended = attended.unflatten(0, (num_blocks, num_heads)).transpose(1, 2).reshape(rows.shape)
        rows.addmm_(attended, out).add_(out_bias)
        inner = nn.functional.silu(torch.addmm(up_bias, self.norm(rows), up))
        rows.addmm_(inner, down).add_(down_bias)
