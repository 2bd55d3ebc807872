"""How the tokens of a draft are chosen from what the network computes for each slot; here, each slot's own best one.

Another selector is a file with a subclass of `Selector` and one of `SelectorSizes`. Training, measuring and decoding
call the methods of the first, and files and options those of the second. They know no more of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpace.config import DrafterConfig
from dpace.drafter.views import BlocksHidden
from dpace.drafter.vocabulary import DraftRows
from dpace.loss import SlotScores

SCORED_ROWS = 128
"""Number of slots whose logits exist at once where known responses are measured."""


class Draft(NamedTuple):
    """What a drafter proposes behind each text."""

    tokens: Int[Tensor, "batch draft"]
    """The best token of each slot."""
    scores: Float[Tensor, "batch draft choice"]
    """Logits of each slot's choices; of a selector that chooses from candidates, a last one for all other tokens."""
    lattice: Any = None
    """What a selector of the drafter's own keeps of it."""


class Selector:
    """Takes each slot's own best token.

    Args:
        drafter: whose network computes the hidden states.
    """

    name = ""
    """Name of its network in the drafter, with which the names of its tensors begin."""
    num_candidates = 1
    """Number of best tokens of each slot that it chooses from; 1 where it has no choice."""

    def __init__(self, drafter: Any):
        self.drafter = drafter

    def add_loss(
        self, scores: SlotScores, found: BlocksHidden, scorer: Any, whole_blocks: Int[Tensor, " whole"] | None
    ) -> SlotScores:
        """Add the loss that the selector itself is trained with; this one has nothing to train.

        Args:
            scores: of the blocks, without it.
            found: what the forward pass gave.
            scorer: of the training, see `dpace.train.loop.Scorer`.
            whole_blocks: numbers of the blocks all of whose slots are scored, where they are known; the host waits for
                the device otherwise.
        """
        return scores

    def propose(
        self,
        rows: DraftRows,
        hidden: Float[Tensor, "batch slot hidden"],
        last_ids: Int[Tensor, " batch"],
        before: Callable[[], Float[Tensor, "batch hidden"]],
        width: int,
    ) -> Draft:
        """Propose the best tokens.

        Args:
            rows: of the tokens that may be drafted.
            hidden: of whole blocks.
            last_ids: the tokens at the anchors.
            before: returns what the drafter's attention reads of the token before each anchor.
            width: number of slots that may be verified, the anchor included.
        """
        logits = rows.logits(hidden[:, 1:width].flatten(0, 1))
        tokens = rows.tokens(logits.float().argmax(-1)).unflatten(0, (len(hidden), -1))
        return Draft(tokens, logits.unflatten(0, tokens.shape))

    def draw(
        self, draft: Draft, num_drawn: int, rows: DraftRows, text: Sequence[int], sampler: Any
    ) -> tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]:
        """Draw a draft of one text for speculative sampling.

        Args:
            draft: what was proposed.
            num_drawn: number of slots that will be verified.
            rows: of the tokens that may be drafted.
            text: the tokens before the draft.
            sampler: the target's, of `dpace.decode.sampling`.

        Returns:
            The tokens, and the distribution that each was drawn from.
        """
        return draw_draft(rows.spread(draft.scores[0, :num_drawn]), text, sampler)

    def chances(
        self, draft: Draft, tokens: Int[Tensor, "path draft"], rows: DraftRows, sampler: Any
    ) -> Float[Tensor, "path draft vocab"]:
        """Return the distributions that `draw` draws from, where the slots before have these tokens.

        Args:
            draft: what was proposed behind one text.
            tokens: several drafts of the same length.
            rows: of the tokens that may be drafted.
            sampler: the target's, without processors.
        """
        probs = sampler.probs(sampler.scores(rows.spread(draft.scores[0]), ()))
        return probs.expand(len(tokens), -1, -1)

    def match(self, found: BlocksHidden, rows: DraftRows) -> tuple[Tensor, Bool[Tensor, "way block slot"]]:
        """Find the slots of a text's blocks that greedy verification accepts.

        Returns:
            States of the slots, "1 block slot state", of which `scores` makes those of a draft; and the accepted slots,
            as they are drafted, and behind that in the other ways of `Acceptance.bounds`.
        """
        blocks = found.blocks

        def judge(hidden: Tensor, labels: Tensor) -> Tensor:
            return rows.tokens(rows.logits(hidden).argmax(-1))[None] == labels

        return found.hidden, leading_matches(found.hidden, judge, blocks.labels, blocks.is_scored)[:, 0]

    def scores(self, states: Float[Tensor, "slot state"], rows: DraftRows) -> Float[Tensor, "slot choice"]:
        """Turn states of `match` into scores of a `Draft`."""
        return rows.logits(states)


