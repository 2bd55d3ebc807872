"""Training a drafter with a selector: its loss against all logits at once, and its options."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dpace.batches.dataset import ResponseDataset, collate
from dpace.config import LossConfig, Recipe, TrainConfig
from dpace.drafter.spec import SELECTORS
from dpace.drafter.views import blocks_hidden
from dpace.loss import Slots
from dpace.loss.objective import make_weigh
from dpace.loss.scorer import Scorer
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import read_log
from dpace.target.draft_rows import DraftRows
from dpace.training.loop import score_blocks
from dpace.training.optimizer import TABLE_DECAY, is_factor, make_optimizer
from dpace.training.run import make_datasets, train
from tests.support.models import (
    make_recipe,
    make_with_candidate_selector,
    make_with_markov_head,
    make_with_selector,
)


def make_scored(target, make=make_with_selector, **loss):
    """A drafter with a selector, and what computes its losses."""
    drafter = make(target, block_size=5, selector_candidates=8).train()
    config = LossConfig(**loss)
    needs = config.selector_penalty > 0
    return drafter, Scorer(config, make_weigh(config, 5), DraftRows(target), needs_target_hidden=needs)


@pytest.fixture
def batch(language_target, language_responses):
    """Blocks of three conversations, for a target that likes any token: of random last hidden states."""
    dataset = ResponseDataset(language_responses[:3], max_length=64, num_anchors=None, seed=0)
    batch = collate([dataset[i] for i in range(3)], 5)
    batch["features"] = language_target.features(batch["token_ids"], [1, 3])
    batch["head_input"] = torch.randn(3, batch["token_ids"].shape[1], 48)
    return batch


def naive(drafter, target, batch, weigh):
    """The loss of each block, from all logits, with a loop over blocks and slots."""
    found = blocks_hidden(drafter, target, batch, with_target_hidden=True)
    hidden, blocks = found.hidden, found.blocks
    log_probs = target.head.logits(hidden).log_softmax(-1)
    nll = -log_probs.gather(-1, blocks.labels[..., None])[..., 0].where(blocks.is_scored, 0.0)
    theirs = target.head.logits(found.target_hidden)
    probs = nll.detach().neg().exp()
    is_match = (log_probs.argmax(-1) == blocks.labels) & blocks.is_scored
    weights = weigh(Slots(blocks.is_scored, probs, is_match, None))
    losses = weights * nll
    for b, n in torch.cartesian_prod(*map(torch.arange, blocks.anchors.shape)).tolist():
        if not blocks.is_scored[b, n, 1:].all():
            continue
        top = log_probs[b, n, 1:].topk(drafter.selector.num_candidates)
        labels, anchor = blocks.labels[b, n, 1:].tolist(), int(blocks.anchors[b, n])
        row = drafter.hidden_norm(drafter.fc(batch["features"][b, anchor - 1]))
        inputs = target.embed(top.indices), top.values, hidden[b, n, 1:], row
        start, pairs = (scores[0] for scores in drafter.lilicorr(*(x[None] for x in inputs)))
        previous = 0
        for slot, label in enumerate(labels):
            places = (top.indices[slot] == label).nonzero().flatten().tolist()
            if not places:
                break
            r = (pairs[slot - 1, previous] if slot else start).softmax(-1)
            t = theirs[b, n, slot + 1]
            previous = places[0]
            cost = (r * (t[label] - t[top.indices[slot]]).clamp_min(0)).sum()
            losses[b, n, slot + 1] += -0.25 * r[previous].log() + 0.5 * cost
    return losses.sum(-1), weights


@pytest.mark.parametrize("objective", ["dpace", "vat"])
def test_the_loss_of_lilicorr_is_that_of_all_logits(objective, language_target, batch):
    """Values and every gradient, drafter and selector; and with the seen tokens alone, up to their softmax."""
    drafter, scorer = make_scored(language_target, objective=objective, selector_penalty=0.5)
    out, _ = score_blocks(drafter, scorer, batch)
    out.losses.sum().backward()
    found = {name: p.grad for name, p in drafter.named_parameters()}
    drafter.zero_grad()
    losses, weights = naive(drafter, language_target, batch, scorer.weigh)
    losses.sum().backward()
    seen = replace(scorer, rows=DraftRows(language_target, torch.arange(64).flip(0)))
    ours = [out.losses, out.weights, score_blocks(drafter, seen, batch)[0].losses]
    torch.testing.assert_close(ours, [losses, weights, losses], rtol=1e-4, atol=1e-4)
    for name, parameter in drafter.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name


def test_the_loss_of_dflash2s_selector_is_that_of_all_logits(language_target, batch):
    """A token that is no candidate takes the last one's place; the rest of the drafter gets no gradient from it."""
    drafter, scorer = make_scored(language_target, make_with_candidate_selector)
    network = drafter.candidate_selector
    out, blocks = score_blocks(drafter, scorer, batch)
    found = out.losses - (out.weights * out.token_losses).sum(-1)
    hidden = blocks_hidden(drafter, language_target, batch).hidden.detach()
    logits = language_target.head.logits(hidden)
    expected = 0.0
    for b, n, k in blocks.is_scored.nonzero().tolist():
        before, label = blocks.labels[b, n, k - 1 : k + 1]
        top = logits[b, n, k].topk(8).indices
        top[-1] = top[-1] if label in top else label
        query = network.predecessor_codebook[before] * network.hidden_projection(hidden[b, n, k])
        scores = logits[b, n, k, top] + network.successor_codebook[top] @ query
        expected = expected - out.weights[b, n, k] * scores.log_softmax(-1)[top == label][0]
    options = {"inputs": list(drafter.parameters()), "materialize_grads": True}
    grads = [torch.autograd.grad(loss, **options) for loss in (found.sum(), expected)]
    torch.testing.assert_close([found.sum(), *grads[0]], [expected, *grads[1]], rtol=1e-3, atol=1e-3)
    factors = [name for name, parameter in network.named_parameters("candidate_selector") if is_factor(name, parameter)]
    assert factors == ["candidate_selector.hidden_projection.weight"], "Muon leaves the tables out"
    tables = make_optimizer(drafter, TrainConfig(optimizer="muon")).param_groups[-1]
    assert len(tables["params"]) == 2 and tables["weight_decay"] == TABLE_DECAY


