"""The most memory that tensors take at once, as torch's allocator tells its profiler."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


ATTEMPTS = 3
"""Calls of a function, since on a busy machine the profiler sometimes records no memory at all."""


def peak_bytes(function: Callable[[], object]) -> int:
    """Call a function, which may be called again, and return the most that it held at once beyond what was there."""
    for _ in range(ATTEMPTS):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        if events:
            break
    else:
        raise RuntimeError(f"torch's profiler recorded no memory in {ATTEMPTS} calls")
    live, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
