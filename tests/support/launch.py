"""Run a function on several ranks of one machine, as `torchrun` does, in processes that a server forks.

The server imports torch and dpace once; a process started by `torchrun` does so each time.
"""

import faulthandler
import gc
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable

import torch.distributed as dist
import torch.multiprocessing

SECONDS = 300
"""After which a rank is taken to hang."""
multiprocessing.set_forkserver_preload(["tests.support.ranks"])


def on_ranks(num_ranks: int, function: Callable[..., None], *args) -> None:
    """Call a function of a module on each rank; an error on one of them is raised here, with its traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (num_ranks, port, function, args)
    torch.multiprocessing.start_processes(_run, options, nprocs=num_ranks, start_method="forkserver")


def _run(rank: int, num_ranks: int, port: int, function: Callable[..., None], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    function(*args)
    gc.collect()  # what still holds process groups: one that outlives Python's end aborts now and then
    dist.destroy_process_group()
