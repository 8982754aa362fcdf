"""Losses of heads in slices over several GPUs beside whole heads on one.

    torchrun --nproc_per_node 2 benchmarks/bench_parallel.py          # NCCL; a row of CSV per case
    torchrun --nproc_per_node 2 benchmarks/bench_parallel.py --tiny   # the same code on CPUs, gloo

Loss and gradients, forward and backward, bfloat16. N scored rows, V vocabulary, D_s and D_t hidden
sizes: Qwen3-VL-8B -> 2B. Each process times whole heads on its own GPU, then its slices; the
slower process counts. Whole heads are what bench_jsd.py and bench_uld.py hold to the oracle: no
ratio is printed where the loss or a gradient of slices differs from theirs by more than MAX_ERROR.
Calls of a group are the same number on all processes. Peak memory is above the inputs.

Goal: 0.6 of one GPU's time with two, at 4096 rows.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsd_pairs import Shape, random_case
from record import RESULTS, RowLog, environment, say
from timing import MIB, release
from torch import Tensor

from gold_kernels import fused_linear_jsd, fused_linear_loss, fused_linear_uld, peak_extra_bytes
from gold_kernels.losses import SkewKL

SHAPES = ("4096x151936x2048x4096", "1024x151936x2048x4096")
TINY_SHAPES = ("48x1003x16x24",)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "jsd": fused_linear_jsd,
    "skew_kl": partial(fused_linear_loss, SkewKL()),
    "uld": fused_linear_uld,
}
MAX_ERROR = {"jsd": 1e-2, "skew_kl": 1e-2, "uld": 5e-2}  # of bfloat16; counting decides signs
WARM_UPS, CALLS = 5, 20
FIELDS = [
    *("loss", "processes", "head", "N", "V", "D_s", "D_t", "dtype", "status"),
    *("whole_ms", "slices_ms", "ratio", "whole_peak_mib", "slices_peak_mib"),
    *("loss_error", "grad_hidden_error", "grad_weight_error"),
    *("device", "torch", "triton", "transformers", "git_sha"),
]


def median_ms(step: Callable[[], Any], calls: int, warm_ups: int) -> float:
    """Median of the slowest process; all call alike."""
    times = []
    for index in range(warm_ups + calls):
        wait()
        start = clock()
        step()
        end = clock()
        if index >= warm_ups:
            times.append(elapsed_ms(start, end))
    slowest = torch.tensor(times, dtype=torch.float64, device=device_type()).median()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def device_type() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def wait() -> None:
    if device_type() == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def clock() -> Any:
    if device_type() == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start: Any, end: Any) -> float:
    if device_type() == "cpu":
        return 1000 * (end - start)
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Relative, the largest of all processes."""
    gap = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    return float(gap)


def run_case(name: str, shape: Shape, head: str, options: argparse.Namespace) -> dict[str, Any]:
    device, rank, size = device_type(), dist.get_rank(), dist.get_world_size()
    generator = torch.Generator(device).manual_seed(0)
    case = random_case(shape, generator, torch.bfloat16, is_frozen=head == "frozen")
    slices = [case.student_hidden]
    for weight in (case.student_weight, case.teacher_weight):
        slices.append(weight.detach().tensor_split(size)[rank].clone())
    slices[1].requires_grad_(case.student_weight.requires_grad)
    own = (slices[0], slices[1], case.teacher_hidden, slices[2])

    def step(tensors: tuple[Tensor, ...], **given: Any) -> list[Tensor]:
        loss = LOSSES[name](*tensors, **given)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    steps = partial(step, tuple(case)), partial(step, own, process_group=dist.group.WORLD)
    expected, actual = (one() for one in steps)
    if head == "trained":
        expected[2] = expected[2].tensor_split(size)[rank]
    errors = [error_of(a, b) for a, b in zip(actual, expected, strict=True)]
    del expected, actual
    names = ("loss_error", "grad_hidden_error", "grad_weight_error")
    row: dict[str, Any] = {key: f"{e:.2e}" for key, e in zip(names, errors, strict=False)}
    if not max(errors) <= MAX_ERROR[name]:
        return row | {"status": f"refused: an error exceeds {MAX_ERROR[name]:.0e}"}
    calls = (2, 1) if options.tiny else (CALLS, WARM_UPS)
    whole, in_slices = (median_ms(one, *calls) for one in steps)
    peaks = [peak_extra_bytes(one, device) / MIB for one in steps]
    row |= {"status": "ok", "whole_ms": f"{whole:.4g}", "slices_ms": f"{in_slices:.4g}"}
    row |= {"ratio": f"{in_slices / whole:.3f}"}
    return row | {"whole_peak_mib": f"{peaks[0]:.1f}", "slices_peak_mib": f"{peaks[1]:.1f}"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes on CPUs")
    parser.add_argument("--only", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--shapes", nargs="+", help="NxVxD_sxD_t")
    parser.add_argument("--out", type=Path, help="CSV file; default results/parallel.csv")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("bench_parallel: expected a CUDA GPU a process, got none; --tiny runs anywhere")
    dist.init_process_group("gloo" if options.tiny else "nccl")
    if not options.tiny:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    is_first = dist.get_rank() == 0
    out = options.out or (None if options.tiny else RESULTS / "parallel.csv")
    log, where = RowLog(out if is_first else None, FIELDS), environment()
    for shape_text in options.shapes or (TINY_SHAPES if options.tiny else SHAPES):
        shape = Shape.parse(shape_text)
        for head in ("trained", "frozen"):
            for name in options.only:
                row = dict.fromkeys(FIELDS, "") | {"loss": name, "head": head, "dtype": "bfloat16"}
                row |= {"processes": dist.get_world_size()}
                row |= dict(zip(("N", "V", "D_s", "D_t"), shape, strict=True))
                row |= run_case(name, shape, head, options) | where
                log.add(row)
                release(device_type())
                if is_first:
                    say(
                        f"{name:10}{head:9}{shape_text:24}{row['whole_ms']:>8} ms whole"
                        f"{row['slices_ms']:>8} ms in slices{row['ratio']:>8}  {row['status']}"
                    )
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(row["status"] == "ok" for row in log.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
