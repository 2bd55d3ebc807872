"""The draft vocabulary: the tokens that a drafter proposes on a CPU, a part of the target's.

A draft passes through the target's head, which on a CPU takes as long as reading its rows. For a draft only the rows of
some tokens are read: tokens of the training texts and of the prompt. The target verifies with all of its tokens, so the
text is the same; a token outside is never drafted.

The tokens stand in `draft_vocabulary.json` beside the weights: engines that do not know it load the drafter unchanged.

Source: FR-Spec (arXiv 2502.14856), which takes the most frequent tokens.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from dpace.config import CountOrZero, Positive, options
from dpace.fast.packing import FastForm, Product, pack, weights_state
from dpace.system.ledger import read_object, write_json
from dpace.system.validation import read_as
from dpace.target import Target
from dpace.target.draft_rows import DraftRows

VOCABULARY_FILE = "draft_vocabulary.json"
FIX = "copy it again, or remove the file"
"""The way out of a file that is damaged."""
MIN_SAVING = 0.03
"""Least share of the target's weights that a draft vocabulary has to save."""
MAX_TAU_LOSS = 0.01
"""Largest relative loss of tau on the validation responses with which it is written; it is less than what is saved."""


class DraftVocabulary:
    """The tokens that may be drafted, with a copy of the head's rows for them.

    Memory: the copy, from the first draft on, in 16 bits where no value changes.

    Args:
        token_ids: any order, at least one.
        confidence_temperature: as `Drafter.confidence_temperature`, for logits of these tokens alone.
        head: the drafter's own LM head, with a row for each token in the order given; by default the target's rows.
    """

    def __init__(self, token_ids: Iterable[int], confidence_temperature: float = 1.0, head: nn.Linear | None = None):
        self.token_ids = torch.tensor([*token_ids])
        if head is None:
            self.token_ids = self.token_ids.unique()  # of an own head the order of the rows counts
        self.confidence_temperature = confidence_temperature
        self.head = head
        self._fast: Any = None

    def product(self, target: Target) -> Product:
        """Return the product of rows with the head's rows of these tokens, made again when the head has changed."""
        if self.head is not None:
            return self.head
        head = target.model.get_output_embeddings()
        if self._fast is None or self._fast.state != weights_state(head.parameters()):
            weight = target.head.weight.detach()[self.token_ids.to(target.device)].contiguous()
            self._fast = FastForm(head, pack(weight) or (lambda rows: rows @ weight.T))
        return self._fast.product

    def pays(self, target: Target) -> bool:
        """Return whether a draft reads fewer rows of the head, by at least `MIN_SAVING` of the weights, on a CPU."""
        rows, width = target.head.weight.shape
        saved = (rows - len(self.token_ids)) * width
        return target.device.type == "cpu" and saved >= MIN_SAVING * target.model.num_parameters()

    def save(self, folder: str | Path) -> None:
        """Write `draft_vocabulary.json`."""
        values = {"confidence_temperature": self.confidence_temperature, "token_ids": self.token_ids.tolist()}
        write_json(Path(folder) / VOCABULARY_FILE, values)


def load_vocabulary(folder: str | Path, num_tokens: int) -> DraftVocabulary | None:
    """Read the draft vocabulary of a drafter's folder; None where the folder has none.

    Raises:
        ValueError: the file does not have token ids from 0 to `num_tokens - 1` and a temperature above 0.
    """
    path = Path(folder) / VOCABULARY_FILE
    if not path.exists():
        return None
    return DraftVocabulary(**vars(read_tokens(path, num_tokens)))


@options
class TokenFile:
    """A file of tokens: the draft vocabulary, or answers of the training."""

    token_ids: Annotated[list[CountOrZero], Field(min_length=1)]
    confidence_temperature: Positive = 1.0


def read_tokens(path: Path, num_tokens: int) -> TokenFile:
    """Read a JSON file with a list of `token_ids`.

    Raises:
        ValueError: it has no list of one or more token ids from 0 to `num_tokens - 1`, or no temperature above 0.
    """
    values = read_as(TokenFile, read_object(path, FIX), path, FIX)
    if max(values.token_ids) >= num_tokens:
        raise ValueError(f"{path} has the token {max(values.token_ids)}, expected 0 .. {num_tokens - 1}; {FIX}")
    return values


def drafted_tokens(d2t: Tensor, num_tokens: int) -> Int[Tensor, " choice"]:
    """Return the token of each row of a drafter's own head, from the offsets that speculators and vLLM store.

    Raises:
        ValueError: a token twice, or outside the target's.
    """
    token_ids = d2t.long().cpu() + torch.arange(len(d2t))
    is_inside = bool(((token_ids >= 0) & (token_ids < num_tokens)).all())
    if d2t.is_floating_point() or not is_inside or len(token_ids.unique()) < len(token_ids):
        raise ValueError(
            f"d2t does not have an offset from each row to a token of its own in 0 .. {num_tokens - 1}; copy the "
            "drafter again"
        )
    return token_ids


class PackedRows(DraftRows):
    """The rows that decoding reads: of all tokens, or of the draft vocabulary and a prompt's tokens."""

    def __init__(self, target: Target, vocabulary: DraftVocabulary | None, prompt: Iterable[int] = ()):
        super().__init__(target)
        if vocabulary is not None:
            more_tokens = set()
            if vocabulary.head is None:  # an own head has no other rows
                more_tokens = set(prompt).difference(vocabulary.token_ids.tolist())
            more_ids = torch.tensor(sorted(more_tokens), dtype=torch.long)
            self.token_ids = torch.cat([vocabulary.token_ids, more_ids]).to(target.device)
            self._product = vocabulary.product(target)
            self._more_rows = target.head.weight[more_ids.to(target.device)]

    def logits(self, hidden: Float[Tensor, "row hidden"]) -> Float[Tensor, "row choice"]:
        """Compute the logits with packed copies of the rows."""
        if self.token_ids is None:
            return super().logits(hidden)
        rows = hidden.to(self._more_rows.dtype)
        # The prompt's rows are few, and change with each prompt: not worth packing.
        return self.head.finish(torch.cat([self._product(rows), rows @ self._more_rows.T], dim=-1))
