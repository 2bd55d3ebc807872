"""Numbers that nobody here wrote: those of other projects' own tests, and of their code.

They are copied as data, from these files at these commits:

* D-PACE, the author's code: Lucas-TY/D-PACE f36bad6e6b0f, tests/test_utils/test_dflash_losses.py
* Model-Optimizer: NVIDIA/Model-Optimizer a2fbac7bad8a, tests/unit/torch/speculative/plugins/test_hf_dflash.py
* SpecForge: sgl-project/SpecForge a6b6b0230009, tests/test_utils/test_dflash_losses.py and test_dflash_mask.py,
  specforge/algorithms/common/dflash_family_model.py and specforge/modeling/draft/dspark.py;
  187edb9ec5ed (pull request 880), tests/test_utils/test_dflash_walk.py;
  611df5430bdd (pull request 874, open), tests/test_utils/test_dflash_opd.py
* TorchSpec: lightseekorg/TorchSpec 6f21829cd0e3, tests/test_dflash.py
* speculators: vllm-project/speculators c05b95b303f7, tests/unit/models/test_dflash_attention.py, test_dflash_utils.py,
  test_dspark_metrics.py and test_dspark_model_definitions.py, and the code that these test
* DeepSpec: deepseek-ai/DeepSpec afdfa7c9382a, deepspec/modeling/dspark/markov_head.py
* optimum-intel: huggingface/optimum-intel e1de5beecfd0, optimum/exporters/openvino/model_patcher.py
"""

import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import Qwen3Config

from dpace.blocks import FULL, Blocks, Reach, build_blocks, build_target_layer_ids, dense_mask, sample_anchors
from dpace.config import LossConfig
from dpace.drafter.markov_head import MarkovSelector
from dpace.drafter.views import BlocksHidden
from dpace.loss import block_loss, frozen_head_nll
from dpace.loss.objective import make_weigh, with_objective
from dpace.measure.heldout import walk
from dpace.modeling_dflash import DFlashDraftModel, MarkovHead
from dpace.target.draft_rows import DraftRows
from dpace.target.head import LmHead
from dpace.weights import dflash_weights, dpace_confidence_only_weights, dpace_weights


def row(*values):
    """The slots of one block."""
    return torch.tensor([[values]])


def seen_keys(num_context, anchors, reach=FULL):
    """The keys that each slot sees, in blocks of 4 of a text of one response."""
    token_ids = torch.zeros(1, num_context, dtype=torch.long)
    blocks = build_blocks(token_ids, token_ids == 0, [torch.tensor(anchors)], block_size=4)
    mask = dense_mask(blocks, num_context, reach)
    return [keys.nonzero().flatten().tolist() for keys in mask[0, 0]]


def test_layer_ids():
    """Of Model-Optimizer and TorchSpec."""
    assert build_target_layer_ids(36, 5) == [1, 9, 17, 25, 33]
    assert build_target_layer_ids(36, 2) == [1, 33]


def test_weights():
    """D-PACE's of Model-Optimizer, and the expected length of TorchSpec.

    TorchSpec's `simulated_acc_len` multiplies mean accuracies and leaves out the bonus token. So it is the sum that
    D-PACE's weights come from, and not tau, which is counted block by block.
    """
    probs = row(0.0, 0.8, 0.5)
    assert dpace_weights(probs, probs > 0, 0.5)[0, 0].tolist() == pytest.approx([0, 1.575, 0.675])
    masked = dpace_weights(row(0.0, 0.9, 0.2, 0.3, 0.8), row(False, True, False, True, True), 0.5)
    kept = dpace_weights(row(0.0, 0.9, 0.3, 0.8), row(False, True, True, True), 0.5)
    torch.testing.assert_close(masked[..., [0, 1, 3, 4]], kept)
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


def test_overlap():
    """SpecForge's Draft-OPD: three slots of overlap 0.7.

    Its loss is `1 - (sum of products) / slots`. `dpace+lk+overlap` at alpha 0 has its gradient times the slots, and
    another value, because its weights are constants and its losses logarithms. The weight of the first slot is that
    sum.
    """
    target_hidden = torch.tensor([0.2, 0.6, 0.2]).log().repeat(1, 1, 4, 1)
    hidden = torch.tensor([0.0, 0.0, -40.0]).repeat(1, 1, 4, 1).requires_grad_()
    is_scored = row(False, True, True, True)
    config = with_objective(LossConfig(alpha=0.0), "dpace+lk+overlap")
    options = {"weigh": make_weigh(config, 4), "token_loss": config.token_loss, "target_hidden": target_hidden}
    scores = frozen_head_nll(hidden, LmHead(torch.eye(3)), is_scored.long(), is_scored, **options)
    scores.losses.sum().backward()
    assert 1 - scores.weights[0, 0, 1].item() / 3 == pytest.approx(1 - (0.7 + 0.49 + 0.343) / 3)
    expected = [0.25 * (1 + 0.7 + 0.49) / 3, 0.25 * (0.7 + 0.49) / 3, 0.25 * 0.49 / 3]
    assert hidden.grad is not None
    assert (hidden.grad[0, 0, 1:, 0] / 3).tolist() == pytest.approx(expected)