@dataclass(frozen=True)
class SelectorSizes:
    """Sizes of a selector's network, as a config and the options of training have them.

    A subclass has a field for each; published config keys are their names behind `prefix`.
    """

    name: ClassVar[str]
    """Its choice of `--drafter.head`, and the name of its network in `dpace.modeling_dflash.SELECTORS`."""
    prefix: ClassVar[str] = ""
    """What its keys in `dflash_config` begin with; its name and an underscore where this is empty."""
    architecture: ClassVar[str]
    """Name of its networks in published configs."""
    with_convolutions: ClassVar[str] = ""
    """The same where layers have convolutions; empty where it does not differ."""
    selector: ClassVar[type[Selector]]
    older_names: ClassVar[dict[str, str]] = {}
    """Names of parts of its network that files may have, and those that are written."""

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "SelectorSizes":
        """Return the sizes that options of training ask for; by default there are none to choose.

        Args:
            config: the options.
            hidden_size: of the target.
        """
        return cls()

    def options(self, spec: Any) -> dict[str, Any]:
        """Return the options of `DrafterConfig` that ask for these sizes; the inverse of `chosen`."""
        return {"head": self.name}

    def check(self, spec: Any) -> None:
        """Refuse what does not go together with the rest of a `DrafterSpec`.

        Raises:
            ValueError: names the value.
        """
        for key in ("sample_from_anchor", "draft_vocab_size"):
            if getattr(spec, key):
                raise ValueError(
                    f"{key} is {getattr(spec, key)}, which dpace does not run with a head; serve this drafter with the "
                    "project that trained it"
                )

    def config_keys(self) -> dict[str, Any]:
        """Return what it adds to `dflash_config`."""
        sizes = {f"{self.name}_{key}": value for key, value in vars(self).items()}
        return {"projector_type": self.name, f"{self.name}_enabled": True, **sizes}

    def describe(self, spec: Any) -> str:
        """Say what it is, for the model card."""
        return self.name


def draw_draft(
    logits: Float[Tensor, "draft vocab"], text: Sequence[int], sampler: Any
) -> tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]:
    """Draw each slot's token from its logits; see `Selector.draw`.

    Processors see the text and the draft tokens that were drawn before a slot, as they do when the target verifies it.
    """
    if not sampler.processors:
        probs = sampler.probs(sampler.scores(logits, text))
        return torch.multinomial(probs, 1, generator=sampler.generator)[:, 0], probs
    drawn = []
    rows = []
    for slot in logits:
        probs = sampler.probs(sampler.scores(slot[None], [*text, *drawn]))
        drawn.append(int(torch.multinomial(probs, 1, generator=sampler.generator)))
        rows.append(probs)
    return torch.tensor(drawn, device=logits.device), torch.cat(rows)


def leading_matches(
    states: Float[Tensor, "batch block slot state"],
    judge: Callable[[Tensor, Tensor], Bool[Tensor, "way row"]],
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
) -> Bool[Tensor, "way batch block slot"]:
    """Find the slots of each block that greedy verification accepts: those before its first wrong draft.

    Blocks that are right so far go on with twice as many slots, so little more than tau rows of a block are judged, in
    few products.

    Args:
        states: of the slots.
        judge: says of states and labels, "row", which drafts are right, in one way or in several, of which the last is
            right wherever another one is. It gets `SCORED_ROWS` at most.
        labels: the target's tokens.
        is_scored: slots that count.
    """
    found = []
    is_right = torch.ones_like(is_scored[..., 0])
    num_slots = labels.shape[-1]
    start = 1
    while start < num_slots and (not found or is_right.any()):
        at = slice(start, 2 * start)
        is_tried = is_right[..., None] & is_scored[..., at]
        parts = zip(*(x[..., at, :][is_tried].split(SCORED_ROWS) for x in (states, labels[..., None])), strict=True)
        judged = torch.cat([judge(rows, own[:, 0]) for rows, own in parts], dim=-1)
        is_match = judged.new_zeros(len(judged), *is_tried.shape)
        is_match[:, is_tried] = judged
        found.append(is_match)
        is_right = is_match[-1].all(-1)
        start *= 2
    is_accepted = torch.cat(found, dim=-1).int().cumprod(-1).bool()
    return nn.functional.pad(is_accepted, (1, num_slots - 1 - is_accepted.shape[-1]))
