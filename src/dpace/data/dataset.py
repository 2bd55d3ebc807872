"""Make batches of conversations with the blocks of an epoch.

The target's features are kept with them where they fit in memory.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpace.blocks import build_blocks, sample_anchors
from dpace.data.responses import Response
from dpace.progress import progress_bar
from dpace.target import Target

FEATURE_BATCH = 16
"""Number of conversations whose features are computed together, where all are kept."""


class ResponseDataset(torch.utils.data.Dataset):
    """Conversations with their anchors, drawn anew each epoch from `(seed, epoch, id)`.

    Memory: token ids, and the features where they are kept (tokens x feature x bytes of the target's dtype).
    """

    def __init__(self, responses: Sequence[Response], *, max_length: int, num_anchors: int | None, seed: int):
        self.epoch, self.num_anchors, self.seed = 0, num_anchors, seed
        self.features: list[Tensor] | None = None
        self.rows = []
        for response in responses:
            is_response = torch.tensor(response.is_response[:max_length])
            if len(sample_anchors(is_response)):
                self.rows.append((response.id, torch.tensor(response.token_ids[:max_length]), is_response))
        self.num_skipped = len(responses) - len(self.rows)

    def with_seed(self, seed: int) -> "ResponseDataset":
        """Give the same conversations and features with other anchors."""
        other = copy.copy(self)
        other.seed, other.epoch = seed, 0
        return other

    @property
    def ids(self) -> list[str]:
        """Ids of the conversations."""
        return [response_id for response_id, _, _ in self.rows]

    @property
    def num_tokens(self) -> int:
        """Tokens of all conversations, prompts included."""
        return sum(len(token_ids) for _, token_ids, _ in self.rows)

    def keep_features(
        self, target: Target, target_layer_ids: Sequence[int], *, limit_bytes: float, with_head_input: bool = False
    ) -> bool:
        """Compute the features of every conversation once, and say whether they fit in memory.

        They are those of `Target.features`; nothing is computed where they pass the limit.
        """
        num_layers = len(target_layer_ids) + with_head_input
        size = self.num_tokens * num_layers * target.hidden_size * target.head.weight.element_size()
        if size > limit_bytes:
            return False
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i][1]))
        kept: dict[int, Tensor] = {}
        with progress_bar() as bar:
            task = bar.add_task("reading hidden states", total=len(self.rows), info="")
            for start in range(0, len(order), FEATURE_BATCH):
                batch = order[start : start + FEATURE_BATCH]
                token_ids = _pad([self.rows[i][1] for i in batch]).to(target.device)
                features = target.features(token_ids, target_layer_ids, with_head_input=with_head_input).cpu()
                kept |= {i: row[: len(self.rows[i][1])].clone() for i, row in zip(batch, features, strict=True)}
                bar.advance(task, len(batch))
        self.features = [kept[i] for i in range(len(self.rows))]
        return True

    def __len__(self):
        """Count the conversations."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give one conversation with its anchors of this epoch."""
        response_id, token_ids, is_response = self.rows[index]
        anchors = sample_anchors(is_response, num_anchors=self.num_anchors, seed=(self.seed, self.epoch, response_id))
        features = None if self.features is None else self.features[index]
        return {"token_ids": token_ids, "is_response": is_response, "anchors": anchors, "features": features}


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths, padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def collate(rows: Sequence[dict[str, Any]], block_size: int) -> dict[str, Any]:
    """Pad conversations on the right and cut their blocks."""
    token_ids = _pad([row["token_ids"] for row in rows])
    blocks = build_blocks(
        token_ids, _pad([row["is_response"] for row in rows]), [row["anchors"] for row in rows], block_size
    )
    features = None if rows[0]["features"] is None else _pad([row["features"] for row in rows])
    return {"token_ids": token_ids, "features": features, **vars(blocks)}
