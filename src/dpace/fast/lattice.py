"""LiLiCorr's network in half as many operations.

A block has some hundred narrow rows, so most of the time of `dpace.modeling_dflash.LiLiCorr` passes between its
products. `fuse_lattice` lets it compute with combined products; results are equal up to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from dpace.fast.fusion import inverse_rms
from dpace.fast.packing import FastForm, FastModule, unpack
from dpace.modeling_dflash import LiLiCorr


def fuse_lattice(head: LiLiCorr) -> None:
    """Fuse a head on a CPU, in place; elsewhere it stays as it is.

    Memory: a copy of the head's weights, in place of packed copies.
    """
    if head.factor_input_proj.weight.device.type != "cpu":
        return
    unpack(module for module in head.modules() if isinstance(module, nn.Linear))
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
    """The head's weights as its products read them: joined, and with the weights of norms inside them."""

    def __init__(self, head: Any):
        super().__init__(head)
        self.head = head
        self.bias = head.bias(head.block_size - 1, head.num_candidates)
        self.feature = head.feature_mlp.down_proj.weight.T
        inputs = [head.feature_mlp.down_proj, head.pass_hidden_proj]
        self.token = None
        if isinstance(head.token_proj, nn.Linear):
            inputs.append(head.token_proj)
            self.token = head.token_proj.weight.T
        self.places = head.slot_embedding[0] + head.rank_embedding[0] + sum(part.bias for part in inputs)
        ranks = torch.arange(head.num_candidates).expand(head.block_size - 1, -1)
        self.constants = torch.stack([ranks / max(1, head.num_candidates - 1), (ranks == 0).float()], dim=-1)
        self.epsilon = torch.tensor(head.output_norm.variance_epsilon)
        self.width = torch.tensor(float(len(head.output_norm.weight)))
        self.layers = [self._layer_weights(layer) for layer in head.layers]
        self.factors = head.factor_input_proj.weight.chunk(3, dim=1)
        both = zip(head.out_head.parameters(), head.in_head.parameters(), strict=True)
        self.outputs = [torch.cat(pair) for pair in both]

    def _layer_weights(self, layer: Any) -> list[list[Tensor]]:
        """Return weight and bias of query, key and value; of the attention's output; and of the two of the MLP."""
        qkv = [layer.attn.in_proj_weight * layer.attn_norm.weight, layer.attn.in_proj_bias]
        up = [layer.mlp.up_proj.weight * layer.mlp_norm.weight, layer.mlp.up_proj.bias]
        return [qkv, [*layer.attn.out_proj.parameters()], up, [*layer.mlp.down_proj.parameters()]]

    def norm(self, rows: Tensor) -> Tensor:
        """Apply an RMSNorm without weights."""
        return rows * inverse_rms(rows, self.epsilon, self.width)

    def score(self, embeds: Tensor, log_probs: Tensor, hidden: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `LiLiCorr.forward` returns, of whole blocks."""
        head = self.head
        num_blocks, num_slots, k = log_probs.shape
        chances = torch.stack([log_probs, log_probs.exp(), log_probs - log_probs.amax(-1, keepdim=True)], dim=-1)
        features = torch.cat([chances, self.constants.expand(num_blocks, -1, -1, -1)], dim=-1)
        features = silu(head.feature_mlp.up_proj(head.feature_norm(features))).flatten(0, 2)
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
        offset = linear(context, by_context, head.factor_input_proj.bias)
        rows = self.norm(rows).unflatten(0, (num_blocks, -1))
        rows = silu(torch.baddbmm(offset[:, None], rows, product.mT)).flatten(0, 1)
        both = linear(rows, *self.outputs).view(num_blocks, num_slots, k, 2, -1)
        before, after = head._unit(both).unbind(3)
        return head._scores(before[:, :-1], after, head._unit(head.anchor_out_head(context)))

    def _add_layer(self, rows, num_blocks, qkv, out, up, down):
        """Add a layer's attention and feed-forward to `rows`, "entry width", in place."""
        num_heads, num_entries = self.bias.shape[:2]
        heads = linear(self.norm(rows), *qkv).view(num_blocks, num_entries, 3, num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).flatten(1, 2)
        bias = self.bias if num_blocks == 1 else self.bias.repeat(num_blocks, 1, 1)
        scores = torch.baddbmm(bias, query, key.mT, alpha=query.shape[-1] ** -0.5)
        attended = (scores.softmax(-1) @ value).unflatten(0, (num_blocks, num_heads))
        rows.add_(linear(attended.transpose(1, 2).reshape(rows.shape), *out))
        rows.add_(linear(silu(linear(self.norm(rows), *up)), *down))
