"""What a process of its own works on: one task after the other, with what it has kept of the last.

Torch is imported where a task begins: the process that hands tasks out does not wait for it.
"""

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from quality.scales import Scale, TextScale

MOST_STATUS = 200  # characters


@lru_cache(maxsize=1)
def bench_of(folder: Path, scale: Scale | TextScale) -> Any:
    import torch

    if isinstance(scale, TextScale):
        from quality.text_runs import TextBench as Bench
    else:
        from quality.runs import Bench
    is_cuda = torch.cuda.is_available()
    torch.set_num_threads(2 if is_cuda else 1)  # one pair's process beside the other's
    torch.set_float32_matmul_precision("high")  # of runs: TF32, where there is a GPU
    gc.collect()
    gc.freeze()  # every run ends with a collection, of a second where it looks at all imports
    return Bench(folder, scale, torch.device("cuda" if is_cuda else "cpu"))


def warm() -> None:
    """Imports, while pictures are drawn."""
    import quality.runs  # noqa: F401


def school_teacher(folder: Path, scale: Scale | TextScale) -> dict[str, Any]:
    return bench_of(folder, scale).school_teacher()


def school_student(folder: Path, scale: Scale | TextScale, family: str) -> dict[str, Any]:
    return bench_of(folder, scale).school_student(family)


def rehearse(folder: Path, scale: Scale | TextScale, pair: str) -> dict[str, Any]:
    with quiet():
        return bench_of(folder, scale).rehearse(pair)


def run(folder: Path, scale: Scale | TextScale, case: Any) -> dict[str, Any]:
    """The row; a run that fails is one too. is_lost: this process can do no other."""
    bench, is_lost = bench_of(folder, scale), False
    try:
        with quiet():
            numbers = bench.run(case)
    except Exception as error:
        traceback.print_exc()
        numbers = {"status": f"{type(error).__name__}: {error}"[:MOST_STATUS]}
        is_lost = not answers(bench.device)
    return {"status": "ok", **bench.of_every_row(), **numbers, "is_lost": is_lost}


def answers(device: Any) -> bool:
    """Whether the GPU still does: after an illegal access it refuses all that follows."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