def test_anchors():
    """SpecForge's.

    A batch without an anchor is an error there; here its loss is 0. TorchSpec takes an anchor only where its whole
    block fits into the text, and so leaves the ends out: none of 4 tokens with blocks of 8.
    """
    masks = {"1101011": [0, 5], "0011": [2], "0011000": [2], "1010000": [], "000011": [4], "101": []}
    assert {mask: sample_anchors([bit == "1" for bit in mask]).tolist() for mask in masks} == masks
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


def waves(*shape, start=0.0):
    """Numbers that no generator draws."""
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(start + 1.7 * places).float().view(shape)


@pytest.mark.parametrize(
    ("kind", "expected"), [("full", [1.16546, 0.86043, 0.06377]), ("sliding", [2.0961, 1.11614, 1.07705])]
)
@torch.no_grad()
def test_the_network(kind, expected):
    """The first number of each slot from optimum-intel's `Qwen3DFlashDraftModel` with these weights.

    Names and shapes of its tensors are the same.
    Its slots see all slots of their block, with windows too. Here a config says so by `is_causal`; without that word
    sliding layers are causal, as in z-lab's code.
    """
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    reach = {"layer_types": [f"{kind}_attention"] * 2, "use_sliding_window": True, "sliding_window": 5}
    own = {"block_size": 3, "mask_token_id": 0, "target_layer_ids": [0, 1]}
    config = Qwen3Config(**sizes, **heads, **reach, **{"is_causal": False, "dflash_config": own})
    network = DFlashDraftModel(config)
    for number, (name, weight) in enumerate(sorted(network.named_parameters())):
        drawn = waves(*weight.shape, start=number)
        weight.copy_(1 + 0.3 * drawn if "norm" in name else drawn / 2)
    out = network(waves(1, 3, 8, start=0.5), waves(1, 7, 16, start=0.25), torch.arange(10)[None])
    torch.testing.assert_close(out.last_hidden_state[0, :, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture
def dspark():
    """DSpark's head of rank 3 beside a target of 11 tokens, the rows of its LM head, and two blocks of 3 drafts."""
    network = MarkovHead(SimpleNamespace(vocab_size=11, dflash_config={"markov_rank": 3})).requires_grad_(False)
    network.markov_w1.weight.copy_(waves(11, 3, start=0.2))
    network.markov_w2.weight.copy_(waves(11, 3, start=0.3))
    head = LmHead(waves(11, 6, start=0.1))
    rows = Mock(spec=DraftRows, head=head, token_ids=None, logits=head.logits, tokens=lambda index: index)
    labels = torch.tensor([[[7, 2, 5, 9], [3, 3, 0, 10]]])
    is_scored = torch.tensor([[[0, 1, 1, 1], [0, 1, 1, 0]]]).bool()
    anchors = torch.tensor([[0, 4]])
    hidden = waves(1, 2, 4, 6, start=0.4)
    drafted = BlocksHidden(hidden, Blocks(anchors, labels, is_scored, anchors >= 0), hidden[:, :, 0], None, None)
    return MarkovSelector(network), rows, drafted


def test_the_loss_of_dsparks_head(dspark):
    """speculators' means of "ce" over 5 slots, as sums, and SpecForge's sum; and what the head adds to 4 tokens."""
    selector, rows, drafted = dspark
    network, blocks = selector.network, drafted.blocks
    added = network.markov_w2(network.markov_w1(blocks.labels[0, 0, 0]))
    torch.testing.assert_close(added[:4], torch.tensor([-0.496993, 0.652061, 0.989922, 0.096276]), rtol=1e-4, atol=1e-5)
    states, head = selector.states(drafted), selector.head(rows)
    for weigh, expected in (
        (lambda slots: dflash_weights(slots.is_scored, gamma=4.0), 20.31904),
        (lambda slots: dpace_weights(slots.token_probs, slots.is_scored, alpha=0.5), 5 * 2.252317),
    ):
        found = frozen_head_nll(states, head, blocks.labels, blocks.is_scored, weigh=weigh)
        assert float(found.losses.sum()) == pytest.approx(expected, rel=1e-4)
    by_slot = found.nll.sum((0, 1))
    torch.testing.assert_close(by_slot, torch.tensor([0.0, 8.468887, 10.017456, 6.674941]), rtol=1e-4, atol=1e-4)


def test_the_drafts_of_dsparks_head(dspark):
    """SpecForge's and DeepSpec's tokens, and the first logit of each slot."""
    selector, rows, drafted = dspark
    draft = selector.propose(rows, drafted.hidden[0], drafted.blocks.labels[0, :, 0], lambda: drafted.before[0], 4)
    assert draft.tokens.tolist() == [[1, 7, 8], [8, 3, 4]]
    expected = [[-2.213072, 0.123303, 2.308403], [0.136741, -1.116235, -4.424423]]
    torch.testing.assert_close(draft.scores[..., 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
