"""A target that is spread over the ranks of a training, and runs on all of them together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpace.config import Device, DeviceMap, TargetShard
from dpace.system import ranks
from dpace.system.device import default_dtype, find_device
from dpace.system.provenance import weights_fingerprint
from dpace.target import Target
from dpace.target.files import keep_tables, open_target


class ShardedTarget(Target):
    """A target for training, of which each rank has a share of the layers, and both tables.

    All ranks have to call its methods together, as often and in the same order. With `fsdp` each brings a text of its
    own; a layer's weights are gathered where it runs. With `tp` the ranks share the work on each text, and so all run
    the texts of all.

    Memory: the layers' weights over the number of ranks, the tables, and with `fsdp` one whole layer.
    """

    _sha256: str
    _shard: TargetShard
    _table: Tensor

    @classmethod
    def load_share(
        cls,
        name: str,
        shard: TargetShard,
        *,
        dtype: torch.dtype | None = None,
        device: Device = "auto",
        device_map: DeviceMap = None,
        thinking: bool = False,
    ) -> "ShardedTarget":
        """Load this rank's share of a model, for the same arguments as `Target.load`.

        Raises:
            ValueError: as there; or a model that transformers has no plan for.
        """
        place = find_device(device)
        options: Any = {"device": place, "device_map": device_map, "shard": shard}
        model, tokenizer = open_target(name, dtype=dtype or default_dtype(place), **options)
        sha256 = weights_fingerprint(model)
        keep_tables(model)
        target = cls(model, tokenizer)
        target.thinking, target._sha256, target._shard = thinking, sha256, shard
        is_tied = target.config.tie_word_embeddings
        target._table = target.head.weight if is_tied else ranks.whole(model.get_input_embeddings().weight)
        return target

    @property
    def sha256(self) -> str:
        """What tells its weights from others; the same as of the whole target."""
        return self._sha256

    def embed(self, token_ids: Tensor) -> Tensor:
        """Compute the input embeddings as the first layer sees them."""
        return nn.functional.embedding(token_ids, self._table) * self.embed_scale

    @torch.no_grad()
    def features(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> Tensor:
        """Compute the features of this rank's text, while the other ranks call this with theirs.

        A beginning that rows share is read once for each row.
        """
        options: Any = {"with_head_input": with_head_input, "cache": None}
        self._refuse_rotation(token_ids)
        if self._shard == "fsdp":
            return self._run(token_ids, target_layer_ids, **options)
        mine, features = token_ids.tolist(), None
        texts = ranks.gather(mine)
        for i, text in enumerate(texts):
            if text not in texts[:i]:
                found = self._run(torch.tensor(text, device=self.device), target_layer_ids, **options)
                features = found if text == mine else features
        assert features is not None
        return features

    def stand_by(self, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> None:
        """Take part in a call of `features` for which this rank has no text."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.features(token, target_layer_ids, with_head_input=with_head_input)
