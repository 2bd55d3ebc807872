"""Let DSpark's head begin with how often tokens follow each other, before the first step of training."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.modeling_dflash import MarkovHead

MAX_TOKENS = 4096
"""Most frequent tokens whose pairs are counted; with 2,048, other answers were predicted worse."""
PRIOR = 20.0
"""Pairs that each token has on top of the counted ones, spread over all tokens by how frequent these are.

Of 1, 5, 20 and 100, it predicted the next tokens of other answers of the same kinds best."""
OVERSAMPLING = 16
"""Singular values that are computed and not used, for the exactness of the others."""


@torch.no_grad()
def begin_with_bigrams(head: MarkovHead, dataset: ResponseDataset) -> None:
    """Set the tables so that `softmax(<W1[a], W2[b]>)` is about how often token `b` follows token `a` in the answers.

    A drafter then only has to learn what the text before `a` changes. The last column is how frequent each token is, so
    that tokens that are not in the answers are not likely. The other columns approximate `log_ratios`: of all tables of
    their rank they have about the smallest squared error, in a mean over pairs of tokens by how frequent both are.

    Memory: about `4 * MAX_TOKENS ** 2` numbers in fp32, 0.3 GB, for some seconds.

    Args:
        head: of an untrained drafter.
        dataset: what it will be trained on.

    Source: ours; the head is DSpark's (arXiv 2607.05147).
    """
    vocab_size, rank = head.markov_w1.weight.shape
    counts = torch.zeros(vocab_size)
    for number in range(len(dataset)):
        counts += dataset.token_ids(number)[dataset.is_response(number)].bincount(minlength=vocab_size)
    share = (counts + 0.5) / (counts + 0.5).sum()
    frequent = share.topk(min(MAX_TOKENS, vocab_size)).indices
    root = share[frequent].sqrt()[:, None]
    with torch.random.fork_rng():  # the approximation draws numbers
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(
            root * log_ratios(dataset, share, frequent) * root.T, q=min(rank + OVERSAMPLING, len(frequent)), niter=4
        )
    for table, vectors, frequency in (
        (head.markov_w1.weight, left, torch.ones(vocab_size)),
        (head.markov_w2.weight, right, share.log()),
    ):
        rows = torch.zeros(vocab_size, rank)
        num_values = min(rank - 1, len(values))
        rows[frequent, :num_values] = vectors[:, :num_values] * values[:num_values].sqrt() / root
        rows[:, -1] = frequency
        table.copy_(rows)


def log_ratios(
    dataset: ResponseDataset, share: Float[Tensor, " vocab"], frequent: Int[Tensor, " frequent"]
) -> Float[Tensor, "frequent frequent"]:
    """Compute how much likelier a token is after another one: `log(p(b | a) / p(b))`, with a row for each `a`.

    `p(b | a)` is the share of `b` among the tokens after `a` in the answers, with `PRIOR`. A constant of each row is
    left out, which changes no probability.

    Args:
        dataset: the conversations.
        share: `p(b)`, above 0.
        frequent: ids of the tokens whose pairs count.
    """
    size = len(frequent)
    places = torch.full((len(share),), -1)
    places[frequent] = torch.arange(size)
    counts = torch.zeros(size * size)
    for number in range(len(dataset)):
        token_places = places[dataset.token_ids(number)]
        before, after = token_places[:-1], token_places[1:]
        is_counted = dataset.is_response(number)[1:] & (before >= 0) & (after >= 0)
        pairs = (before * size + after)[is_counted]
        counts.index_add_(0, pairs, torch.ones(len(pairs)))
    ratios = counts.view(size, size).div_(share[frequent]).add_(PRIOR).log_()
    return ratios.sub_(ratios @ share[frequent, None] / share[frequent].sum())
