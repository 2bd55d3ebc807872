"""Tell the processes of one command apart, as `torchrun` starts them, and let them talk.

A rank's number is what the launcher says, so asking for it starts nothing. All functions also work in a single process,
and then import and start nothing.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for the others; torchrun ends all of them where one fails."""


def num_ranks() -> int:
    """Count the processes of this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if num_ranks() > 1 else 0


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def share(items: Sequence[T]) -> list[T]:
    """Return this rank's part of some work: every n-th item, so that sorted items are shared evenly."""
    return list(items[rank() :: num_ranks()])


def num_short(items: Sequence[object]) -> int:
    """Count how many items fewer this rank's part has than the first one's, where all have to keep step."""
    longest = -(-len(items) // num_ranks())  # rounded up, as the first rank's part is
    return longest - len(share(items))


def barrier() -> None:
    """Wait until all ranks are here."""
    if num_ranks() > 1:
        _join().barrier()


def gather(value: T) -> list[T]:
    """Return the values of all ranks to each of them, in their order; they are pickled."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    _join().all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Do work on rank 0 only, and return its result on all ranks; it is pickled.

    Raises:
        ValueError: on all ranks, where the work raises it.
        OSError: likewise.
    """
    if num_ranks() == 1:
        return work()
    value: Any = None
    error = None
    if is_first():
        try:
            value = work()
        except OSError as raised:
            error = raised
        except ValueError as raised:  # subclasses may hold what cannot be pickled
            error = ValueError(str(raised))
    # The other ranks wait here, and would wait for ever if the first one raised before.
    value, error = gather((value, error))[0]
    if error is not None:
        raise error
    return value


def is_spread(tensor: object) -> bool:
    """Return whether the parts of a tensor lie on several ranks."""
    from torch.distributed.tensor import DTensor  # torch alone takes seconds; `dpace.cli` imports this file

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Any:
    """Return the part of a tensor that lies on this rank."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Any) -> Any:
    """Gather a tensor that is spread over the ranks, which must all be here; others are returned as they are."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def end() -> bool:
    """Leave the group of ranks, and return whether this rank is the first one.

    A group that outlives Python's end aborts now and then.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    return is_first()


def _join() -> ModuleType:
    """Join the group of ranks, with the backend that accelerate chooses for this machine; return `torch.distributed`.

    Accelerate's own collectives are not used: on a machine without GPUs, its state takes several processes for one.
    """
    from accelerate import PartialState
    from torch import distributed

    if not distributed.is_initialized():
        PartialState(timeout=PATIENCE)
    return distributed
