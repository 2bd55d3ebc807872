"""A target that is spread over the ranks of a training, and runs on all of them together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpace.config import Device, DeviceMap, TargetShard
from dpace.system import ranks
from dpace.system.device import default_dtype, find_device
from dpace.system.provenance import weights_fingerprint
from dpace.target import Target
from dpace.target.files import gather_tables, open_target


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
        model, tokenizer = open_target(
            name, dtype=dtype or default_dtype(place), device=place, device_map=device_map, shard=shard
        )
        sha256 = weights_fingerprint(model)
        gather_tables(model)
        target = cls(model, tokenizer)
        target.thinking = thinking
        target._sha256 = sha256
        target._shard = shard
        is_tied = target.config.tie_word_embeddings
        target._table = target.head.weight if is_tied else ranks.whole(model.get_input_embeddings().weight)
        return target

    @property
    def sha256(self) -> str:
        """Fingerprint of its weights, the same as of the whole target."""
        return self._sha256

    def embed(self, token_ids: Tensor) -> Tensor:
        """Compute the input embeddings as the first layer sees them."""
        return nn.functional.embedding(token_ids, self._table) * self.embed_scale

    @torch.no_grad()
    def features(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> Tensor:
        """Compute the features of this rank's text, while the other ranks call this with theirs.

        A beginning that rows share is read once for each row.
        """
        self._refuse_rotation(token_ids)
        if self._shard == "fsdp":
            return self._run(token_ids, target_layer_ids, with_head_input=with_head_input)
        own = token_ids.tolist()
        features = token_ids
        texts = ranks.gather(own)
        for i, text in enumerate(texts):
            if text not in texts[:i]:
                all_ids = torch.tensor(text, device=self.device)
                computed = self._run(all_ids, target_layer_ids, with_head_input=with_head_input)
                features = computed if text == own else features
        return features

    def join_features(self, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> None:
        """Take part in a call of `features` for which this rank has no text."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.features(token, target_layer_ids, with_head_input=with_head_input)