@pytest.mark.parametrize("objective", ["dpace", "vat"])
def test_the_loss_of_dsparks_head_is_that_of_all_logits(objective, language_target, batch):
    """Values and every gradient, drafter and first table; also with the seen tokens alone, in another order."""
    drafter, scorer = make_scored(language_target, make_with_markov_head, objective=objective)
    every = replace(scorer, rows=DraftRows(language_target, torch.arange(64).flip(0)))
    head = drafter.markov_head
    found = blocks_hidden(drafter, language_target, batch)
    blocks = found.blocks
    before = torch.cat([blocks.labels[..., :1], blocks.labels[..., :-1]], dim=-1)
    logits = language_target.head.logits(found.hidden) + head.markov_w2(head.markov_w1(before))
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(-1, blocks.labels[..., None])[..., 0].where(blocks.is_scored, 0.0)
    is_match = (log_probs.argmax(-1) == blocks.labels) & blocks.is_scored
    weights = scorer.weigh(Slots(blocks.is_scored, nll.detach().neg().exp(), is_match, None))
    expected = (weights * nll).sum(-1)
    expected.sum().backward()
    trained = {name: parameter for name, parameter in drafter.named_parameters() if parameter.requires_grad}
    assert {*dict(drafter.named_parameters())} - {*trained} == {"markov_head.markov_w2.weight"}
    grads = {name: parameter.grad for name, parameter in trained.items()}
    for each in (scorer, every):
        drafter.zero_grad()
        out, _ = score_blocks(drafter, each, batch)
        out.losses.sum().backward()
        ours = out.losses, out.nll, out.weights, out.is_match
        torch.testing.assert_close(ours, (expected, nll, weights, is_match), rtol=1e-4, atol=1e-4)
        for name, parameter in trained.items():
            assert (grads[name] - parameter.grad).norm() <= 1e-3 * grads[name].norm(), name
    batch["is_scored"][:] = False
    drafter.zero_grad()
    score_blocks(drafter, scorer, batch)[0].losses.sum().backward()
    grad = head.markov_w1.weight.grad
    assert grad is not None and not grad.any(), "ranks wait for each other's"


def test_every_option_of_a_selector_is_read_by_one():
    options = {name.partition(".")[2] for name in Recipe().settings if ".selector_" in name}
    assert options == {option for sizes in SELECTORS.values() for option in sizes.reads}


def test_a_selector_computes_in_the_precision_of_the_training(language_target, batch):
    """As the rest of the drafter does; what it gives is in fp32."""
    drafter, scorer = make_scored(language_target)
    network, seen = drafter.lilicorr, []
    network.out_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    network.register_forward_hook(lambda module, args, out: seen.extend(scores.dtype for scores in out))
    rounded = replace(scorer, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    score_blocks(drafter, rounded, batch)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_features_without_what_the_loss_reads_are_refused(language_target, batch):
    del batch["head_input"]
    drafter, scorer = make_scored(language_target)
    with pytest.raises(ValueError, match="kept without the input of the target's LM head, .* `dpace.make_"):
        score_blocks(drafter, scorer, batch)


def test_a_batch_without_a_whole_block_has_a_gradient_of_zero(language_target, batch):
    """So that ranks that exchange gradients all have one."""
    drafter, scorer = make_scored(language_target, selector_penalty=0.0)
    batch["is_scored"][..., 4] = False
    score_blocks(drafter, scorer, batch)[0].losses.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in drafter.lilicorr.parameters())


def test_the_log_says_what_the_selector_could_gain(language_target, language_responses, tmp_path):
    """Tau of the walk, beside those without the selector, and of the best walk through the candidates."""
    recipe = make_recipe(max_steps=2, eval_steps=2, logging_steps=2)
    recipe = replace(recipe, drafter=replace(recipe.drafter, selector="lilicorr", selector_candidates=4))
    datasets = make_datasets(language_target, language_responses[:8], language_responses[50:54], recipe)
    assert datasets[0].features[0].head_input is not None, "the penalty needs the target's last hidden states"
    drafter = train(language_target, *datasets, recipe, tmp_path)
    entry = read_log(tmp_path)[-1]
    found = heldout_acceptance(drafter, language_target, datasets[1])
    names = ("eval_tau", "eval_tau_top", "eval_tau_oracle")
    assert [entry[name] for name in names] == pytest.approx([found.tau, *found.bounds], abs=0.01)
    assert found.bounds[1] > max(found.tau, found.bounds[0])


def test_checkpointing_covers_the_layers_of_the_selector(language_target):
    drafter = make_with_selector(language_target)
    drafter.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in drafter.lilicorr.layers)
