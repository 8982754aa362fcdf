"""Two versions of gold_kernels side by side in one process: the same bits, the same time?

    git worktree add /tmp/before COMMIT
    python benchmarks/compare_versions.py /tmp/before

The other version is imported under another name, from a copy in which its own name is replaced, so
that both run on the same GPU at the same moment: their calls are timed in turn, A B A B. A case is
a loss, a head (trainable or frozen) and a number of rows. The row says both medians, their ratio,
and whether loss and gradients are equal bit for bit.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jsd_pairs import Case
from record import RESULTS, RowLog, environment, say
from torch import Tensor
from uld_pairs import HYBRID, Shape, random_case, random_overlap

import gold_kernels

OTHER = "gold_kernels_before"
JSD_SIZES, ULD_SIZES = (151936, 151936, 2048, 4096), (65536, 151936, 2048, 4096)
FIELDS = [
    *("loss", "head", "N", "V_s", "V_t", "D_s", "D_t", "dtype", "is_equal"),
    *("before_ms", "after_ms", "ratio", "before_sha", "device", "torch", "triton", "git_sha"),
]
Call = Callable[[], list[Tensor]]


def import_other(checkout: Path) -> ModuleType:
    """gold_kernels of another checkout, as the module gold_kernels_before."""
    folder = Path(tempfile.mkdtemp(prefix="compare-versions-"))
    shutil.copytree(checkout / "gold_kernels", folder / OTHER)
    for path in (folder / OTHER).rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("gold_kernels", OTHER)
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(OTHER)


def make_call(module: ModuleType, loss: str, case: Case, overlap: tuple[Any, ...]) -> Call:
    """Loss and gradients of one version."""
    function = module.fused_linear_jsd if loss == "jsd" else module.fused_linear_uld
    options: dict[str, Any] = {}
    if loss == "hybrid":
        options = {**HYBRID, "overlap": module.VocabOverlap(*overlap)}

    def call() -> list[Tensor]:
        value = function(*case, **options)
        return [value, *torch.autograd.grad(value, case.leaves())]

    return call


def times_in_turn(calls: list[Call], device: str, repeats: int) -> list[float]:
    """Median milliseconds of each; queued in turn without waiting, as a training loop does."""
    marks: list[Any] = []

    def mark() -> None:
        if device == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    for _ in range(repeats + repeats // 4):
        for call in calls:
            call()
            mark()
    if device == "cuda":
        torch.cuda.synchronize()
        spans = [start.elapsed_time(end) for start, end in pairwise(marks)]
    else:
        spans = [1000 * (end - start) for start, end in pairwise(marks)]
    warm = spans[len(calls) * (repeats // 4) :]
    return [
        float(torch.tensor(warm[position :: len(calls)]).median()) for position in range(len(calls))
    ]


def compare(
    other: ModuleType, loss: str, head: str, sizes: tuple[int, ...], device: str, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(0)
    shape = Shape(*sizes)
    case = random_case(shape, generator)
    case.student_weight.requires_grad_(head == "trainable")
    overlap = tuple(random_overlap(shape, generator)) if loss == "hybrid" else ()
    calls = [make_call(module, loss, case, overlap) for module in (other, gold_kernels)]
    before, after = (call() for call in calls)
    is_equal = all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    del before, after
    milliseconds = times_in_turn(calls, device, repeats)
    names = ("N", "V_s", "V_t", "D_s", "D_t")
    return {
        **{"loss": loss, "head": head, "dtype": "bfloat16", "is_equal": is_equal},
        **dict(zip(names, sizes, strict=True)),
        **{"before_ms": f"{milliseconds[0]:.4g}", "after_ms": f"{milliseconds[1]:.4g}"},
        "ratio": f"{milliseconds[1] / milliseconds[0]:.4f}",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder that holds the other gold_kernels/")
    parser.add_argument("--before-sha", default="", help="commit of that checkout, for the CSV")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare_versions.csv")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for any machine")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    other = import_other(options.checkout)
    log = RowLog(options.out, FIELDS)
    where = {key: value for key, value in environment().items() if key in FIELDS}
    for loss in ("jsd", "uld", "hybrid"):
        sizes = JSD_SIZES if loss == "jsd" else ULD_SIZES
        for head in ("trainable", "frozen"):
            for num_rows in (512, 4096):
                shape = (num_rows, *sizes)
                if options.tiny:
                    shape = (num_rows // 128, sizes[0] // 256, sizes[1] // 256, 16, 24)
                row = compare(other, loss, head, shape, device, options.repeats)
                row |= {"before_sha": options.before_sha, **where}
                log.add(row)
                say(" ".join(f"{key}={row[key]}" for key in FIELDS[:12]))
    return 0 if all(row["is_equal"] for row in log.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
