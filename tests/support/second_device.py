"""A second device in plain Python, which computes on the CPU and knows what was done on it.

Run in a process of its own (`python -m tests.support.second_device`): torch then takes it for the machine's
accelerator.
"""

import contextlib
import copy
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "abacus"
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
"""Operations whose result the host has to wait for, beside copies to the CPU."""
KERNELS = {nn.functional.scaled_dot_product_attention, nn.functional.rms_norm, torch.rms_norm}
"""Functions that a GPU computes in one kernel, and torch's own composition in many."""
SOURCE = str(Path(__file__).parents[2] / "src")


class OnDevice(torch.Tensor):
    """A tensor of the second device; its numbers are those of `raw`, on the CPU."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=f"{NAME}:0"
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self):
        return f"OnDevice({self.raw})"

    def tolist(self):
        """A copy to the host, as of any device."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Kernels(TorchFunctionMode):
    """Computes `KERNELS` in one operation where no gradient is needed.

    As on a GPU, attention first copies a mask of truth values, or one whose rows begin at odd addresses.
    """

    def __init__(self, operations: Counter):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in KERNELS or torch.is_grad_enabled() or not isinstance(args[0], OnDevice):
            return func(*args, **(kwargs or {}))
        self.operations[func.__name__] += 1
        mask = (kwargs or {}).get("attn_mask")
        if mask is not None:
            self.operations["copies of masks"] += mask.dtype == torch.bool or any(x % 8 for x in mask.stride()[:-1])
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Computes on the device inside the `with` block, counts operations, and finds tensors left behind.

    Attributes:
        operations: those that are no views, by name.
        waits: places of dpace at which the host waits for the device, by `file: line`.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()
        self.kernels = _Kernels(self.operations)

    def __enter__(self):
        self.kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.kernels.__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        place = kwargs.get("device")
        is_made_here = place is not None and torch.device(place).type == NAME
        if not ours and not is_made_here:
            return func(*args, **kwargs)
        name = func._schema.name
        is_copy = name in ("aten::_to_copy", "aten::copy_")
        behind = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
        assert not behind or is_copy, f"{name}: a tensor of shape {tuple(behind[0].shape)} was left on the CPU"
        is_read = place is not None and not is_made_here
        is_read |= name == "aten::copy_" and not isinstance(args[0], OnDevice)
        has_mask = name.startswith("aten::index") and any(
            x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
        )
        if name in WAITS or is_read or has_mask:
            self.waits[_place()] += 1
        if not func.is_view and name != "aten::_unsafe_view":
            self.operations[name.removeprefix("aten::")] += 1
        return compute(func, args, kwargs)


def compute(func, args, kwargs):
    """Run an operation on the raw tensors; views and results in place stay what they were on the device."""
    ours = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)}
    by_raw = {id(x.raw): x for x in ours.values()}
    goes_to = kwargs.get("device")
    stays = torch.device(goes_to).type == NAME if goes_to is not None else bool(ours)
    name = func._schema.name if hasattr(func, "_schema") else func.__name__
    if name == "aten::copy_":
        stays = isinstance(args[0], OnDevice)
    if goes_to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)

    def unwrap(x):
        return x.raw if isinstance(x, OnDevice) else x

    def wrap(x):
        return by_raw.get(id(x), OnDevice(x)) if isinstance(x, torch.Tensor) and stays else x

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name == "aten::copy_":
        return args[0]
    return tree_map(wrap, out)


def _place() -> str:
    """The innermost line of dpace that the host is at; the name of a library's file where dpace is not running."""
    frames = traceback.extract_stack()[:-2]
    inside = [f for f in frames if f.filename.startswith(SOURCE)]
    return f"{Path(inside[-1].filename).name}: {inside[-1].line}" if inside else Path(frames[-1].filename).name


class _Module(backend_registration._DummyBackendModule):
    """What torch asks a device's module for; random numbers are the CPU's."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def synchronize(self, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register() -> None:
    """Make it the accelerator of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch.accelerator.synchronize = lambda device=None: None
    # What torch itself asks for below the dispatch mode, as `torch.tensor(..., device=...)` does.
    kernels.impl(
        "empty_strided", lambda size, stride, dtype=None, **_: OnDevice(torch.empty_strided(size, stride, dtype=dtype))
    )
    kernels.impl("_copy_from", _copy_from)


def _copy_from(source, to, non_blocking=False):
    return compute(torch.ops.aten.copy_.default, (to, source), {})


kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")


def count_steps(device, run):
    """Steps, waits, and operations of a step by name; those of reading the prompts are left out."""
    counted = []
    for num_tokens in (1, 5):
        device.operations.clear(), device.waits.clear()
        generations = run(num_tokens=num_tokens, stop_token_ids=[])
        steps = max(len(g.accepted_lengths) for g in generations)
        counted.append(device.operations.copy())
    counted[1].subtract(counted[0])
    operations = {name: count / steps for name, count in counted[1].items() if count}
    return {"steps": steps, "waits": dict(device.waits), "operations": operations}


