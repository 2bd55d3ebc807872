"""Keep the target's hidden states on disk, where epochs, ranks and later runs read them.

A folder has a subfolder for each target and choice of layers. Its safetensors files hold a row for each text,
named by the hash of its tokens: answers may be added, and a run that was killed goes on with what is missing.

This process computes the rows, or running vLLM servers do, through the public package `hs-connectors`: vLLM writes each
text's hidden states to a file (its speculative method `extract_hidden_states`), and this process reads and removes it.
Both must see the same folder.
"""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpace.batches.dataset import FEATURE_BATCH, ResponseDataset, bytes_of_token, compute_features
from dpace.config import TrainConfig
from dpace.servers.apis import connect
from dpace.system import ranks
from dpace.system.ledger import filling, lock_folder
from dpace.system.provenance import hash_json
from dpace.target import Target
from dpace.target.target import Features

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
        ValueError: the package is missing, or no server answers at an address.
    """

    def __init__(self, urls: Sequence[str], target: Target, target_layer_ids: Sequence[int]):
        try:
            from hs_connectors import FP8Transfer
        except ImportError as error:
            raise ValueError(
                "--train.feature-servers needs the package hs-connectors; install it with `pip install hs-connectors`"
            ) from error
        self.servers = [connect(url) for url in urls]
        self.target = target
        self.layer_ids = list(target_layer_ids)
        self.options = f"eagle_aux_hidden_state_layer_ids {[layer + 1 for layer in target_layer_ids]}"
        self.transfer = FP8Transfer(Path(), target.head.weight.dtype)

    def __call__(self, texts: Sequence[Tensor]) -> list[Features]:
        """Return the hidden states of each of several texts.

        Raises:
            ValueError: a server sends, or writes, something else.
        """
        with ThreadPoolExecutor(FEATURE_BATCH) as pool:
            return list(pool.map(self._ask, range(len(texts)), texts))

    def check(self, text: Tensor) -> None:
        """Compare the hidden states of one text with the target's own.

        Raises:
            ValueError: they are of another model or of other layers.
        """
        shape = (len(text), len(self.layer_ids), -1)
        served = self([text])[0].layers.float().view(shape)
        expected = compute_features(self.target, self.layer_ids, [text])[0].layers.float().view(shape)
        # One error for each layer.
        errors = (served - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))
        if not (errors <= MOST_APART).all():  # NaN is refused too
            percents = ", ".join(f"{error:.0%}" for error in errors.tolist())
            raise ValueError(
                f"{self.servers[0].url} gives other hidden states than --target (layers {self.layer_ids} are "
                f"{percents} apart); serve that model with {self.options}"
            )

    def _ask(self, number: int, text: Tensor) -> Features:
        """Let one of the servers compute the hidden states of a text, and refuse what are not these."""
        server = self.servers[number % len(self.servers)]
        token_ids = text.tolist()
        # One new token, greedily: vLLM keeps the hidden states of the prompt, and has to generate something.
        (reply,) = server.address.events(*server.request(token_ids, 1, 0.0, 0), len(token_ids))
        params: Any = reply.get("kv_transfer_params")
        path = params.get("hidden_states_path") if isinstance(params, dict) else None
        if not isinstance(path, str) or not path.endswith(".safetensors"):
            raise ValueError(
                f"{server.url} names no file of hidden states; start vLLM with the speculative method "
                "extract_hidden_states and ExampleHiddenStatesConnector"
            )
        try:
            sample = self.transfer.get_generated(params)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} of {server.url} cannot be read ({error}); see its log") from error
        if sample is None:
            raise ValueError(f"{path} of {server.url} is not seen here; let both share that folder")
        hidden = sample["hidden_states"]  # (token, layer, hidden)
        expected = (len(token_ids), len(self.layer_ids), self.target.hidden_size)
        if hidden.shape != expected or sample["token_ids"].tolist() != token_ids or not hidden.isfinite().all():
            raise ValueError(
                f"{server.url} wrote hidden states of the shape {tuple(hidden.shape)}, of another text or not finite, "
                f"expected {expected} for tokens, layers and width; serve the target with {self.options}, and with "
                "--no-enable-prefix-caching and --no-enable-chunked-prefill"
            )
        self.transfer.delete(path)  # which holds these tokens' hidden states, so it is no other file
        return Features(hidden.flatten(1).to(self.target.head.weight.dtype))


SHARD_BYTES = 256 * 2**20
"""Size at which a file is written and the next one begun."""
HEAD_INPUT = ".head_input"
"""What follows a row's name where it is the LM head's input; the features of the layers have the name alone."""


class FeatureFiles(Sequence[Features]):
    """Features that lie on disk, a row for each text.

    Memory: an index of O(texts); the files are mapped, so the system keeps in memory what fits.

    Raises:
        ValueError: a row is missing, or a file cannot be read.
    """

    def __init__(self, folder: Path, names: Sequence[str], lengths: Sequence[int], widths: dict[str, int]):
        self.names = list(names)
        self.lengths = lengths
        """Tokens of each text."""
        self.widths = widths
        """Numbers of a token in each tensor of a text, by what follows the text's name."""
        self.rows = _index_rows(folder)
        missing = [name for name in self.names if name not in self.rows]
        if missing:
            raise ValueError(
                f"{folder} lacks the hidden states of {len(missing)} of {len(self.names)} texts; let all ranks see the "
                "same folder, and run the same command again"
            )
        # Each file is opened once and stays so, for as long as this object lives.
        self.open = cache(lambda path: safe_open(path, framework="pt").__enter__())

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        """Read the features of a text."""
        shapes = {self.names[index] + end: (self.lengths[index], width) for end, width in self.widths.items()}
        return Features(*map(self._read, shapes, shapes.values()))

    def _read(self, tensor_name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor.

        Raises:
            ValueError: it has another shape, or numbers that are none.
        """
        path = self.rows[tensor_name]
        tensor = self.open(path).get_tensor(tensor_name)
        if tensor.shape != shape or not tensor.isfinite().all():
            raise ValueError(
                f"{path} has hidden states of shape {(*tensor.shape,)}, expected finite ones of shape {shape}; delete "
                "it, and the same command computes its rows again"
            )
        return tensor


def keep_on_disk(
    target: Target,
    dataset: ResponseDataset,
    layer_ids: Sequence[int],
    config: TrainConfig,
    *,
    with_head_input: bool = False,
) -> None:
    """Let a dataset read the features of `Target.read_features` from disk, and first compute what is missing there.

    Several targets and choices of layers may share a folder. Each rank computes its share. A killed process loses at
    most one file of 256 MiB a rank.

    Raises:
        ValueError: more bytes than are free, another process writes there, or a file is damaged.
    """
    assert config.feature_files, "a recipe without a folder keeps nothing on disk"
    servers = config.feature_servers
    # The hash of all that the features depend on names their folder; its form is kept, or files are not found again.
    of_target = [target.sha256, str(target.model.dtype)]
    made_by = "vllm" if servers else "dpace"
    facts = [of_target, list(layer_ids), HEAD_INPUT if with_head_input else False, made_by]
    folder = Path(config.feature_files) / hash_json(facts)[:16]
    names = []
    for number in range(len(dataset)):
        text = dataset.token_ids(number).numpy().tobytes()
        names.append(hashlib.sha256(text).hexdigest()[:32])
    missing_names = ranks.from_first(lambda: set(names) - _index_rows(folder).keys())
    if missing_names:  # others may write there while nothing is missing here
        with lock_folder(folder):
            # A text that several conversations have is computed once.
            numbers = list({name: number for number, name in enumerate(names) if name in missing_names}.values())
            token_bytes = bytes_of_token(target, len(layer_ids), with_head_input=with_head_input)
            size = token_bytes * int(dataset.lengths[numbers].sum())
            ranks.from_first(lambda: _refuse_size(size, folder))
            batches = dataset.batches_that_begin_alike(numbers)
            if servers:
                compute = ServerFeatures(servers, target, layer_ids)
                compute.check(dataset.token_ids(batches[0][0]))
            else:
                compute = partial(compute_features, target, layer_ids, with_head_input=with_head_input)
            computed = dataset.compute_rows(compute, ranks.share(batches), "keeping hidden states")
            _write_all(computed, folder, names)
            if not servers:
                # A target that is spread over the ranks needs all of them for each batch.
                for _ in range(ranks.num_short(batches)):
                    target.join_features(layer_ids, with_head_input=with_head_input)
            ranks.barrier()
    widths = {"": len(layer_ids) * target.hidden_size}
    if with_head_input:
        widths[HEAD_INPUT] = target.hidden_size
    features = FeatureFiles(folder, names, dataset.lengths.tolist(), widths)
    dataset.use_features(features, layer_ids, with_head_input)


def _index_rows(folder: Path) -> dict[str, Path]:
    """Find the file of each tensor."""
    rows: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                rows |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it, and the same command computes its rows again"
            ) from error
    return rows


def _refuse_size(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the hidden states need {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on the disk of "
            f"{folder}; make room, take fewer answers, or leave --train.feature-files out"
        )


def _write_all(computed: Iterable[tuple[int, Features]], folder: Path, names: Sequence[str]) -> None:
    """Write rows as they are computed, a file at a time."""
    waiting: dict[str, Tensor] = {}
    for number, features in computed:
        name = names[number]
        waiting[name] = features.layers.clone()  # a view would keep its padded batch
        if features.head_input is not None:
            waiting[name + HEAD_INPUT] = features.head_input.clone()
        if sum(tensor.nbytes for tensor in waiting.values()) >= SHARD_BYTES:
            _write_file(folder, waiting)
            waiting = {}
    if waiting:
        _write_file(folder, waiting)


def _write_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one file, named after the first."""
    name = f"{next(iter(tensors))}.safetensors"
    with filling(folder, last=name) as aside:
        save_file(tensors, aside / name)
