"""What a device does in a stretch of time: kernels by kind and by name, and where it waits.

A kernel is (name, start, end) in microseconds. Only the device is recorded: what the host does is
recorded at a cost of its own, in which the device would wait.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from record import say

# The first that is found in a kernel's name; a fused one of inductor has names of aten in it.
KINDS = {
    "losses": r"jsd|uld|kl_rows",
    "compiled": r"^triton_",
    "attention": r"flash|sdpa|fmha|attn",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitk",
    "copies": r"^Mem(cpy|set)",
}
OTHERS = "others"


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    end: float


class Gap(NamedTuple):
    start: float  # microseconds since the first kernel began
    length: float
    before: str  # the kernel that had ended
    after: str


def kernels_of(profile: torch.profiler.profile) -> list[Kernel]:
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == on_device]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    return sorted((Kernel(*span) for span in spans), key=lambda kernel: kernel.start)


def kind_of(name: str) -> str:
    found = (kind for kind, part in KINDS.items() if re.search(part, name, re.IGNORECASE))
    return next(found, OTHERS)


def times_by(kernels: Sequence[Kernel], *, kind: bool) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of kernels of each kind, or of each name; longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kind_of(kernel.name) if kind else kernel.name].append(kernel.end - kernel.start)
    sums = {name: (sum(spans) / 1e3, len(spans)) for name, spans in times.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def gaps_of(kernels: Sequence[Kernel]) -> list[Gap]:
    """Between kernels in the order of their starts; those that run beside each other leave none."""
    gaps: list[Gap] = []
    if not kernels:
        return gaps
    last = kernels[0]
    for kernel in kernels[1:]:
        if kernel.start > last.end:
            since = last.end - kernels[0].start
            gaps.append(Gap(since, kernel.start - last.end, last.name, kernel.name))
        if kernel.end > last.end:
            last = kernel
    return gaps


def busy_seconds(kernels: Sequence[Kernel]) -> float:
    """Seconds in which at least one kernel runs."""
    if not kernels:
        return 0.0
    whole = max(kernel.end for kernel in kernels) - kernels[0].start
    return (whole - sum(gap.length for gap in gaps_of(kernels))) / 1e6


def idle_by_part(kernels: Sequence[Kernel], num_parts: int = 10) -> list[float]:
    """Milliseconds of gaps that begin in each part of the stretch."""
    whole = max(kernel.end for kernel in kernels) - kernels[0].start if kernels else 0.0
    parts = [0.0] * num_parts
    for gap in gaps_of(kernels):
        parts[min(num_parts - 1, int(gap.start / whole * num_parts))] += gap.length / 1e3
    return parts


def describe(kernels: Sequence[Kernel], seconds: float) -> None:
    """Print a profile of a step that took so many seconds."""
    busy, gaps = busy_seconds(kernels), gaps_of(kernels)
    say(
        f"  profiled: {seconds:.3f} s, {busy:.3f} s in {len(kernels)} kernels"
        f" ({busy / seconds:.0%})"
    )
    for name, (milliseconds, count) in times_by(kernels, kind=True).items():
        say(f"    kind {milliseconds:8.2f} ms {count:6d} x {name}")
    for name, (milliseconds, count) in list(times_by(kernels, kind=False).items())[:45]:
        say(f"    {milliseconds:8.2f} ms {count:6d} x {name[:130]}")
    others = [kernel for kernel in kernels if kind_of(kernel.name) in (OTHERS, "copies")]
    for name, (milliseconds, count) in list(times_by(others, kind=False).items())[:25]:
        say(f"    other {milliseconds:8.2f} ms {count:6d} x {name[:130]}")
    for limit in (10, 50, 1000):
        short = [gap.length for gap in gaps if gap.length < limit]
        say(f"    gaps under {limit} us: {len(short)}, {sum(short) / 1e3:.2f} ms")
    idle = [f"{milliseconds:.1f}" for milliseconds in idle_by_part(kernels)]
    say(f"    idle in each tenth, ms: {' '.join(idle)}")
    for gap in sorted(gaps, key=lambda gap: -gap.length)[:25]:
        say(
            f"    gap {gap.length / 1e3:7.2f} ms at {gap.start / 1e3:8.2f}"
            f" after {gap.before[:50]} before {gap.after[:50]}"
        )
