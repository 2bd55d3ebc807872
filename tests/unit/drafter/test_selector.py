"""LiLiCorr: its network against a published test vector, and the walk through its scores."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpace.batches.dataset import ResponseDataset
from dpace.config import DrafterConfig
from dpace.decode import generate, generate_batch
from dpace.decode.sampling import Sampler
from dpace.drafter.lattice import Lattice, LatticeDraft, LatticeSelector, take_walk
from dpace.drafter.lilicorr import LiLiCorrSizes
from dpace.drafter.markov_head import MarkovSizes
from dpace.drafter.selector import Selector
from dpace.measure.heldout import heldout_acceptance, measure_vocabularies
from dpace.modeling_dflash import LiLiCorrNetwork
from dpace.respond.responses import Response
from dpace.target.draft_rows import DraftRows
from tests.support.models import make_target, make_with_candidate_selector, make_with_markov_head, make_with_selector


def test_blocks_go_on_after_another_one_was_wrong(unchecked_types):
    """Each is accepted up to its first wrong slot, and to its last scored one."""
    labels = torch.tensor([[[9, 1, 2, 3, 4], [9, 5, 6, 7, 8], [9, 1, 1, 1, 1]]])
    drafted = labels.clone()
    drafted[0, 0, 1] = drafted[0, 1, 4] = 0
    is_scored = torch.tensor([[[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]]).bool()
    blocks = SimpleNamespace(labels=labels, is_scored=is_scored, block_size=5)
    states = torch.nn.functional.one_hot(drafted, 10).float()
    rows: Any = SimpleNamespace(logits=lambda states: states, tokens=lambda tokens: tokens)
    _, is_accepted = Selector().match(SimpleNamespace(hidden=states, blocks=blocks), rows)
    assert is_accepted.sum(-1).tolist() == [[0, 3, 2]]


def test_the_published_vector():
    """With weights that follow from their names."""
    sizes = {"candidate_topk": 3, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2.0, "factor_dim": 8}
    sizes |= {"vector_eps": 1e-4, "logit_scale": 8.0}
    nested = {f"lilicorr_{name}": value for name, value in sizes.items()}
    network = LiLiCorrNetwork(SimpleNamespace(hidden_size=32, block_size=4, rms_norm_eps=1e-5, dflash_config=nested))
    network.requires_grad_(False)
    assert network.relative_slot_bias.shape == (2, 7), "that of published files"
    for name, parameter in network.named_parameters():
        n, c = torch.arange(parameter.numel(), dtype=torch.float32), sum(name.encode())
        parameter.copy_((0.2 * torch.sin(0.17 * n + 0.013 * c)).view(parameter.shape))
    embedding = torch.linspace(-1.2, 1.3, 512).view(16, 32)
    candidates = torch.tensor([[2, 5, 9], [6, 3, 1], [4, 7, 8]])
    log_probs = torch.tensor([[-0.4, -1.5, -3.0], [-0.6, -1.7, -2.7], [-0.2, -2.1, -3.4]])
    hidden, anchor = torch.linspace(-0.7, 0.9, 96).view(3, 32), torch.linspace(-0.5, 0.4, 32)
    start, pairs = network(embedding[candidates][None], log_probs[None], hidden[None], anchor[None])
    expected = [
        [-2.00565147, -2.00631571, -2.01010752],
        [1.16437435, 1.16812551, 1.15701485],
        [1.14475155, 1.14125943, 1.12357390],
    ]
    found = torch.stack([start[0], pairs[0, 0, 0], pairs[0, 1, 2]])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("hidden_size", "options", "expected"),
    [
        (576, {}, (4, 96, 4)),
        (1024, {}, (8, 256, 8)),
        (48, {"selector_candidates": 16}, (16, 8, 1)),
        (1024, {"selector_width": 1024}, (8, 0, 8)),
    ],
)
def test_a_small_target_gets_a_smaller_selector(hidden_size, options, expected):
    sizes = LiLiCorrSizes.chosen(DrafterConfig(selector="lilicorr", **options), hidden_size)
    assert (sizes.candidate_topk, sizes.hidden_size, sizes.num_heads) == expected
    assert sizes.options(hidden_size).items() >= options.items()


def test_dsparks_head_has_the_published_rank():
    assert [MarkovSizes.chosen(DrafterConfig(), size).rank for size in (1023, 1024)] == [64, 256]


def test_a_walk_that_is_drawn_is_over_the_temperature(unchecked_types):
    """Nearly 0 draws the best walk."""
    scores = torch.tensor([[[[0.0, 1.0]] * 2, [[0.0, 1.0], [1.0, 0.0]]]])
    lattice = Lattice(torch.tensor([[[4, 5], [6, 7]]]), scores, torch.zeros(1, 2))
    rows: Any = SimpleNamespace(target=SimpleNamespace(head=SimpleNamespace(weight=range(8))))
    draft = LatticeDraft(rows, *take_walk(lattice), lattice)
    tokens, probs = draft.draw(2, Sampler(0.01, seed=0))
    assert tokens.tolist() == [5, 6] and probs.sum(-1).tolist() == [1, 1]


def test_the_walk_is_a_loop_over_rows():
    candidates = torch.rand(5, 3, 20).argsort(-1)[..., :4]
    lattice = Lattice(candidates, torch.randn(5, 3, 4, 4), torch.randn(5, 3))
    lattice.scores[0] = 1.0  # ties: the first
    tokens, scores = take_walk(lattice)
    for block in range(5):
        taken = 0
        for slot in range(3):
            row = lattice.scores[block, slot, taken]
            taken = max(range(4), key=lambda j, row=row: (float(row[j]), -j))
            assert tokens[block, slot] == candidates[block, slot, taken]
            torch.testing.assert_close(scores[block, slot, :4], row)
            torch.testing.assert_close(scores[block, slot].softmax(-1)[:4].sum().logit(), lattice.log_odds[block, slot])


@torch.no_grad()
def test_the_lattice_in_training_is_that_of_decoding_in_any_batch(monkeypatch):
    """Also the anchor row of each text, whatever the texts beside it have read."""
    target = make_target("qwen3")
    drafter = make_with_selector(target, block_size=5)
    found = []
    propose = LatticeSelector.propose

    def spy(*args):
        draft = propose(*args)
        found.append(draft.lattice.scores)
        assert (draft.lattice.log_odds.abs() < 10).all(), "of four candidates of 64"
        assert draft.scores.shape[:2] == draft.tokens.shape
        return draft

    def watch(function, *args, **options):
        """What it returns, and the lattices of its drafts."""
        found.clear()
        return function(*args, **options), found[:]

    monkeypatch.setattr(LatticeSelector, "propose", spy)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    options = {"max_new_tokens": 9, "stop_token_ids": []}
    outs, batched = watch(generate_batch, target, drafter, prompts, **options)
    for row, (prompt, out) in enumerate(zip(prompts, outs, strict=True)):
        _, alone = watch(generate, target, drafter, prompt, width="full", **options)
        for together, single in zip(batched, alone, strict=False):
            if len(together) == 2:
                torch.testing.assert_close(together[row], single[0], atol=1e-4, rtol=1e-4)
        text = prompt + out.token_ids
        response = Response("a", "set", [], text, [[len(prompt), len(text)]])
        dataset = ResponseDataset([response], max_length=99, num_anchors=None, seed=0)
        _, (trained, *_) = watch(heldout_acceptance, drafter, target, dataset)
        anchor = 0
        for scores, accepted in zip(alone, out.accepted_lengths, strict=False):
            torch.testing.assert_close(trained[anchor], scores[0], atol=1e-3, rtol=1e-3)
            anchor += accepted + 1


@pytest.mark.parametrize("make", [make_with_candidate_selector, make_with_markov_head])
@torch.no_grad()
def test_what_is_measured_of_the_selector_is_what_decoding_does(make, language_target, questions, monkeypatch):
    """Accepted lengths, and the scores that confidences are computed from; also where some tokens alone are drafted."""
    drafter = make(language_target, block_size=5)
    kind, has_candidates = type(drafter.selector), drafter.selector.num_candidates > 1
    drafts, parts, propose = [], [], kind.propose
    monkeypatch.setattr(kind, "propose", lambda *args: drafts.append(propose(*args)) or drafts[-1])
    prompt = questions[0]
    out = generate(language_target, drafter, prompt, max_new_tokens=30, width="full", stop_token_ids=[])
    response = Response("a", "set", [], prompt + out.token_ids, [[len(prompt), len(prompt) + 30]])
    dataset = ResponseDataset([response], max_length=99, num_anchors=None, seed=0)
    every = torch.arange(64).flip(0)
    both = measure_vocabularies(
        drafter, language_target, dataset, [None, every], visit=lambda *part: parts.append(part)
    )
    reached = slice(out.accepted_lengths[0] + 1)
    for found, (_, states, _), token_ids in zip(both, parts, (None, every), strict=True):
        assert found.rows.tolist() == out.acceptance.rows.tolist()
        scores = drafter.selector.scores(states[reached], DraftRows(language_target, token_ids))
        if token_ids is not None and not has_candidates:
            scores = scores.flip(-1)
        torch.testing.assert_close(scores, drafts[0].scores[0, reached], atol=1e-4, rtol=1e-4)
        assert found.tau < found.bounds[1] if has_candidates else not found.bounds


@torch.no_grad()
def test_dsparks_head_counts_after_the_token_that_is_drafted(language_target):
    """A loop over slots and texts, with all tokens and with some, as drafted and as drawn."""
    drafter = make_with_markov_head(language_target, block_size=5)
    head = drafter.markov_head
    hidden, last_ids = torch.randn(2, 5, 48), torch.tensor([7, 9])
    for token_ids in (None, torch.tensor([40, 3, 17, 9, 22])):
        rows = DraftRows(language_target, token_ids)
        allowed = torch.arange(64) if token_ids is None else token_ids
        draft = drafter.selector.propose(rows, hidden, last_ids, hidden[:, 0], 4)
        assert draft.tokens.shape == (2, 3)
        for text in range(2):
            before = int(last_ids[text])
            for slot in range(3):
                logits = language_target.head.logits(hidden[text, slot + 1])
                scores = (logits + head.markov_w2.weight @ head.markov_w1.weight[before])[allowed]
                torch.testing.assert_close(draft.scores[text, slot], scores, atol=1e-4, rtol=1e-4)
                before = int(allowed[scores.argmax()])
                assert draft.tokens[text, slot] == before
        alone = drafter.selector.propose(rows, hidden[:1], last_ids[:1], hidden[:1, 0], 4)
        tokens, probs = alone.draw(3, Sampler(0.0001, seed=0))
        assert torch.equal(tokens, draft.tokens[0]) and probs.shape == (3, 64)


@pytest.mark.parametrize("selector", ["lilicorr", "candidate_selector"])
def test_more_candidates_than_tokens_are_refused(selector):
    target = make_target("qwen3", vocab_size=12)
    make_with_selector(target, selector=selector, selector_candidates=8)
    with pytest.raises(ValueError, match="chooses from 16 tokens, and there are 12; take fewer"):
        make_with_selector(target, selector=selector, selector_candidates=16)
