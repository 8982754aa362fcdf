"""Fused linear ULD beside eager torch and the GEMM floor: time, peak memory and error.

    python benchmarks/bench_uld.py           # on a GPU; a row of CSV per case
    python benchmarks/bench_uld.py --tiny    # the same code on small shapes, on a CPU, no record

Loss and gradients of student_hidden and student_weight, bfloat16. N pairs of rows, vocabularies V_s
and V_t, hidden sizes D_s and D_t. eager_bf16 is softmax, sort and L1 in bfloat16, as TRL computes
it; hybrid is ours with 60 % of the smaller vocabulary matched, at random.

Each of ours is checked against the float64 oracle, whose subgradient is averaged over ties, before
it is timed (uld_pairs.py): the row kernel on its own logits (loss_error, grad_error, top64), and
the call that is timed on bfloat16 inputs (fused_*). peaked_ has five times the logits, near_ a
teacher that is the student with 1 % noise, where V_s = V_t. Where V_s differs from V_t the default
gets no time, and the run ends with 1, beyond MAX_LOSS_ERROR or MAX_GRAD_ERROR on the random or the
peaked pair; all other errors are reported.

Bytes of the row kernels with float32 logits: 12 (V_s + V_t) for log-sum-exps, counts and loss,
4 V_s for the gradient, and 2 V_s written; hybrid, 4 K each to gather, write and read partners.
Peak memory is above the inputs; peak_extra_mib also leaves out the returned gradients.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsd_pairs import Case
from peers import floor_step
from record import RESULTS, RowLog, environment, say
from timing import MIB, milliseconds, release
from torch import Tensor
from uld_pairs import (
    Errors,
    Pair,
    Shape,
    errors,
    loss_options,
    make_pairs,
    random_case,
    random_overlap,
)

from gold_kernels import VocabOverlap, fused_linear_uld, peak_extra_bytes

SHAPES = (
    "4096x65536x151936x2048x4096",
    "512x65536x151936x2048x4096",
    "1024x65536x151936x2048x4096",
    "2048x65536x151936x2048x4096",
    "8192x65536x151936x2048x4096",
    "512x151936x151936x2048x4096",
    "512x151936x262144x2048x2560",
)
TINY_SHAPES = ("24x300x500x16x24", "24x400x400x16x24")
OURS = ("gold_kernels", "gold_kernels_fast", "gold_kernels_hybrid")
IMPLEMENTATIONS = ("floor", *OURS, "eager_bf16", "eager_float32")
MAX_LOSS_ERROR, MAX_GRAD_ERROR = 1e-4, 2e-2
Pairs = dict[str, Pair]  # by the prefix of their columns
ERROR_FIELDS = [
    f"{pair}{name}{'' if name == 'top64' else '_error'}"
    for pair in ("", "peaked_", "near_")
    for name in Errors._fields
]
FIELDS = [
    *("implementation", "N", "V_s", "V_t", "D_s", "D_t", "dtype", "status"),
    *("median_ms", "p20_ms", "p80_ms", "times_floor", "peak_mib", "peak_extra_mib"),
    *ERROR_FIELDS,
    *("device", "torch", "triton", "transformers", "git_sha"),
]


def eager(case: Case, dtype: torch.dtype) -> Tensor:
    probs = [
        (hidden @ weight.T).to(dtype).softmax(-1).sort(-1, descending=True).values
        for hidden, weight in (case[:2], case[2:])
    ]
    size = max(side.shape[1] for side in probs)
    student, teacher = (torch.nn.functional.pad(side, (0, size - side.shape[1])) for side in probs)
    return (student - teacher).abs().sum(-1).mean()


def mode_of(name: str, overlap: VocabOverlap) -> tuple[torch.dtype | None, VocabOverlap | None]:
    """logits_dtype and overlap of one of ours."""
    logits_dtype = torch.bfloat16 if name == "gold_kernels_fast" else None
    return logits_dtype, overlap if name == "gold_kernels_hybrid" else None


def excess(name: str, shape: Shape, found: dict[str, Errors]) -> str:
    """Which error of found (by pair) exceeds its limit, empty if none does; NaN exceeds it."""
    if name != "gold_kernels" or shape.v_s == shape.v_t:
        return ""
    for pair, pair_errors in found.items():
        for field, error in pair_errors._asdict().items():
            limit = MAX_LOSS_ERROR if field.endswith("loss") else MAX_GRAD_ERROR
            if field != "top64" and not error <= limit:
                return f"refused: {pair}{field} error {error:.1e} exceeds {limit:.0e}"
    return ""


def error_columns(name: str, shape: Shape, pairs: Pairs, overlap: VocabOverlap) -> dict[str, Any]:
    """Errors of one of ours, with a status if it may not be timed."""
    found = {prefix: errors(pair, *mode_of(name, overlap)) for prefix, pair in pairs.items()}
    values = [error for pair_errors in found.values() for error in pair_errors]
    # without a near-converged pair the last third stays empty
    columns = {field: f"{value:.2e}" for field, value in zip(ERROR_FIELDS, values, strict=False)}
    refusal = excess(name, shape, found)
    return columns | {"status": refusal} if refusal else columns


def make_step(name: str, case: Case, overlap: VocabOverlap) -> Callable[[], Any]:
    if name == "floor":
        return floor_step(case)
    if name in OURS:
        logits_dtype, matched = mode_of(name, overlap)
        options = {"logits_dtype": logits_dtype, **loss_options(matched)}
        loss: Callable[[], Tensor] = partial(fused_linear_uld, *case, **options)
    else:
        loss = partial(eager, case, torch.bfloat16 if name == "eager_bf16" else torch.float32)
    return lambda: torch.autograd.grad(loss(), case.leaves())


def time_and_memory(name: str, case: Case, overlap: VocabOverlap, rep_ms: float) -> dict[str, Any]:
    device, step = case.student_hidden.device.type, make_step(name, case, overlap)
    returned = None if name == "floor" else sum(leaf.nbytes for leaf in case.leaves())
    return time_of(step, device, rep_ms, returned)


def time_of(
    step: Callable[[], Any], device: str, rep_ms: float, returned: int | None
) -> dict[str, Any]:
    """Columns; returned: bytes of what a call returns, None for the floor, which has no memory of
    its own to speak of.
    """
    times = milliseconds(step, device, rep_ms)
    keys = ("median_ms", "p20_ms", "p80_ms")
    columns = {"status": "ok"} | {key: f"{ms:.4g}" for key, ms in zip(keys, times, strict=True)}
    if returned is not None:
        peak = peak_extra_bytes(step, device)
        columns["peak_mib"] = f"{peak / MIB:.1f}"
        columns["peak_extra_mib"] = f"{(peak - returned) / MIB:.1f}"
    return columns


def measure(
    name: str, shape: Shape, case: Case, pairs: Pairs, overlap: VocabOverlap, rep_ms: float
) -> dict[str, Any]:
    """Errors of ours first; then, unless refused, time and memory. Errors stay if memory ends."""
    columns: dict[str, Any] = {}
    try:
        if name in OURS:
            columns = error_columns(name, shape, pairs, overlap)
        if "status" not in columns:
            columns |= time_and_memory(name, case, overlap, rep_ms)
    except torch.OutOfMemoryError:
        columns["status"] = "out of memory"
    return columns


def add_row(
    name: str,
    shape: Shape,
    columns: dict[str, Any],
    floor: float,
    log: RowLog,
    errors: Sequence[str] = ERROR_FIELDS,  # that are said
) -> None:
    """Write the row and say so."""
    row = dict.fromkeys(log.fields, "") | {"implementation": name, "dtype": "bfloat16"}
    row |= dict(zip(("N", "V_s", "V_t", "D_s", "D_t"), shape, strict=True)) | columns
    if floor and row["median_ms"]:
        row["times_floor"] = f"{float(row['median_ms']) / floor:.3f}"
    log.add(row)
    keys = ("median_ms", "times_floor", "peak_extra_mib", *errors)
    line = f"{name:20}{'x'.join(map(str, shape)):30}{row['status']:4}"
    say(f"{line} {'  '.join(str(row[key]) or '-' for key in keys)}")


def run_shape(
    shape: Shape, seed: int, options: argparse.Namespace, device: str, log: RowLog
) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    case, overlap = random_case(shape, generator), random_overlap(shape, generator)
    pairs = make_pairs(case, generator)
    floor = 0.0
    for name in options.only:
        columns = measure(name, shape, case, pairs, overlap, options.rep_ms)
        if name == "floor" and columns["status"] == "ok":
            floor = float(columns["median_ms"])
        add_row(name, shape, columns | options.environment, floor, log)
        release(device)


def parse_options(
    arguments: list[str] | None,
    description: str,
    implementations: Sequence[str],
    shapes: Sequence[str],
    tiny_shapes: Sequence[str],
    out: Path,
) -> argparse.Namespace:
    """Options of this benchmark and of bench_cross.py; what is not given gets its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU; no record")
    parser.add_argument("--only", nargs="+", choices=implementations, default=implementations)
    parser.add_argument("--shapes", nargs="+", help="NxV_sxV_txD_sxD_t")
    parser.add_argument("--rep-ms", type=float, default=100, help="of timed calls, about")
    parser.add_argument("--out", type=Path, help=f"CSV file; default results/{out.name}")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device: pass --tiny to run the same code on small shapes")
    texts = options.shapes or (tiny_shapes if options.tiny else shapes)
    options.shapes = [Shape.parse(text) for text in texts]  # all, before the first is timed
    if options.tiny:
        options.rep_ms = 1
    elif options.out is None:
        options.out = out
    # the floor is what the others are divided by
    options.only = [name for name in implementations if name in options.only]
    options.environment = environment()
    return options


def measure_all(
    options: argparse.Namespace,
    fields: Sequence[str],
    run_shape: Callable[[Shape, int, argparse.Namespace, str, RowLog], None],
) -> int:
    """The exit code: 1 where an error exceeds its limit."""
    device, log = "cpu" if options.tiny else "cuda", RowLog(options.out, fields)
    for seed, shape in enumerate(options.shapes):
        run_shape(shape, seed, options, device, log)
    refused = [row for row in log.rows if row["status"].startswith("refused")]
    for row in refused:
        sys.stderr.write(f"{row['implementation']}: {row['status']}\n")
    return 1 if refused else 0


def main(arguments: list[str] | None = None) -> int:
    description, out = __doc__.splitlines()[0], RESULTS / "uld.csv"
    options = parse_options(arguments, description, IMPLEMENTATIONS, SHAPES, TINY_SHAPES, out)
    return measure_all(options, FIELDS, run_shape)


if __name__ == "__main__":
    sys.exit(main())
