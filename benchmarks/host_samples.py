"""Where the host is in a stretch of time: the frames of all threads, a thousand times a second.

A function that waits for the device, or runs in C++, is the line of Python that called it. What a
profiler of calls would add to each of them is left out.
"""

import sys
import threading
import time
from collections import Counter
from types import FrameType

from record import say

SECONDS = 1e-3
PACKAGES = "site-packages/"


def place_of(frame: FrameType, *, has_line: bool = True) -> str:
    name = frame.f_code.co_filename.rpartition(PACKAGES)[2]
    line = f":{frame.f_lineno}" if has_line else ""
    return f"{name[-60:]}{line} {frame.f_code.co_name}"


class HostSamples:
    """Between start and stop, or within its context: samples by innermost line, and by function
    anywhere below.
    """

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self.functions: Counter[str] = Counter()
        self.count = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(SECONDS / 4)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()
        sys.setswitchinterval(self._before)

    def __enter__(self) -> "HostSamples":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        own = threading.get_ident()
        while not self._is_over.is_set():
            for thread, frame in sys._current_frames().items():
                if thread != own and not _is_idle(frame):
                    self._add(frame)
            self.count += 1
            time.sleep(SECONDS)

    def _add(self, frame: FrameType) -> None:
        self.lines[place_of(frame)] += 1
        seen = set()
        below: FrameType | None = frame
        while below is not None:
            seen.add(place_of(below, has_line=False))
            below = below.f_back
        self.functions.update(seen)

    def describe(self, seconds: float) -> None:
        say(f"  host: {self.count} samples in {seconds:.3f} s")
        for kind, counts, most in (("line", self.lines, 45), ("below", self.functions, 90)):
            for place, count in counts.most_common(most):
                share = seconds * count / max(1, self.count)
                say(f"    {kind} {share * 1e3:8.1f} ms {place}")


def _is_idle(frame: FrameType) -> bool:
    """A thread that waits for others: of a pool, of a progress bar, of a queue."""
    return frame.f_code.co_filename.endswith(("thread.py", "threading.py", "queue.py"))
