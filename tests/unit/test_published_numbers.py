"""Numbers that nobody here wrote: those of other projects' own tests, and of their code.

They are copied as data, from these files at these commits:

* D-PACE, the author's code: Lucas-TY/D-PACE f36bad6e6b0f, tests/test_utils/test_dflash_losses.py
* Model-Optimizer: NVIDIA/Model-Optimizer a2fbac7bad8a, tests/unit/torch/speculative/plugins/test_hf_dflash.py
* SpecForge: sgl-project/SpecForge a6b6b0230009, tests/test_utils/test_dflash_losses.py and test_dflash_mask.py;
  187edb9ec5ed (pull request 880), tests/test_utils/test_dflash_walk.py
* TorchSpec: lightseekorg/TorchSpec 6f21829cd0e3, tests/test_dflash.py
* speculators: vllm-project/speculators c05b95b303f7, tests/unit/models/test_dflash_attention.py
"""

import pytest
import torch

from dpace.blocks import FULL, Reach, build_blocks, build_target_layer_ids, dense_mask, sample_anchors
from dpace.config import LossConfig
from dpace.loss import block_loss, frozen_head_nll
from dpace.loss.objective import make_weigh
from dpace.measure.heldout import walk
from dpace.target.head import LmHead
from dpace.weights import dflash_weights, dpace_confidence_only_weights, dpace_weights


def row(*values):
    """The slots of one block."""
    return torch.tensor([[values]])


def seen_keys(num_context, anchors, reach=FULL):
    """The keys that each slot sees, in blocks of 4 of a text of one response."""
    token_ids = torch.zeros(1, num_context, dtype=torch.long)
    blocks = build_blocks(token_ids, token_ids == 0, [torch.tensor(anchors)], 4)
    mask = dense_mask(blocks, num_context, reach)
    return [keys.nonzero().flatten().tolist() for keys in mask[0, 0]]


def test_layer_ids():
    """Of Model-Optimizer and TorchSpec."""
    assert build_target_layer_ids(36, 5) == [1, 9, 17, 25, 33]
    assert build_target_layer_ids(36, 2) == [1, 33]
    assert build_target_layer_ids(36, 1) == [18]
    assert build_target_layer_ids(32, 1) == [16]


def test_weights():
    """D-PACE's of Model-Optimizer, and the decay and the expected length of TorchSpec.

    TorchSpec's `simulated_acc_len` multiplies mean accuracies and leaves out the bonus token. So it is the sum that
    D-PACE's weights come from, and not tau, which is counted block by block.
    """
    probs = row(0.0, 0.8, 0.5)
    assert dpace_weights(probs, probs > 0, 0.5)[0, 0].tolist() == pytest.approx([0, 1.575, 0.675])
    masked = dpace_weights(row(0.0, 0.9, 0.2, 0.3, 0.8), row(False, True, False, True, True), 0.5)
    kept = dpace_weights(row(0.0, 0.9, 0.3, 0.8), row(False, True, True, True), 0.5)
    torch.testing.assert_close(masked[..., [0, 1, 3, 4]], kept)
    decay = dflash_weights(row(*[True] * 16), gamma=7.0)[0, 0]
    assert decay[[1, 2, 15]].tolist() == pytest.approx([1, 0.867, 0.135], abs=5e-4)
    probs = row(0.5, 0.4, 0.5)
    assert dpace_confidence_only_weights(probs, probs > 0, 0.0).sum().item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("objective", "reduction", "expected", "gradient"),
    [
        ("uniform", "weights", 3.24120883, 0.30887584),
        ("dflash", "weights", 3.24591610, 0.31252244),
        ("dpace", "batch", 8.31436856, 0.98800591),
        ("dpace-confidence-only", "batch", 4.82762676, 0.54185876),
        ("dpace-continuation-only", "batch", 27.48392460, 2.67810866),
    ],
)
def test_losses(objective, reduction, expected, gradient):
    """The inputs of D-PACE's tests, also SpecForge's: what the author's code gives for them, with its gradient's norm.

    His D-PACE divides by the number of sequences, `batch`. The default here is SpecForge's since its pull request 848.
    """
    torch.manual_seed(123)
    logits = torch.randn(2, 2, 5, 13, dtype=torch.double).float().requires_grad_()
    token_ids = torch.tensor([[1, 4, 2, 8, 3, 7, 5, 6, 9], [2, 5, 1, 4, 7, 3, 8, 10, 11]])
    is_response = torch.ones_like(token_ids, dtype=torch.bool)
    is_response[0, 7] = is_response[1, 6] = False
    blocks = build_blocks(token_ids, is_response, [torch.tensor([0, 3]), torch.tensor([1])], block_size=5)
    weigh = make_weigh(LossConfig(objective=objective, gamma=7.0), block_size=5)
    scores = frozen_head_nll(logits, LmHead(torch.eye(13)), blocks.labels, blocks.is_scored, weigh=weigh)
    loss, num_items = block_loss(scores.losses, blocks.is_scored, scores.weights, reduction=reduction)
    loss = loss / num_items
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(gradient, rel=1e-5)


