"""Fused linear JSD beside its peers and the GEMM floor: time, peak memory and error.

    python benchmarks/bench_jsd.py                  # everything, on a GPU; a row of CSV per case
    python benchmarks/bench_jsd.py --quick
    python benchmarks/bench_jsd.py --only gold_kernels floor --shapes 1024x151936x2048x4096
    python benchmarks/bench_jsd.py --tiny           # the same code on small shapes anywhere

Loss and gradients, forward and backward, bfloat16. N scored rows, V vocabulary, D_s and D_t hidden
sizes: Qwen3-VL-8B -> 2B for V = 151936; Gemma's vocabulary for V = 262144. The first shape gets
every beta and every budget. Inputs are drawn anew for each (shape, head, beta) and shared by the
implementations, which are checked against the float64 oracle before they are timed (jsd_pairs.py).
Ours prints no time when an error exceeds its limit; a peer's errors are reported. What fails gets a
row whose status says how.

Bytes: the floor reads both heads and both hidden states and writes both logits, grad_hidden and
grad_weight, once a chunk of 2048 rows. Peak memory is above the inputs; peak_extra_mib also leaves
out the returned gradients (on a CPU it misses what lives only inside one operator, such as ours).
The lines printed are: case, median, times the floor of this case, peak_extra_mib, and the errors of
loss, grad_hidden and grad_weight on the random and on the near-converged pair.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsd_pairs import Case, Errors, Pair, Shape, errors, random_and_near_converged, random_case
from peers import COMPILED, PACKAGES, PEERS, Prepare, floor_step
from record import RESULTS, RowLog, environment, package_versions, say
from timing import MIB, milliseconds, release
from torch import Tensor

from gold_kernels import fused_linear_jsd, fused_linear_mean_kl, head_means, peak_extra_bytes
from gold_kernels.engine.chunk_plan import DEFAULT_BUDGET_BYTES

SHAPES = (
    "4096x151936x2048x4096",
    "256x151936x2048x4096",
    "1024x151936x2048x4096",
    "16384x151936x2048x4096",
    "4096x262144x2560x2560",
    "4096x65536x2048x2048",
    "4096x32000x1024x4096",
)
TINY_SHAPES = ("64x8209x16x24", "64x8209x8x8")
BETAS = (0.5, 0.0, 0.1, 0.9, 1.0)
BUDGETS_MIB = (64, 128, 256, 512, 1024)
MEANS = "gold_kernels_means"  # beta 0 and a frozen head alone; its means are made beforehand
OURS = ("gold_kernels", "gold_kernels_fast", MEANS)
IMPLEMENTATIONS = ("floor", *OURS, *PEERS)
HEADS = ("trainable", "frozen")
# Relative errors that ours may have on the random and on the near-converged pair: loss, gradients.
# In the fast mode the second pair is beyond what bfloat16 logits hold, and only reported.
MAX_ERRORS = {
    "gold_kernels": ((2e-5, 4e-3), (5e-3, 1e-2)),
    "gold_kernels_fast": ((5e-5, 1e-2), None),
    # the loss to 2e-5 nats, of 5e-5 in the second pair: tensor cores cut off what they add
    MEANS: ((2e-5, 4e-3), (0.4, 1e-2)),
}
ERROR_FIELDS = [f"{pair}{name}_error" for pair in ("", "near_") for name in Errors._fields]
FIELDS = [
    *("part", "implementation", "head", "N", "V", "D_s", "D_t", "dtype", "beta", "budget_bytes"),
    *("status", "median_ms", "p20_ms", "p80_ms", "times_floor", "peak_mib", "peak_extra_mib"),
    *("first_call_s", *ERROR_FIELDS),
    *("device", "torch", "triton", "transformers", *PACKAGES, "git_sha"),
]


class Group(NamedTuple):
    """Cases that share inputs; part says which plot they are for."""

    part: str  # shapes, betas or budgets
    shape: Shape
    head: str
    beta: float


class Inputs(NamedTuple):
    case: Case  # what is timed
    pairs: tuple[Pair, Pair]  # random and near-converged, with answers


class Setup(NamedTuple):
    """What stays the same during a run."""

    device: str
    rep_ms: float
    log: RowLog
    environment: dict[str, str]


def prepare_ours(
    case: Case, beta: float, *, logits_dtype: torch.dtype | None, budget_bytes: int
) -> Callable[[], Tensor]:
    return partial(
        fused_linear_jsd, *case, beta=beta, logits_dtype=logits_dtype, budget_bytes=budget_bytes
    )


def prepare_means(case: Case, beta: float, *, budget_bytes: int) -> Callable[[], Tensor]:
    assert beta == 0 and not case.student_weight.requires_grad, "see is_for"
    teacher = head_means(case.teacher_hidden, case.teacher_weight, case.student_weight)
    student = case.student_hidden, case.student_weight
    return partial(fused_linear_mean_kl, *student, teacher, budget_bytes=budget_bytes)


def is_for(name: str, group: Group) -> bool:
    return name != MEANS or (group.head == "frozen" and group.beta == 0)


def preparation(name: str, budget_bytes: int) -> Prepare:
    if name not in OURS:
        return PEERS[name]
    if name == MEANS:
        return partial(prepare_means, budget_bytes=budget_bytes)
    logits_dtype = torch.bfloat16 if name == "gold_kernels_fast" else None
    return partial(prepare_ours, logits_dtype=logits_dtype, budget_bytes=budget_bytes)


def make_inputs(group: Group, seed: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    case = random_case(group.shape, generator, torch.bfloat16, is_frozen=group.head == "frozen")
    return Inputs(case, random_and_near_converged(case, group.beta, generator))


def excess(name: str, found: list[Errors]) -> str:
    """Which error of ours exceeds its limit, empty if none does; NaN exceeds every limit."""
    for label, pair_errors, limits in zip(("", "near "), found, MAX_ERRORS[name], strict=True):
        if limits is None:
            continue
        for field, error in pair_errors._asdict().items():
            limit = limits[0] if field == "loss" else limits[1]
            if error is not None and not error <= limit:
                return f"refused: {label}{field} error {error:.1e} exceeds {limit:.0e}"
    return ""


def time_columns(step: Callable[[], Any], setup: Setup) -> dict[str, Any]:
    times = milliseconds(step, setup.device, setup.rep_ms)
    keys = ("median_ms", "p20_ms", "p80_ms")
    return {"status": "ok"} | {key: f"{ms:.4g}" for key, ms in zip(keys, times, strict=True)}


def time_and_memory(step: Callable[[], Any], case: Case, setup: Setup) -> dict[str, Any]:
    columns = time_columns(step, setup)
    peak = peak_extra_bytes(step, setup.device)
    returned = sum(leaf.nbytes for leaf in case.leaves())
    columns |= {"peak_mib": f"{peak / MIB:.1f}", "peak_extra_mib": f"{(peak - returned) / MIB:.1f}"}
    return columns


def check_and_measure(
    name: str, prepare: Prepare, group: Group, inputs: Inputs, setup: Setup
) -> dict[str, Any]:
    """Errors first; then, unless ours is refused, time and memory."""
    random, near = inputs.pairs
    start = time.perf_counter()
    found = [errors(random, prepare(random.case, group.beta))]
    first_call = time.perf_counter() - start  # .item() in errors waited for the device
    found.append(errors(near, prepare(near.case, group.beta)))
    values = [error for pair_errors in found for error in pair_errors]
    columns = {
        field: "" if value is None else f"{value:.2e}"
        for field, value in zip(ERROR_FIELDS, values, strict=True)
    }
    columns["first_call_s"] = f"{first_call:.2f}"
    refusal = excess(name, found) if name in OURS else ""
    if refusal:
        return {**columns, "status": refusal}
    loss_function, leaves = prepare(inputs.case, group.beta), inputs.case.leaves()
    return columns | time_and_memory(
        lambda: torch.autograd.grad(loss_function(), leaves), inputs.case, setup
    )


def run_case(
    name: str, group: Group, inputs: Inputs, setup: Setup, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> None:
    """Measure, write the row, say so. Whatever a case raises, the next one runs."""
    if name in COMPILED:
        torch.compiler.reset()  # a static graph for these shapes, as a first call makes it
    try:
        if name == "floor":
            result = time_columns(floor_step(inputs.case), setup)
        else:
            prepare = preparation(name, budget_bytes)
            result = check_and_measure(name, prepare, group, inputs, setup)
    except Exception as error:  # a peer may fail in any way
        first_line = (str(error).strip().splitlines() or [""])[0]
        status = f"{type(error).__name__}: {first_line[:160]}"
        result = {"status": status.encode("ascii", "replace").decode()}
    add_row(name, group, result, setup, budget_bytes)
    release(setup.device)


def add_row(
    name: str, group: Group, result: dict[str, Any], setup: Setup, budget_bytes: int
) -> None:
    shape = dict(zip(("N", "V", "D_s", "D_t"), group.shape, strict=True))
    row = dict.fromkeys(FIELDS, "") | {"part": group.part, "implementation": name}
    row |= {"head": group.head, **shape, "dtype": "bfloat16", "beta": group.beta}
    row |= {"budget_bytes": budget_bytes if name in OURS else "", **result, **setup.environment}
    floors = [
        float(done["median_ms"])
        for done in setup.log.rows
        if done["implementation"] == "floor"
        and done["status"] == "ok"
        and all(done[key] == row[key] for key in ("head", "beta", *shape))
    ]
    if floors and row["median_ms"] and name != "floor":
        row["times_floor"] = f"{float(row['median_ms']) / floors[-1]:.3f}"
    setup.log.add(row)
    say_row(row)


def say_row(row: dict[str, Any]) -> None:
    """A line about a row."""
    shape = "x".join(str(row[key]) for key in ("N", "V", "D_s", "D_t"))
    budget = f"{row['budget_bytes'] / MIB:g} MiB" if row["budget_bytes"] else ""
    line = f"{row['implementation']:20}{row['head']:10}{shape:23}{row['beta']:<4g}{budget:>9}  "
    if row["median_ms"]:
        line += f"{row['median_ms']:>7} ms {row['times_floor']:>6}"
        line += f" {row['peak_extra_mib']:>9} MiB  " if row["peak_extra_mib"] else ""
    if row["near_loss_error"]:
        line += " ".join(row[field] or "-" for field in ERROR_FIELDS)
    say(f"{line}  {'' if row['status'] == 'ok' else row['status']}".rstrip())


def make_groups(options: argparse.Namespace) -> Iterator[Group]:
    for index, text in enumerate(options.shapes):
        for head in options.heads:
            for beta in options.betas if index == 0 else options.betas[:1]:
                part = "shapes" if beta == options.betas[0] else "betas"
                yield Group(part, Shape.parse(text), head, beta)


def run_all(options: argparse.Namespace, setup: Setup) -> None:
    start = time.monotonic()
    groups = list(make_groups(options))
    names = [name for name in options.only if name not in COMPILED]
    for seed, group in enumerate(groups):
        inputs = make_inputs(group, seed, setup.device)
        for name in names:
            if is_for(name, group):
                run_case(name, group, inputs, setup)
        if group.part == "shapes" and group.shape == groups[0].shape:
            for budget in options.budgets_mib:
                for name in OURS:
                    if (
                        name in names
                        and is_for(name, group)
                        and budget * MIB != DEFAULT_BUDGET_BYTES
                    ):
                        part = group._replace(part="budgets")
                        run_case(name, part, inputs, setup, int(budget * MIB))
        del inputs
        release(setup.device)
    # trainable heads and all shapes before frozen ones and other betas: time may run out
    for group in sorted(groups, key=lambda group: (group.head == "frozen", group.part == "betas")):
        waiting = [name for name in options.only if name in COMPILED]
        if waiting and time.monotonic() - start > options.seconds:
            for name in waiting:
                result = {"status": f"not run: {options.seconds:g} s were over"}
                add_row(name, group, result, setup, DEFAULT_BUDGET_BYTES)
            continue
        if waiting:
            inputs = make_inputs(group, len(groups) + groups.index(group), setup.device)
        for name in waiting:
            run_case(name, group, inputs, setup)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, one beta, no compilers")
    parser.add_argument("--tiny", action="store_true", help="small shapes, anywhere; no record")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--shapes", nargs="+", help="NxVxD_sxD_t; the first gets all betas")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS)
    parser.add_argument("--budgets-mib", nargs="*", type=float, default=BUDGETS_MIB)
    parser.add_argument("--rep-ms", type=float, default=100, help="of timed calls, about")
    parser.add_argument(
        "--seconds", type=float, default=420, help="later than this no case is compiled"
    )
    parser.add_argument("--out", type=Path, help="CSV file; default results/jsd.csv")
    options = parser.parse_args(arguments)
    if options.quick:
        options.only = [name for name in options.only if name not in COMPILED]
        options.betas, options.budgets_mib = options.betas[:1], []
    if options.shapes is None:
        options.shapes = SHAPES[: 2 if options.quick else None]
        if options.tiny:
            options.shapes = TINY_SHAPES
    if options.tiny:
        options.rep_ms, options.budgets_mib = 1, [1]
    elif options.out is None:
        options.out = RESULTS / "jsd.csv"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    device = "cpu" if options.tiny or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and not options.tiny:
        sys.exit("bench_jsd: expected a CUDA GPU, got none; --tiny runs anywhere")
    where = environment() | package_versions(PACKAGES)
    log, start = RowLog(options.out, FIELDS), time.monotonic()
    run_all(options, Setup(device, options.rep_ms, log, where))
    where_to = options.out or "nothing written"
    say(f"{len(log.rows)} cases in {time.monotonic() - start:.0f} s: {where_to}")
    failed = [row for row in log.rows if row["implementation"] in OURS and row["status"] != "ok"]
    for row in failed:
        sys.stderr.write(f"{row['implementation']}: {row['status']}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
