"""Checks of a drafter's weights: names, shapes and values."""

import math

import torch
from torch import Tensor

from dpace.engines.config_checks import FIX_COPY_AGAIN
from dpace.engines.folder import published_name
from dpace.engines.subject import Check, Observation, Subject, none_of, some
from dpace.engines.tensors import SELECTOR_TENSORS

SHARED = {"embed_tokens.weight": "the embedding", "lm_head.weight": "the LM head"}
MAX_MATRIX_RMS = 1.0
"""Highest root mean square of a matrix's entries; 0.02 when training starts, and little more after a short one."""
MAX_NORM_RMS = 1000.0
"""Highest root mean square of a norm's weights, which start near 1 and may grow much."""


def _shared(subject: Subject) -> dict[str, Tensor]:
    """Give the stored tensors that engines share with the target."""
    return {name: tensor for name, tensor in subject.tensors.items() if name in SHARED}


def _own_embedding(subject: Subject) -> Observation | None:
    embedding = subject.target.model.get_input_embeddings().weight
    tables = {"embed_tokens.weight": embedding, "lm_head.weight": subject.target.head.weight}
    differing = [
        f"{SHARED[name]} differs"
        for name, stored in _shared(subject).items()
        if (table := tables[name]).shape != stored.shape or not torch.allclose(table.to(stored), stored, rtol=1e-2)
    ]
    if not _shared(subject):
        return None
    return Observation(not differing, some(differing) or "equal", "equal to the target's, or not stored")


def _stored_embedding(subject: Subject) -> Observation:
    return none_of([SHARED[name] for name in _shared(subject)])


def _dtype(subject: Subject) -> Observation | None:
    if not subject.config:
        return None
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in subject.tensors.values()})
    written = subject.config.get("dtype", subject.config.get("torch_dtype"))
    observed = f"{' and '.join(stored)}, in the config {written}"
    return Observation(stored == [written], observed, "one dtype, the same in the config")


def _names(subject: Subject) -> Observation:
    return none_of(sorted(name for name in subject.stored if name != published_name(name)))


def _missing(subject: Subject) -> Observation:
    return none_of(sorted(set(subject.axes) - set(subject.tensors)))


def _extra(subject: Subject) -> Observation:
    return none_of(sorted(set(subject.tensors) - set(subject.axes) - set(SHARED)))


def _tensor_shapes(subject: Subject) -> Observation:
    config = subject.config
    head = subject.size("head") or config.get("head_dim", 0)
    by_config = {
        "hidden": subject.target.hidden_size,
        "query": config.get("num_attention_heads", 0) * head,
        "key": config.get("num_key_value_heads", 0) * head,
        "head": head,
        "inner": config.get("intermediate_size", 0),
    }
    kernel, group = (subject.nested.get(key) or 0 for key in ("conv_kernel_size", "conv_group_size"))
    by_config |= {"vocab": len(subject.target.head.weight), "rank": 1, "side": 2, "tap": kernel}
    by_config["kernel"] = 2 * kernel * (by_config["hidden"] // max(1, group))
    by_config["feature"] = len(subject.value("target_layer_ids") or ()) * by_config["hidden"]
    expected = {axis: subject.size(axis) or length for axis, length in by_config.items()}
    wrong = [
        f"{name} {list(subject.tensors[name].shape)}, not {[expected[axis] for axis in axes]}"
        for name, axes in subject.axes.items()
        if name in subject.tensors and list(subject.tensors[name].shape) != [expected[axis] for axis in axes]
    ]
    return none_of(wrong)


def _finite(subject: Subject) -> Observation:
    return none_of([name for name, tensor in subject.tensors.items() if not tensor.isfinite().all()])


def _zero(subject: Subject) -> Observation:
    zero = [name for name, tensor in subject.tensors.items() if not tensor.any()]
    return none_of([name for name in zero if name not in SELECTOR_TENSORS])


def _exploded(subject: Subject) -> Observation:
    limits = {1: MAX_NORM_RMS, 2: MAX_MATRIX_RMS}
    sizes = {name: float(t.float().square().mean().sqrt()) for name, t in subject.tensors.items() if name not in SHARED}
    return none_of([f"{n} {x:.3g}" for n, x in sizes.items() if limits.get(subject.tensors[n].dim(), x) < x < math.inf])


WEIGHT_CHECKS = (
    Check("dtype", "warns", _dtype, "write the dtype of the tensors in the config"),
    Check(
        "tensor names",
        "fails",
        _names,
        "rename the tensors with `dpace import`: most engines know only the published names",
    ),
    Check("missing tensors", "fails", _missing, FIX_COPY_AGAIN),
    Check(
        "extra tensors",
        "fails",
        _extra,
        "remove these tensors: dpace and some engines refuse those that they do not know",
    ),
    Check(
        "own embedding",
        "fails",
        _own_embedding,
        "remove this tensor: an engine that reads it drafts with the wrong table",
    ),
    Check("stored embedding", "warns", _stored_embedding, "remove this tensor: engines use the target's"),
    Check(
        "tensor shapes",
        "fails",
        _tensor_shapes,
        "copy or export again: tensors are swapped, transposed or from another drafter",
    ),
    Check("finite", "fails", _finite, "take an earlier checkpoint; train with a lower learning rate"),
    Check("zero tensors", "fails", _zero, FIX_COPY_AGAIN),
    Check("exploded tensors", "warns", _exploded, "take an earlier checkpoint; train with a lower learning rate"),
)
