"""Hidden states of a running vLLM, read through the public package `hs-connectors`.

vLLM writes each text's hidden states to a file (its speculative method `extract_hidden_states`), and this process reads
and removes it. Both must see the same folder.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dpace.data.dataset import FEATURE_BATCH
from dpace.servers.transport import Address
from dpace.target import Target

MOST_APART = 0.2
"""Largest error of a layer's hidden states that is taken for rounding, as a share of their norm."""


class ServerFeatures:
    """Asks servers for hidden states, several texts at a time.

    Args:
        urls: of vLLM servers.
        target: whose hidden states they are.
        target_layer_ids: 0-based layers whose outputs are wanted. vLLM counts the embedding as 0, so its ids are one
            more.

    Raises:
        ValueError: the package is missing, or an address is none.
    """

    def __init__(self, urls: Sequence[str], target: Target, target_layer_ids: Sequence[int]):
        try:
            from hs_connectors import FP8Transfer
        except ImportError as error:
            raise ValueError(
                "--train.feature-servers needs the package hs-connectors; install it with "
                "`pip install 'dpace[hidden-states]'`"
            ) from error
        self.addresses, self.target, self.layer_ids = [Address(url) for url in urls], target, list(target_layer_ids)
        self.transfer = FP8Transfer(Path(), target.head.weight.dtype)
        self.models = [self._find_model(address) for address in self.addresses]

    def __call__(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Give the hidden states of texts, each "seq feature", as `Target.features` does.

        Raises:
            ValueError: what a server sends, or writes, is not that.
        """
        with ThreadPoolExecutor(FEATURE_BATCH) as pool:
            return list(pool.map(self._ask, range(len(texts)), texts))

    def check(self, text: Tensor) -> None:
        """Compare the hidden states of one text with the target's own.

        Raises:
            ValueError: they are of another model or of other layers.
        """
        pairs = [self([text])[0], self.target.features(text[None].to(self.target.device), self.layer_ids)[0].cpu()]
        found, expected = (rows.float().unflatten(-1, (len(self.layer_ids), -1)) for rows in pairs)
        apart = (found - expected).flatten(2).norm(dim=(0, 2)) / expected.flatten(2).norm(dim=(0, 2))
        for layer, error in zip(self.layer_ids, apart.tolist(), strict=True):
            if not error <= MOST_APART:
                raise ValueError(
                    f"{self.addresses[0].url} gives other hidden states for layer {layer} than --target ({error:.0%} "
                    f"apart); serve that model with eagle_aux_hidden_state_layer_ids {[i + 1 for i in self.layer_ids]}"
                )

    def _find_model(self, address: Address) -> str:
        page = address.get("/v1/models")
        try:
            return str(json.loads(page)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{address.url}/v1/models answers {address.words(page)}, expected a list of models; is it vLLM?"
            ) from error

    def _ask(self, number: int, text: Tensor) -> Tensor:
        place = number % len(self.addresses)
        address, token_ids = self.addresses[place], text.tolist()
        body = {"model": self.models[place], "prompt": token_ids, "max_tokens": 1, "temperature": 0.0}
        reply = address.post("/v1/completions", body | {"return_token_ids": True}, 1 + len(token_ids))
        params: Any = reply.get("kv_transfer_params")
        path = params.get("hidden_states_path") if isinstance(params, dict) else None
        if not isinstance(path, str) or not path.endswith(".safetensors"):
            raise ValueError(
                f"{address.url} names no file of hidden states; start vLLM with the speculative method "
                "extract_hidden_states and ExampleHiddenStatesConnector"
            )
        try:
            sample = self.transfer.get_generated(params)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{address.words(path)} of {address.url} cannot be read ({error}); see its log") from error
        if sample is None:
            raise ValueError(f"{address.words(path)} of {address.url} is not seen here; let both share that folder")
        rows = self._check(address, sample, token_ids)
        self.transfer.delete(path)  # which holds these tokens' hidden states, so it is no other file
        return rows

    def _check(self, address: Address, sample: dict[str, Tensor], token_ids: list[int]) -> Tensor:
        """Refuse what are not the hidden states of this text."""
        hidden, found = sample.get("hidden_states"), sample.get("token_ids")
        expected = (len(token_ids), len(self.layer_ids), self.target.hidden_size)
        if hidden is None or tuple(hidden.shape) != expected:
            raise ValueError(
                f"{address.url} wrote hidden states of the shape {None if hidden is None else tuple(hidden.shape)}, "
                f"expected {expected}: tokens, layers, width; serve the target with "
                f"eagle_aux_hidden_state_layer_ids {[i + 1 for i in self.layer_ids]}, and with "
                "--no-enable-prefix-caching and --no-enable-chunked-prefill"
            )
        if found is None or found.tolist() != token_ids:
            raise ValueError(f"{address.url} wrote the hidden states of another text; give it a folder of its own")
        if not bool(torch.isfinite(hidden.float()).all()):
            raise ValueError(f"{address.url} wrote hidden states that are not finite; see its log")
        return hidden.flatten(1).to(self.target.head.weight.dtype)
