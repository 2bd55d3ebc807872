"""Let DSpark's head begin with how often tokens follow each other, before the first step of training."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpace.drafter.selector import Conversations
from dpace.modeling_dflash import MarkovHead

MAX_TOKENS = 4096
"""Most frequent tokens whose pairs are counted; with 2,048, other answers were predicted worse."""
PRIOR = 20.0
"""Pairs that each token has on top of the counted ones, spread over all tokens by how frequent these are.

Of 5, 20 and 60: fewer predict other answers of the same kinds a little better, and other text worse."""
NUM_STEPS = 300
"""Steps of Adam; benchmarks/tried.md compares 1,000."""
NUM_ROWS = 256
"""Tokens `a` in each step."""
LEARNING_RATE = 0.03
"""The first one; it falls to 0."""


@torch.no_grad()
def begin_with_bigrams(head: MarkovHead, conversations: Conversations) -> None:
    """Set the tables so that `softmax(<W1[a], W2[b]>)` is about how often token `b` follows token `a` in the answers.

    A drafter then only has to learn what the text before `a` changes. The last column is how frequent each token is, so
    that tokens that are not in the answers are not likely. The other columns are fitted to the counted pairs.

    Time: `NUM_STEPS * NUM_ROWS` rows of `MAX_TOKENS` scores, some seconds on a CPU. Memory: `2 * MAX_TOKENS ** 2`
    numbers in fp32, 0.13 GB.

    Args:
        head: of an untrained drafter.
        conversations: what it will be trained on.

    Source: ours; the head is DSpark's (arXiv 2607.05147).
    """
    vocab_size, rank = head.markov_w1.weight.shape
    counts = torch.zeros(vocab_size)
    for number in range(len(conversations)):
        answers = conversations.token_ids(number)[conversations.is_response(number)]
        counts += answers.bincount(minlength=vocab_size)
    share = (counts + 0.5) / (counts + 0.5).sum()
    frequent = share.topk(min(MAX_TOKENS, vocab_size)).indices
    probs = next_token_probs(conversations, share, frequent)
    first, second = fit_tables(probs, share[frequent], rank - 1)
    for weight, fitted in ((head.markov_w1.weight, first), (head.markov_w2.weight, second)):
        weight.zero_()
        weight[frequent, :-1] = fitted.to(weight)
    head.markov_w1.weight[:, -1] = 1
    head.markov_w2.weight[:, -1] = share.log()


def next_token_probs(
    conversations: Conversations, share: Float[Tensor, " vocab"], frequent: Int[Tensor, " frequent"]
) -> Float[Tensor, "frequent frequent"]:
    """Compute the share of each token among the tokens after `a` in the answers, with `PRIOR`; a row for each `a`.

    Args:
        conversations: with the answers.
        share: of each token among all, above 0.
        frequent: ids of the tokens whose pairs count.
    """
    size = len(frequent)
    places = torch.full((len(share),), -1)
    places[frequent] = torch.arange(size)
    counts = torch.zeros(size, size)
    for number in range(len(conversations)):
        token_places = places[conversations.token_ids(number)]
        before = token_places[:-1]
        after = token_places[1:]
        is_counted = conversations.is_response(number)[1:] & (before >= 0) & (after >= 0)
        pairs = before[is_counted], after[is_counted]
        counts.index_put_(pairs, torch.ones(()), accumulate=True)
    counts += PRIOR * share[frequent] / share[frequent].sum()
    return counts.div_(counts.sum(-1, keepdim=True))


def fit_tables(
    probs: Float[Tensor, "token token"], share: Float[Tensor, " token"], rank: int
) -> tuple[Float[Tensor, "token rank"], Float[Tensor, "token rank"]]:
    """Fit two tables, so that `softmax(<first[a], second[b]> + log share[b])` has a small cross-entropy to `probs[a]`.

    The mean is over tokens `a` by how frequent they are. A singular value decomposition of the logarithms takes no
    steps, but rank 64 predicted other answers worse with it: 3.59 nats for 3.06, and 3.09 for the counts themselves.

    Args:
        probs: of `next_token_probs`, a row for each token before.
        share: of each token among all, above 0.
        rank: columns of a table.

    Returns:
        The tables of the token before and of the token after.
    """
    generator = torch.Generator().manual_seed(0)
    first = nn.Parameter(0.1 * torch.randn(len(share), rank, generator=generator))
    second = nn.Parameter(0.1 * torch.randn(len(share), rank, generator=generator))
    optimizer = torch.optim.Adam([first, second], lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, NUM_STEPS)
    with torch.enable_grad():
        for _ in range(NUM_STEPS):
            rows = share.multinomial(NUM_ROWS, replacement=True, generator=generator)
            scores = first[rows] @ second.T + share.log()
            nn.functional.cross_entropy(scores, probs[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return first.detach(), second.detach()