def load(model, dtype=None):
    """The same model as it is loaded on the device: in plain layers, then made faster."""
    from dpace.fast.packing import FastModule
    from dpace.fast.speed_up import speed_up

    kind, config = type(model), copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    loaded = kind(config).eval().requires_grad_(False)
    loaded.load_state_dict(model.state_dict())
    loaded = loaded.to(dtype or model.dtype).to(NAME)
    speed_up(loaded)
    assert any(isinstance(module, FastModule) for module in loaded.modules())
    return loaded


def main() -> None:
    """Decode, measure and train on both devices; print what is the same, and where the host waits."""
    register()
    torch.inference_mode = torch.no_grad  # which counts versions, as wrapped tensors need
    from accelerate import Accelerator

    import dpace.target.probe
    from dpace.batches.dataset import ResponseDataset
    from dpace.config import LossConfig, Recipe, TrainConfig
    from dpace.decode import Paces, generate, generate_batch, generate_plain
    from dpace.loss.objective import make_weigh
    from dpace.measure.heldout import heldout_acceptance
    from dpace.respond.responses import Response
    from dpace.target import Target
    from dpace.training.loop import TrainingLoop
    from dpace.training.run import choose_conversations
    from tests.support.models import make_drafter, make_target

    dpace.target.probe._refuse_quantized_tables = lambda *_: None  # takes a tensor of another class for a quantized one
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator()  # torch makes none for a device in Python
    alone = mock.Mock(  # accelerate knows no device in Python
        spec=Accelerator,
        num_processes=1,
        no_sync=contextlib.nullcontext,
        autocast=contextlib.nullcontext,
        prepare_model=lambda model, **_: model,
        reduce=lambda value, **_: value,
    )
    TrainingLoop._make_accelerator = lambda self: alone  # pyright: ignore[reportAttributeAccessIssue]
    prompts = [[*range(5, 10)], [9, 8, 7], [5, 9] * 3]
    texts = [[*range(5, 11)] * 2, [*range(30, 37)]]
    responses = [Response(str(i), "a", [], text, [[3, len(text)]]) for i, text in enumerate(texts)]
    device = SecondDevice()
    paces = Paces()

    def train(target, drafter):
        """A step of the training loop with an objective of one's own, in two micro-batches; all but its reading."""
        config = TrainConfig(num_anchors=4, batch_size=1, gradient_accumulation_steps=2, max_steps=1)
        recipe = Recipe(train=config, loss=LossConfig(objective="own:weigh"))
        datasets = choose_conversations(responses, [], recipe)
        weigh = make_weigh(recipe.loss, drafter.block_size, lambda slots: slots.token_probs + 0.5)
        loop = TrainingLoop(drafter, target, *datasets, recipe, weigh=weigh, checkpoints=Path())
        batches = next(loop.batches_of_steps())
        device.waits.clear()
        loop.take_step(batches)
        waits = device.waits.copy()
        sums = [round(float(parameter.detach().sum().cpu()), 3) for parameter in drafter.parameters()]
        device.waits = waits
        return sums

    def measure(target, drafter):
        data = ResponseDataset(responses, max_length=64, num_anchors=None, seed=0)
        return heldout_acceptance(drafter, target, data).rows.tolist()

    def decode(target, drafter, width, num_tokens=8, **options):
        return generate(target, drafter, prompts[0], width=width, paces=paces, max_new_tokens=num_tokens, **options)

    parts = {
        "plain": lambda t, d: generate_plain(t, prompts[0], max_new_tokens=8).token_ids,
        "full": lambda t, d: decode(t, d, "full").token_ids,
        "auto": lambda t, d: decode(t, d, "auto").token_ids,
        "batch": lambda t, d: [g.token_ids for g in generate_batch(t, d, prompts, max_new_tokens=8)],
        "measure": measure,
    }
    kind = {"selector": "lilicorr"} if "lilicorr" in sys.argv else {}
    target = make_target("qwen3")
    drafter = make_drafter(target, **kind)
    expected = {name: part(target, drafter) for name, part in parts.items()}
    expected["train"] = train(target, copy.deepcopy(drafter))
    with device:
        fast = Target(load(target.model)), load(drafter)
        is_same = {name: part(*fast) == expected[name] for name, part in parts.items()}
        is_same["train"] = train(fast[0], drafter.to(NAME)) == expected["train"]
        waits = dict(device.waits)
        steps = {
            "auto": count_steps(device, lambda **n: [decode(*fast, "auto", **n)]),
            "8 rows": count_steps(
                device, lambda num_tokens, **n: generate_batch(*fast, 4 * prompts[:2], max_new_tokens=num_tokens, **n)
            ),
        }
        deep = make_target("qwen3", num_hidden_layers=12, layer_types=12 * ["full_attention"])
        fast = Target(load(deep.model, torch.bfloat16)), load(make_drafter(deep), torch.bfloat16)
        steps["12 layers"] = count_steps(device, lambda **n: [decode(*fast, "full", **n)])
    print(json.dumps({"is_same": is_same, "waits": waits, "steps": steps}))


if __name__ == "__main__":
    main()
