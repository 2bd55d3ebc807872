"""The LiLiCorr head: its network against the formulas and a published test vector."""

import math
from types import SimpleNamespace

import pytest
import torch

from dpace.batches.dataset import ResponseDataset
from dpace.decode import generate, generate_batch
from dpace.drafter import load_drafter
from dpace.drafter.lilicorr import Lattice, LatticeSelector, sizes_for, take_walk, walk_losses
from dpace.fast.lattice import FusedLattice
from dpace.fast.packing import refresh_copies
from dpace.measure.heldout import score_conversation
from dpace.modeling_dflash import LiLiCorr
from dpace.respond.responses import Response
from tests.conftest import make_drafter, make_target, make_with_head

SIZES = {"candidate_topk": 3, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2.0, "factor_dim": 8}
SIZES |= {"vector_eps": 1e-4, "logit_scale": 8.0}


def make_head(hidden_size=32, block_size=4, **changes):
    nested = {f"lilicorr_{name}": value for name, value in (SIZES | changes).items()}
    config = SimpleNamespace(hidden_size=hidden_size, block_size=block_size, rms_norm_eps=1e-5, dflash_config=nested)
    return LiLiCorr(config).requires_grad_(False)


@pytest.fixture
def vector():
    """The frozen inputs of the published test, and a head whose weights follow from the names."""
    head = make_head()
    for name, parameter in head.named_parameters():
        n, c = torch.arange(parameter.numel(), dtype=torch.float32), sum(name.encode())
        parameter.copy_((0.2 * torch.sin(0.17 * n + 0.013 * c)).view(parameter.shape))
    embedding = torch.linspace(-1.2, 1.3, 512).view(16, 32)
    candidates = torch.tensor([[2, 5, 9], [6, 3, 1], [4, 7, 8]])
    log_probs = torch.tensor([[-0.4, -1.5, -3.0], [-0.6, -1.7, -2.7], [-0.2, -2.1, -3.4]])
    hidden, anchor = torch.linspace(-0.7, 0.9, 96).view(3, 32), torch.linspace(-0.5, 0.4, 32)
    return head, tuple(x[None] for x in (embedding[candidates], log_probs, hidden, anchor))


