"""One of three processes of test_counted_rows: ULD of heads in slices by counts, over groups of
one, two and three processes, beside whole heads in float64 and beside an exchange of rows.

torchrun --nproc_per_node 3 -m support.rank SECONDS support.counted_step BACKEND
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from gold_kernels import fused_linear_uld
from gold_kernels.uld import counted_rows
from gold_kernels.uld.row_loss import ULD
from support.error_budget import relative_error
from support.jsd_cases import near_converged_case, random_case
from support.parallel_cases import Call, Processes, check, run
from support.rank import leave_together

# names of cases, with room for all open entries and with little: the interpreter is slow
IN_INTERPRETER = (("everything", "near", "16 bits", "no rows"), ("plain", "near"))
refused: list[int] = []  # number of chunks of each panel
called: list[slice] = []  # for which chunks


class Watched(counted_rows.CountedRows):
    def __call__(self, *args: Any) -> None:
        called.append(args[3])
        super().__call__(*args)

    def refused(self) -> list[slice]:
        chunks = super().refused()
        refused.append(len(chunks))
        return chunks


def calls(v: int) -> Iterator[tuple[str, Call]]:
    """Vocabularies of one size, whose order the loss hangs on, and of two."""
    generator = torch.Generator().manual_seed(2)
    n = 7
    case = random_case(n=n, v=v, d_s=6, d_t=7)
    hidden, weight, teacher, teacher_weight = case
    yield "plain", Call(fused_linear_uld, case, {"chunk_size": 3})
    masked = torch.randn(v, generator=generator)
    masked[4], masked[-1] = -torch.inf, -torch.inf
    row_weights = torch.rand(n, generator=generator)
    row_weights[3] = 0
    everything = {
        "row_weights": row_weights,
        "temperature": 1.25,
        "teacher_temperature": 0.75,
        "final_logit_softcapping": (5.0, None),
        "logit_scale": (0.5, 1.5),
        "student_bias": masked,
        "return_metrics": True,
        "vocab_size": (v - 2, v - 5),
    }
    yield "everything", Call(fused_linear_uld, case, everything, "uneven")
    few = (hidden, weight, teacher, teacher_weight[: v // 2])
    yield "two sizes", Call(fused_linear_uld, few, {"reduction": "none"}, is_frozen=True)
    peaked = (8 * hidden, weight, 6 * teacher, teacher_weight)
    yield "peaked", Call(fused_linear_uld, peaked, {})
    yield "near", Call(fused_linear_uld, near_converged_case(n=n, v=v, d=8), {})
    if v > 500:  # the signs of open entries lie in the memory of a 16-bit gradient
        sixteen = Call(fused_linear_uld, case, {"chunk_size": 5})
        yield "16 bits", sixteen._replace(loss=_of_16_bits)
    yield "no rows", Call(fused_linear_uld, (hidden[:0], weight, teacher[:0], teacher_weight), {})


def _of_16_bits(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """The tensors are numbers of 16 bits."""
    if tensors[0].dtype == torch.float32:
        tensors = tuple(tensor.bfloat16() for tensor in tensors)
    return fused_linear_uld(*tensors, **options)


def check_dead_rows(processes: Processes, backend: str, dtype: torch.dtype) -> list[str]:
    """A row of weight 0 may hold NaN, on any process another one."""
    hidden, weight, teacher, teacher_weight = random_case(n=4, v=60, d_s=4, d_t=5)
    row_weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    call = Call(fused_linear_uld, (hidden, weight, teacher, teacher_weight), {})
    call = call._replace(options={"row_weights": row_weights})
    expected = run(call, torch.float64, None)["loss"]
    with torch.no_grad():
        hidden[1] = torch.nan
    call = call._replace(options=call.options | {"backend": backend})
    found = run(call, dtype, processes)
    is_right = (
        found["loss"].double().isclose(expected, rtol=1e-5)
        and not found["grad_hidden"].isnan().any()
    )
    return [] if is_right else [f"a row of NaN: {found['loss']} for {expected}"]


def check_lost_rows(processes: Processes, backend: str, dtype: torch.dtype) -> list[str]:
    """The loss of a row that has become NaN or infinite is NaN, as that of whole heads is."""
    wrong = []
    for number in (torch.nan, torch.inf):
        hidden, *others = random_case(n=4, v=60, d_s=4, d_t=5)
        with torch.no_grad():
            hidden[1, 0] = number
        found = run(
            Call(fused_linear_uld, (hidden, *others), {"backend": backend}), dtype, processes
        )
        is_lost = found["grad_hidden"].isnan().any(1).tolist()
        if not found["loss"].isnan() or is_lost != [False, True, False, False]:
            wrong.append(f"a row with {number}: {found['loss']}, gradients of {is_lost} are NaN")
    return wrong


def check_exchange(call: Call, dtype: torch.dtype, processes: Processes, limit: float) -> list[str]:
    """Counts beside rows exchanged."""
    counted = run(call, dtype, processes)
    ULD.takes_slices = False
    exchanged = run(call, dtype, processes)
    ULD.takes_slices = True
    errors = {name: relative_error(counted[name], exchanged[name]) for name in counted}
    return [f"{name} beside rows: {e:.1e}" for name, e in errors.items() if not e < limit]


def check_left(processes: Processes, limit: float) -> list[str]:
    """Once a chunk had no room no other one is counted; where a panel has all chunks, the second
    is made before that is known.
    """
    counted_rows.OPEN_PART = 1000
    wrong = []
    for dtype, number in ((torch.float64, 1), (torch.bfloat16, 2)):
        case = near_converged_case(n=8, v=97, d=8).to(dtype)
        called.clear()
        refused.clear()
        call = Call(fused_linear_uld, case, {"chunk_size": 2})
        wrong += check(call, dtype, processes, limit) if dtype == torch.float64 else []
        wrong += check_exchange(call, dtype, processes, limit) if dtype != torch.float64 else []
        if (len(called), sum(refused)) != (number, 4):
            wrong.append(f"{len(called)} chunks of 4 were made, {sum(refused)} exchanged")
    return [f"near, in four chunks: {one}" for one in wrong]


def check_group(processes: Processes, backend: str) -> list[str]:
    """With room for all open entries no chunk is exchanged; with little, some are."""
    dtype, limit, v = (
        (torch.float64, 1e-12, 301) if backend == "torch" else (torch.float32, 2e-5, 97)
    )
    wrong = []
    for open_part, is_any in ((1, False), (1000, True)):
        counted_rows.OPEN_PART, number = open_part, 0
        for name, call in calls(v):
            if backend == "triton" and name not in IN_INTERPRETER[is_any]:
                continue
            refused.clear()
            options: dict[str, Any] = call.options | {"backend": backend}
            found = check(call._replace(options=options), dtype, processes, limit)
            if backend == "torch" and name == "plain":
                found += check_exchange(call, dtype, processes, limit)
            wrong += [f"{name}, room for 1 in {open_part}: {one}" for one in found]
            number += sum(refused)
        if (number > 0) != is_any:
            wrong.append(f"room for 1 in {open_part}: {number} chunks were exchanged")
    if backend == "torch":
        wrong += check_left(processes, limit)
    counted_rows.OPEN_PART = 1
    wrong += check_lost_rows(processes, backend, dtype) if backend == "torch" else []
    return wrong + check_dead_rows(processes, backend, dtype)


def main(backend: str) -> None:
    from gold_kernels.uld import row_loss

    row_loss.CountedRows = Watched  # type: ignore[misc]
    dist.init_process_group("gloo")
    wrong = []
    sizes = (1, 2, 3) if backend == "torch" else (2,)
    groups = [dist.new_group(list(range(size))) for size in sizes]
    for size, group in zip(sizes, groups, strict=True):
        if dist.get_rank() < size:
            found = check_group(Processes(group), backend)
            wrong += [f"{size} processes, {one}" for one in found]
    assert not wrong, "\n".join(wrong)
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1])
