"""Random calls of the losses on logits against the float64 oracle; `make fuzz` runs it for minutes.

N rows, V vocabulary. A case is a seed: shapes 0 and 1, strides, dtypes, columns masked with -inf on
one or both sides, labels on masked columns, rows of weight 0 that hold NaN, temperatures from 1e-3
to 1e3, beta at and near its ends. Bounds are those of docs/accuracy.md, plus the rounding of
logits / temperature, which an oracle of the same float32 logits does not have.

    python -m support.fuzz --backend triton --seconds 60        (in tests/)
"""

import argparse
import math
import os
import sys
import time
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor

from gold_kernels import jsd_loss, reference, uld_loss
from gold_kernels.uld.bin_table import NUM_BINS

BETAS = (0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0)
TEMPERATURES = (1e-3, 0.1, 1.0, 3.0, 1e3)
EPS = 2.0**-23
LOG_ZERO = -1e6


class FuzzCase(NamedTuple):
    loss: str  # "jsd" or "uld"
    student: Tensor  # (N, V_s)
    teacher: Tensor  # (N, V_t)
    row_weights: Tensor  # (N,)
    labels: Tensor | None  # (N,)
    beta: float
    temperature: float


def make_case(seed: int) -> FuzzCase:
    generator = torch.Generator().manual_seed(seed)

    def pick(options: tuple[Any, ...]) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    loss = pick(("jsd", "uld"))
    n, v_student = pick((0, 1, 2, 5)), pick((1, 2, 17, 130))
    v_teacher = v_student if loss == "jsd" else pick((1, 2, 23, 130))
    dtype = pick((torch.float32, torch.bfloat16, torch.float32))
    spread = pick((0.1, 1.0, 6.0))

    def logits(size: int) -> Tensor:
        step = pick((1, 2))
        wide = torch.randn(n, step * size, generator=generator).mul_(spread).to(dtype)
        values = wide[:, ::step]
        if pick((False, True)) and size > 1:
            values[:, int(torch.randint(size, (), generator=generator))] = -torch.inf
        return values

    student, teacher = logits(v_student), logits(v_teacher)
    if loss == "jsd" and pick((False, False, True)):  # near convergence
        teacher = (student.float() * (1 + 1e-3 * torch.randn((), generator=generator))).to(dtype)
    weights = torch.rand(n, generator=generator)
    if n > 1:
        weights[0] = 0
        student[0] = teacher[0] = torch.nan
    labels = None
    if loss == "jsd" and pick((False, True)):
        labels = torch.randint(-1, v_student + 1, (n,), generator=generator)
    return FuzzCase(loss, student, teacher, weights, labels, pick(BETAS), pick(TEMPERATURES))


def oracle(case: FuzzCase) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64; rows of weight 0 left out."""
    student = case.student.double().requires_grad_()
    is_live = case.row_weights != 0
    rows, teacher = student[is_live], case.teacher.double()[is_live]
    weights = case.row_weights.double()[is_live]
    if case.loss == "jsd":
        options = {"beta": case.beta, "temperature": case.temperature}
        loss = (weights * reference.jsd_rows(rows, teacher, **options)).sum()
    else:
        sides = (case.temperature, case.temperature)
        q, p = (reference.log_probs(x, t) for x, t in zip((rows, teacher), sides, strict=True))
        loss = (weights * reference.sorted_l1_rows(q, p)).sum()
    if case.labels is not None:
        labels = case.labels[is_live]
        is_label = (labels >= 0) & (labels < rows.shape[1])
        index = labels.clamp(0, rows.shape[1] - 1).unsqueeze(1)
        hard = -reference.log_probs(rows, 1.0).gather(1, index).squeeze(1)
        loss = loss + (weights * torch.where(is_label, hard, 0)).sum()
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def run(case: FuzzCase, backend: str) -> tuple[Tensor, Tensor]:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    student = case.student.to(device).detach().requires_grad_()
    teacher, weights = case.teacher.to(device), case.row_weights.to(device)
    options: dict[str, Any] = {"temperature": case.temperature, "backend": backend}
    if case.labels is not None:
        options |= {"labels": case.labels.to(device), "label_weights": weights}
    if case.loss == "jsd":
        loss = jsd_loss(student, teacher, weights, beta=case.beta, **options)
    else:
        loss = uld_loss(student, teacher, weights, **options)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach().cpu().double(), grad.cpu().double()


def excess(seed: int, backend: str) -> str:
    """What is wrong beyond its bound; empty where nothing is."""
    case = make_case(seed)
    (loss, grad), (truth, slope) = run(case, backend), oracle(case)
    if not (torch.isfinite(loss) and torch.isfinite(grad).all()):
        return "not finite"
    finite = case.student.double().abs().where(torch.isfinite(case.student), 0)
    largest = float(finite.amax()) if finite.numel() else 0.0
    rounding = 8 * EPS * (1 + largest / case.temperature)  # of a scaled logit
    size = float(case.row_weights.sum())
    error, allowed = abs(float(loss - truth)), 2e-5 * abs(float(truth)) + rounding * size
    if case.loss == "uld" and backend == "triton" and case.student.dtype != torch.float32:
        # logits of 16 bits are counted, not ordered: an entry may be off by the width of its bin
        bits = 12 + math.log2(max(case.student.shape[1], case.teacher.shape[1]))
        allowed += 2 * size * (2 ** (bits / (NUM_BINS - 1)) - 1)
    if error > allowed:
        return f"loss off by {error:.1e}, {allowed:.1e} allowed"
    gap = float((grad - slope).norm())
    width = EPS if case.student.dtype == torch.float32 else 2.0**-8
    scale = float(slope.norm()) + size * rounding / case.temperature
    limit = (4e-2 if case.loss == "uld" else 1e-4) + 2 * width
    floor = size * (rounding + 1e-7) / case.temperature
    if case.labels is not None:  # q - 1 of the cross-entropy, which has temperature 1
        floor += size * (8 * EPS * (1 + largest) + 1e-7)
    if case.loss == "uld":  # a tie in float32 has any sign in float64
        floor += 0.1 * size / case.temperature * (case.temperature != 1.0 or backend == "triton")
    if gap > limit * scale + floor:
        return f"gradient off by {gap:.1e}, {limit * scale + floor:.1e} allowed"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end, seed, wrong = time.monotonic() + options.seconds, options.seed, 0
    while time.monotonic() < end:
        found = excess(seed, options.backend)
        if found:
            wrong += 1
            sys.stdout.write(f"seed {seed}: {found}: {make_case(seed)._replace()}\n"[:400] + "\n")
        seed += 1
    sys.stdout.write(f"{seed - options.seed} cases on {options.backend}, {wrong} beyond bounds\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