def reference(head, embeds, log_probs, hidden, anchor):
    """The scores of one block, written from the formulas with loops, in fp64."""
    w = {name: value.double() for name, value in head.state_dict().items()}
    embeds, log_probs, hidden, anchor = (x.double() for x in (embeds, log_probs, hidden, anchor))
    num_slots, k = log_probs.shape
    width, num_heads = w["slot_embedding"].shape[-1], len(w["same_slot_bias"])

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def rms(x, name):
        return w[f"{name}.weight"] * x / torch.sqrt((x * x).mean() + 1e-5)

    def silu(x):
        return x / (1 + torch.exp(-x))

    def unit(x):
        return x / max(float(x.norm()), head.vector_eps)

    rows = []
    for s in range(num_slots):
        for j in range(k):
            value, best = log_probs[s, j], log_probs[s].max()
            five = torch.stack(
                [value, value.exp(), value - best, torch.tensor(j / (k - 1)), torch.tensor(float(j == 0))]
            )
            five = (five - five.mean()) / torch.sqrt(five.var(unbiased=False) + 1e-5)
            five = w["feature_norm.weight"] * five + w["feature_norm.bias"]
            five = linear(silu(linear(five, "feature_mlp.up_proj")), "feature_mlp.down_proj")
            token = linear(embeds[s, j], "token_proj") if "token_proj.weight" in w else embeds[s, j]
            row = five + token + linear(hidden[s], "pass_hidden_proj")
            rows.append(row + w["slot_embedding"][0, 0, s, 0] + w["rank_embedding"][0, 0, 0, j])
    for n in range(len(head.layers)):
        normed = [rms(row, f"layers.{n}.attn_norm") for row in rows]
        weight, bias = w[f"layers.{n}.attn.in_proj_weight"], w[f"layers.{n}.attn.in_proj_bias"]
        projected = [(weight @ row + bias).view(3, num_heads, width // num_heads) for row in normed]
        for a in range(len(rows)):
            heads = []
            for h in range(num_heads):
                scores = []
                for b in range(len(rows)):
                    slot_a, slot_b = a // k, b // k
                    score = projected[a][0, h] @ projected[b][1, h] / math.sqrt(width // num_heads)
                    score = score + w["relative_slot_bias"][h, slot_a - slot_b + head.block_size - 1]
                    scores.append(score + w["same_slot_bias"][h] * (slot_a == slot_b))
                shares = torch.stack(scores).softmax(0)
                heads.append(sum(share * projected[b][2, h] for b, share in enumerate(shares)))
            rows[a] = rows[a] + linear(torch.cat(heads), f"layers.{n}.attn.out_proj")
        mlp = f"layers.{n}.mlp"
        rows = [
            row + linear(silu(linear(rms(row, f"layers.{n}.mlp_norm"), f"{mlp}.up_proj")), f"{mlp}.down_proj")
            for row in rows
        ]
    a = rms(linear(anchor, "context_proj"), "anchor_norm")
    normed = [rms(row, "output_norm") for row in rows]
    factors = [silu(linear(torch.cat([row, a, row * a]), "factor_input_proj")) for row in normed]
    leaving = [unit(linear(g, "out_head")) for g in factors]
    arriving = [unit(linear(g, "in_head")) for g in factors]
    first = unit(linear(a, "anchor_out_head"))
    start = torch.stack([head.logit_scale * first @ arriving[j] for j in range(k)])
    pairs = [
        [[head.logit_scale * leaving[s * k + i] @ arriving[(s + 1) * k + j] for j in range(k)] for i in range(k)]
        for s in range(num_slots - 1)
    ]
    return start, torch.tensor(pairs)


def test_the_published_vector(vector):
    head, inputs = vector
    start, pairs = (scores[0] for scores in head(*inputs))
    found = torch.stack([start, pairs[0, 0], pairs[1, 2]])
    expected = [
        [-2.00565147, -2.00631571, -2.01010752],
        [1.16437435, 1.16812551, 1.15701485],
        [1.14475155, 1.14125943, 1.12357390],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 32}, {"factor_dim": 5, "num_heads": 4, "num_layers": 1}])
@pytest.mark.parametrize("num_slots", [3, 2])
def test_the_formulas(shape, num_slots):
    head = make_head(**shape)
    for parameter in head.parameters():
        parameter.normal_(std=0.3)
    inputs = torch.randn(2, 3, 3, 32), torch.randn(2, 3, 3).log_softmax(-1), torch.randn(2, 3, 32)
    inputs = tuple(x[:, :num_slots] for x in inputs)
    anchor = torch.randn(2, 32)
    start, pairs = head(*inputs, anchor, torch.tensor([True, False]))
    for number, row in enumerate((anchor[0], torch.zeros(32))):
        if number == 1:  # no row: the projection with its bias is 0
            head.context_proj.bias.zero_()
        expected = reference(head, *(x[number] for x in inputs), row)
        torch.testing.assert_close(start[number].double(), expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pairs[number].double(), expected[1].double(), atol=1e-5, rtol=0)


def test_it_starts_with_gradients_everywhere_and_leaves_the_network_as_it_was():
    target = make_target("qwen3")
    drafter, plain = make_drafter(target, head="lilicorr", head_candidates=8), make_drafter(target)
    assert all(torch.equal(value, drafter.state_dict()[name]) for name, value in plain.state_dict().items())
    log_probs = torch.randn(2, 3, 8).log_softmax(-1)
    start, pairs = drafter.lilicorr(torch.randn(2, 3, 8, 48), log_probs, torch.randn(2, 3, 48), torch.randn(2, 48))
    assert torch.stack([start.std(), pairs.std()]).min() > 1e-3
    (start.log_softmax(-1)[:, 0].sum() + pairs.log_softmax(-1)[..., 0].sum()).backward()
    assert all(bool(parameter.grad.any()) for parameter in drafter.lilicorr.parameters())


def test_a_small_target_gets_fewer_candidates():
    assert [sizes_for(size).candidate_topk for size in (576, 1024)] == [4, 8]
    assert sizes_for(576, 8).candidate_topk == 8


@pytest.mark.parametrize(("num_blocks", "width"), [(1, None), (3, 48)])
def test_the_fused_head_gives_the_same_scores(num_blocks, width, random_target, tmp_path):
    """Of whole blocks, with and without an anchor, also after a change of the weights; others take the head's own."""
    make_with_head(random_target, block_size=5, head_width=width).save_pretrained(tmp_path, dtype=torch.float32)
    drafter = load_drafter(tmp_path, random_target)
    hidden_size, k = random_target.hidden_size, 4
    inputs = [torch.randn(num_blocks, 4, k, hidden_size), torch.randn(num_blocks, 4, k).log_softmax(-1)]
    inputs += [torch.randn(num_blocks, 4, hidden_size), torch.randn(num_blocks, hidden_size)]
    assert isinstance(drafter.lilicorr, FusedLattice)
    for has_anchor in (None, torch.arange(num_blocks) > 0):
        with torch.no_grad():
            own = LiLiCorr.forward(drafter.lilicorr, *inputs, has_anchor)
            for found, expected in zip(drafter.lilicorr(*inputs, has_anchor), own, strict=True):
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
            assert drafter.lilicorr.fast is not None
            drafter.lilicorr.in_head.weight.mul_(-1)
        refresh_copies(drafter)
        assert drafter.lilicorr.fast is None
    with torch.no_grad():
        drafter.lilicorr(*(part[:, :3] for part in inputs[:3]), inputs[3])
    assert drafter.lilicorr.fast is None
    drafter.lilicorr(*inputs)[1].sum().backward()
    assert drafter.lilicorr.in_head.weight.grad.any()


def random_lattice(num_blocks=5, num_slots=3, k=4):
    candidates = torch.rand(num_blocks, num_slots, 20).argsort(-1)[..., :k]
    pairs = torch.randn(num_blocks, num_slots - 1, k, k)
    return Lattice(candidates, torch.randn(num_blocks, k), pairs, torch.randn(num_blocks, num_slots))


def test_the_walk_is_a_loop_over_rows():
    lattice = random_lattice()
    lattice.start[0] = lattice.pairs[0] = 1.0  # ties: the first
    tokens, scores = take_walk(lattice)
    for block in range(5):
        row = lattice.start[block]
        for slot in range(3):
            taken = max(range(4), key=lambda j, row=row: (float(row[j]), -j))
            assert tokens[block, slot] == lattice.candidates[block, slot, taken]
            torch.testing.assert_close(scores[block, slot, :4], row)
            torch.testing.assert_close(scores[block, slot].softmax(-1)[:4].sum().logit(), lattice.log_odds[block, slot])
            row = lattice.pairs[block, slot, taken] if slot < 2 else row
    assert tokens[0].tolist() == lattice.candidates[0, :, 0].tolist()


def test_the_loss_is_a_loop_over_slots():
    """Teacher-forced rows; a token that is no candidate has no loss, and none in the slot behind it."""
    lattice, target_logits = random_lattice(), torch.randn(5, 3, 4)
    index = torch.randint(4, (5, 3))
    labels = lattice.candidates.gather(-1, index[..., None])[..., 0]
    missing = torch.zeros(5, 3, dtype=torch.bool)
    missing[1, 0] = missing[2, 1] = missing[3, 2] = missing[4] = True
    labels = labels.masked_fill(missing, 99)
    lattice.pairs.requires_grad_()
    found = walk_losses(lattice, labels, target_logits, 0.25)
    for block in range(5):
        for slot in range(3):
            can_take = not missing[block, slot] and (slot == 0 or not missing[block, slot - 1])
            row = lattice.start[block] if slot == 0 else lattice.pairs[block, slot - 1, index[block, slot - 1]]
            probs, true = row.softmax(-1), index[block, slot]
            logits = target_logits[block, slot]
            penalty = sum(probs[j] * max(0.0, float(logits[true] - logits[j])) for j in range(4))
            expected = can_take * (0.25 * -probs[true].log() + 0.25 * penalty)
            torch.testing.assert_close(found.losses[block, slot], expected)
            torch.testing.assert_close(found.probs[block, slot], (can_take * probs[true]).detach())
            assert bool(found.is_match[block, slot]) == (can_take and int(probs.argmax()) == int(true))
    assert found.is_candidate.tolist() == (~missing).tolist()
    found.losses.sum().backward()
    assert not lattice.pairs.grad[4].any() and not lattice.pairs.grad[1, 0].any() and lattice.pairs.grad[0].any()


@torch.no_grad()
def test_the_lattice_in_training_is_that_of_decoding_in_any_batch(monkeypatch):
    """Also the anchor row of each text, whatever the texts beside it have read."""
    target = make_target("qwen3")
    drafter = make_with_head(target, block_size=5)
    found = []
    propose = LatticeSelector.propose

    def spy(*args):
        draft = propose(*args)
        found.append(draft.lattice)
        return draft

    monkeypatch.setattr(LatticeSelector, "propose", spy)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    outs = generate_batch(target, drafter, prompts, max_new_tokens=9, stop_token_ids=[])
    batched, alone = found[:], []
    for prompt, out in zip(prompts, outs, strict=True):
        found.clear()
        one = generate(target, drafter, prompt, max_new_tokens=9, stop_token_ids=[], width="full")
        assert (one.token_ids, one.accepted_lengths) == (out.token_ids, out.accepted_lengths)
        alone.append(found[:])
        assert generate(target, drafter, prompt, max_new_tokens=9, stop_token_ids=[]).token_ids == out.token_ids
    for row in (0, 1):
        for together, single in zip(batched, alone[row], strict=False):
            if len(together.start) == 2:
                torch.testing.assert_close(together.pairs[row], single.pairs[0], atol=1e-4, rtol=1e-4)
    for prompt, out, lattices in zip(prompts, outs, alone, strict=True):
        text = prompt + out.token_ids
        response = Response("a", "set", [], text, [[len(prompt), len(text)]])
        dataset = ResponseDataset([response], max_length=99, num_anchors=None, seed=0)
        scored = [matches[0][0][0] for _, matches in score_conversation(drafter, target, dataset, 0)][0]
        anchor = 0
        for lattice, accepted in zip(lattices, out.accepted_lengths, strict=False):
            torch.testing.assert_close(scored[anchor, 1:], take_walk(lattice)[1][0], atol=1e-3, rtol=1e-3)
            anchor += accepted + 1
