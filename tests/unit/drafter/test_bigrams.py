"""DSpark's head begins with how often tokens follow each other: against counts in a loop."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dpace.batches.dataset import ResponseDataset
from dpace.drafter import Drafter, bigrams
from dpace.drafter.bigrams import begin_with_bigrams
from dpace.training.run import make_datasets, train
from tests.support.models import make_drafter, make_recipe


def begun(target, dataset, rank):
    """A head that begins with the bigrams of a dataset."""
    head = make_drafter(target, selector="markov_head", selector_width=rank).markov_head
    begin_with_bigrams(head, dataset)
    return head


@pytest.fixture
def dataset(language_responses):
    return ResponseDataset(language_responses[:8], max_length=40, num_anchors=4, seed=0)


def smoothed(dataset, places=range(64)):
    """The probability of each of some tokens after each other one, by loops, and the share of each."""
    tokens, pairs = Counter(), Counter()
    for number in range(len(dataset)):
        token_ids = dataset.token_ids(number).tolist()
        for place, is_answer in enumerate(dataset.is_response(number).tolist()):
            if is_answer:
                tokens[token_ids[place]] += 1
                pairs[token_ids[place - 1], token_ids[place]] += 1
    share = torch.tensor([tokens[token] + 0.5 for token in range(64)])
    share /= share.sum()
    prior = bigrams.PRIOR * share / share[list(places)].sum()
    probs = [[pairs[a, b] + float(prior[b]) for b in places] for a in places]
    return torch.tensor(probs) / torch.tensor(probs).sum(-1, keepdim=True), share


def divergence(head, dataset):
    """The mean divergence of a head's probabilities from the counted ones, in nats, and the share of each token."""
    probs, share = smoothed(dataset)
    log_probs = (head.markov_w1.weight @ head.markov_w2.weight.T).log_softmax(-1)
    return share @ (probs * (probs.log() - log_probs)).sum(-1), probs, share


def test_next_token_probs_are_those_of_a_loop(dataset):
    _, share = smoothed(dataset)
    places = share.topk(20).indices.flip(0)
    probs, _ = smoothed(dataset, places.tolist())
    torch.testing.assert_close(bigrams.next_token_probs(dataset, share, places), probs)


def test_tables_that_are_large_enough_give_the_counted_probabilities(language_target, dataset):
    assert divergence(begun(language_target, dataset, 65), dataset)[0] < 0.01


def test_smaller_tables_are_nearer_than_the_best_squares(language_target, dataset):
    """A singular value decomposition gives the tables of a rank with the smallest squared error of the logarithms."""
    rank = 8
    head = begun(language_target, dataset, rank)
    found, probs, share = divergence(head, dataset)
    log_ratios = (probs / share).log()
    log_ratios -= log_ratios @ share[:, None]
    root = share.sqrt()
    left, values, right = torch.linalg.svd(root[:, None] * log_ratios * root)
    squares = (left[:, : rank - 1] * values[: rank - 1]) @ right[: rank - 1] / root[:, None] / root + share.log()
    by_squares = share @ (probs * (probs.log() - squares.log_softmax(-1))).sum(-1)
    alone = share @ (probs * (probs / share).log()).sum(-1)
    assert found < by_squares < alone
    torch.testing.assert_close(
        head.markov_w1.weight[:, -1:] @ head.markov_w2.weight[:, -1:].T, share.log().repeat(64, 1)
    )


def test_tokens_that_are_not_frequent_enough_have_their_frequency_alone(language_target, dataset, monkeypatch):
    monkeypatch.setattr(bigrams, "MAX_TOKENS", 20)
    head = begun(language_target, dataset, 8)
    _, share = smoothed(dataset)
    rare = share < share.topk(20).values[-1]
    assert rare.any()
    for table in (head.markov_w1.weight, head.markov_w2.weight):
        assert not table[rare, :-1].any() and table[share.argmax(), :-1].any()


def test_without_answers_all_tokens_are_as_likely(language_target):
    head = begun(language_target, ResponseDataset([], max_length=40, num_anchors=4, seed=0), 8)
    probs = (head.markov_w1.weight @ head.markov_w2.weight.T).softmax(-1)
    torch.testing.assert_close(probs, torch.full((64, 64), 1 / 64))


def test_a_training_begins_with_them_once(language_target, language_responses, tmp_path, monkeypatch):
    """A resumed one has its own tables, and one from another drafter has that one's."""
    recipe = make_recipe({"selector": "markov_head", "selector_width": 16}, max_steps=2, save_steps=1)
    recipe = replace(recipe, train=replace(recipe.train, learning_rate=1e-9))
    datasets = make_datasets(language_target, language_responses[:20], [], recipe)
    drafter = train(language_target, *datasets, recipe, tmp_path / "one")
    expected = begun(language_target, datasets[0], 16).state_dict()
    torch.testing.assert_close(drafter.markov_head.state_dict(), expected, rtol=1e-2, atol=1e-3)  # its file is in bf16

    monkeypatch.setattr("dpace.drafter.markov_head.begin_with_bigrams", None)
    (tmp_path / "one" / "provenance.json").unlink()  # as if it had been interrupted
    again = train(language_target, *datasets, recipe, tmp_path / "one")
    torch.testing.assert_close(again.state_dict(), drafter.state_dict())
    init = Drafter.from_pretrained(tmp_path / "one")
    from_it = replace(recipe, drafter=replace(recipe.drafter, init=str(tmp_path / "one")))
    other = train(language_target, *datasets, from_it, tmp_path / "two", init=init)
    torch.testing.assert_close(other.markov_head.state_dict(), expected, rtol=1e-2, atol=1e-3)
