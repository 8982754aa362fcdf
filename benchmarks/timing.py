"""How calls are timed: single calls after a warm-up, and memory given back between cases."""

import gc
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

MIB = 1 << 20
# A GPU lowers its clock after tens of milliseconds of GEMMs at full power: what is measured first,
# the floor, would look faster than the rest.
WARM_UP_MS, MIN_REPEATS, MAX_REPEATS = 400, 10, 100
MAX_REP_FACTOR = 15  # slow cases end after this many times --rep-ms, with 3 calls at least


def now() -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(step: Callable[[], Any], device: str, rep_ms: float) -> list[float]:
    """Median, 20 % and 80 % quantile of single calls, one after the other."""

    def timed(count: int) -> list[float]:
        if device != "cuda":
            marks = [time.perf_counter()]
            for _ in range(count):
                step()
                marks.append(time.perf_counter())
            return [1000 * (end - start) for start, end in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events)]

    estimate = max(timed(2)[1], 1e-3)
    timed(math.ceil((WARM_UP_MS if device == "cuda" else rep_ms) / estimate))
    repeats = min(max(MIN_REPEATS, int(rep_ms / estimate)), MAX_REPEATS)
    times = torch.tensor(timed(max(3, min(repeats, int(MAX_REP_FACTOR * rep_ms / estimate)))))
    return times.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def release(device: str = "cuda") -> None:
    """Give the next case all memory, and count its peak from here on; an error that sticks to the
    device ends the run.
    """
    gc.collect()
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