def test_anchors():
    """SpecForge's, with the one target of a block that begins at the last token but one.

    A batch without an anchor is an error there; here its loss is 0. TorchSpec takes an anchor only where its whole
    block fits into the text, and so leaves the ends out: none of 4 tokens with blocks of 8.
    """
    masks = {"1101011": [0, 5], "0011": [2], "0011000": [2], "1010000": [], "000011": [4], "101": []}
    assert {mask: sample_anchors([bit == "1" for bit in mask]).tolist() for mask in masks} == masks
    token_ids = torch.tensor([[1, 2, 3, 4]])
    tail = build_blocks(token_ids, token_ids > 0, [torch.tensor([2])], block_size=5)
    assert tail.labels[tail.is_scored].tolist() == [4] and tail.is_scored[0, 0, 1]
    assert sample_anchors([True] * 4).tolist() == [0, 1, 2]


def test_what_slots_see():
    """With windows Model-Optimizer's and SpecForge's; TorchSpec's; the counts of speculators' function.

    speculators packs texts of 10 and 6 tokens into one row, so its third anchor is 12; here each text is a row.
    Its windows are others, see `dpace.modeling_dflash.DFlashAttention`. SpecForge's window does not limit a block that
    is longer than it; here blocks are shorter.
    """
    window = [[key for key in keys if key < 16] for keys in seen_keys(16, [10], Reach(6))]
    assert window == [[5, 6, 7, 8, 9], [6, 7, 8, 9], [7, 8, 9], [8, 9]]
    causal = [[3, 4, 5, 12], [4, 5, 12, 13], [5, 12, 13, 14], [12, 13, 14, 15]]
    assert seen_keys(12, [6], Reach(4, is_causal=True)) == causal
    assert seen_keys(16, [8]) == [[*range(8), 16, 17, 18, 19]] * 4
    assert seen_keys(16, [4, 12])[::4] == [[*range(4), 16, 17, 18, 19], [*range(12), 20, 21, 22, 23]]
    for length, anchors, counts in ((10, [3, 8], [7, 12]), (6, [2], [6]), (12, [2, 7, 10], [6, 11, 14])):
        assert [len(keys) for keys in seen_keys(length, anchors)][::4] == counts


def test_accepted_lengths():
    """SpecForge's walks.

    SpecForge goes from one sampled anchor to the next. Here every token of a response is an anchor, so a gap between
    sampled ones is the end of a response.
    """
    walks = [
        ({0: 2, 1: 0, 2: 5, 3: 1, 4: 0, 5: 3}, [(0, 10)], (9, 3)),
        ({0: 3, 1: 0, 2: 0, 10: 0}, [(0, 5), (10, 12)], (5, 2)),
        ({1: 0, 8: 0}, [(1, 3), (8, 10)], (2, 2)),
        ({}, [], (0, 0)),
    ]
    for accepted_from, spans, expected in walks:
        found = walk(accepted_from, spans, block_size=6)
        assert (found.emitted_tokens.sum(), found.counts.sum()) == expected
