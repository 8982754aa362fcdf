"""Losses of two tokenizers beside ULD: time, peak memory and error; eager torch and the GEMMs.

    python benchmarks/bench_cross.py           # on a GPU; a row of CSV per case
    python benchmarks/bench_cross.py --tiny    # the same code on small shapes, on a CPU, no record

Loss and gradients of student_hidden and student_weight, bfloat16, beta = 0. N rows of either side,
vocabularies V_s and V_t, hidden sizes D_s and D_t. Each loss has an eager_ row, in bfloat16 but for
the product with a sparse matrix, which torch has in float32.

chunk_likelihood: of ten tokens a side, in nine groups, three are in groups of several tokens on
some side. projected_jsd: six of ten entries of the student have one partner, the others two to four
pieces, half of them among the 256 first entries of the teacher. h_kl: the hybrid loss with the
relaxed overlap of that projection; its row is the row of the hybrid with as many pairs.

Each of ours is checked against float64 before it is timed: the first two on eight rows that are
repeated (projected_jsd, h_kl) or on all rows (chunk_likelihood). A row whose loss is off by more
than MAX_LOSS_ERROR, or a gradient by more than MAX_GRAD_ERROR, gets no time, and the run ends with
1. Gradients are rounded to bfloat16; those of h_kl are counted, see bench_uld.py.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_uld import FIELDS as ULD_FIELDS
from bench_uld import add_row, measure_all, parse_options, time_of
from jsd_pairs import Case
from peers import floor_step
from record import RESULTS, RowLog
from timing import release
from torch import Tensor
from uld_pairs import Shape, random_case, with_logits

from gold_kernels import (
    TokenAlignment,
    VocabOverlap,
    VocabProjection,
    fused_linear_chunk_likelihood,
    fused_linear_projected_jsd,
    fused_linear_uld,
    reference,
)
from gold_kernels.tokens.alignment import SpanGroups

SHAPES = ("4096x65536x151936x2048x4096",)
TINY_SHAPES = ("40x300x500x16x24",)
OURS = ("chunk_likelihood", "projected_jsd", "h_kl")
IMPLEMENTATIONS = ("floor", *(name for ours in OURS for name in (ours, f"eager_{ours}")))
MAX_LOSS_ERROR, MAX_GRAD_ERROR = 2e-3, 2e-2
ERRORS = ("loss_error", "grad_hidden_error", "grad_weight_error")
FIELDS = [*(name for name in ULD_FIELDS if not name.endswith(("_error", "top64")))]
FIELDS[FIELDS.index("device") : FIELDS.index("device")] = ERRORS
STUDENT_GROUPS, TEACHER_GROUPS = [0, 1, 2, 3, 4, 5, 6, 7, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]


class Inputs(NamedTuple):
    case: Case
    alignment: TokenAlignment
    projection: VocabProjection
    overlap: VocabOverlap  # relaxed


def make_inputs(shape: Shape, seed: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    case, cpu = random_case(shape, generator), torch.Generator().manual_seed(seed)
    tens, rest = divmod(shape.n, 10)  # the rest is in no group
    repeats = 9 * torch.arange(tens).repeat_interleave(10)
    groups = [
        torch.cat([repeats + torch.tensor(side).repeat(tens), torch.full((rest,), -1)])
        for side in (STUDENT_GROUPS, TEACHER_GROUPS)
    ]
    ids = [torch.randint(size, (shape.n,), generator=cpu) for size in shape[1:3]]
    spans = SpanGroups(*groups, 9 * tens, shape.n)
    alignment = TokenAlignment.from_groups(spans, *ids, shape.n).to(device)
    num_matched = 6 * shape.v_s // 10
    partners = torch.randperm(shape.v_t, generator=cpu)[: shape.v_s]
    columns = torch.randint(shape.v_t, (shape.v_s, 4), generator=cpu)
    is_frequent = torch.rand(shape.v_s, 4, generator=cpu) < 0.5
    columns = torch.where(is_frequent, columns % 256, columns)
    sizes = torch.randint(2, 5, (shape.v_s, 1), generator=cpu)
    sizes[:num_matched] = 1
    columns[:num_matched, 0] = partners[:num_matched]
    is_piece = torch.arange(4) < sizes
    weights = torch.where(is_piece, 0.1 ** torch.arange(4), 0)
    weights = weights / weights.sum(1, keepdim=True)
    columns = torch.where(is_piece, columns, -1)
    projection = VocabProjection.from_entries(columns, weights, shape.v_t)
    matched = torch.arange(num_matched), partners[:num_matched]
    overlap = projection.relaxed_overlap(VocabOverlap(*matched, shape.v_s, shape.v_t))
    return Inputs(case, alignment, projection.to(device), overlap.to(device))


def dense_projection(q: Tensor, projection: VocabProjection) -> Tensor:  # (R, V_s) -> (R, V_t)
    """Q W by plain indexing."""
    columns, weights = projection.columns.to(q.device), projection.weights.to(q.device, q.dtype)
    out = q.new_zeros(q.shape[0], projection.teacher_vocab_size)
    for piece in range(columns.shape[1]):
        out = out.index_add(1, columns[:, piece].clamp_min(0), q * weights[:, piece])
    return out


def sparse_matrix(projection: VocabProjection) -> Tensor:  # (V_t, V_s), CSR, float32
    rows, pieces = (projection.columns >= 0).nonzero().unbind(1)
    index = torch.stack([projection.columns[rows, pieces], rows])
    sizes = projection.teacher_vocab_size, projection.student_vocab_size
    values = projection.weights[rows, pieces]
    matrix = torch.sparse_coo_tensor(index, values, sizes, check_invariants=True).coalesce()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = matrix.to_sparse_csr()
    return matrix.to(projection.folds.ids.device)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of sub-distributions, summed over entries."""
    return (log_p.exp() * (log_p - log_q) + log_q.exp() - log_p.exp()).sum(-1)


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    student, weight, teacher, teacher_weight = case
    return student @ weight.T, teacher @ teacher_weight.T


def eager_chunk(inputs: Inputs, case: Case) -> Tensor:
    return reference.chunk_likelihood(*logits_of(case), inputs.alignment)


def eager_projected(inputs: Inputs, case: Case, matrix: Tensor | None = None) -> Tensor:
    """Loss with a sparse matrix as others multiply by it, else in the dtype of the case."""
    student, teacher = logits_of(case)
    q, log_p = student.softmax(-1), teacher.log_softmax(-1)
    if matrix is None:
        projected = dense_projection(q, inputs.projection)
    else:
        projected = torch.sparse.mm(matrix, q.float().T).T.to(log_p.dtype)
    reached = inputs.projection.folds.teacher_ids.long()
    log_q = projected[:, reached].clamp_min(1e-30).log()
    return kl(log_p[:, reached], log_q).mean()


def eager_hybrid(inputs: Inputs, case: Case) -> Tensor:
    log_q, log_p = (side.log_softmax(-1) for side in logits_of(case))
    overlap = inputs.overlap
    share = overlap.student_share
    options = {"matched_weight": share, "unmatched_weight": 1 - share}
    return reference.hybrid_rows(log_q, log_p, overlap, beta=0.0, **options).mean()


def loss_of(name: str, inputs: Inputs, case: Case) -> Callable[[], Tensor]:
    if name == "chunk_likelihood":
        return partial(fused_linear_chunk_likelihood, *case, inputs.alignment)
    if name == "projected_jsd":
        return partial(fused_linear_projected_jsd, *case, inputs.projection)
    if name == "h_kl":
        return partial(fused_linear_uld, *case, overlap=inputs.overlap, beta=0.0)
    if name == "eager_chunk_likelihood":
        return partial(eager_chunk, inputs, case)
    if name == "eager_projected_jsd":
        return partial(eager_projected, inputs, case, sparse_matrix(inputs.projection))
    return partial(eager_hybrid, inputs, case)


def errors(name: str, inputs: Inputs) -> list[float]:
    """Relative errors of loss and gradients against float64."""
    eager = {"chunk_likelihood": eager_chunk, "projected_jsd": eager_projected}
    case = inputs.case if name == "chunk_likelihood" else with_logits(inputs.case).case
    few = case
    if name != "chunk_likelihood":  # a mean over repeated rows: eight of them are enough
        few = case._replace(
            student_hidden=case.student_hidden[:8], teacher_hidden=case.teacher_hidden[:8]
        )
    wide = few._replace(
        **{field: tensor.detach().double() for field, tensor in few._asdict().items()}
    )
    leaves = [leaf.requires_grad_() for leaf in wide[:2]]
    truth = eager.get(name, eager_hybrid)(inputs, wide)
    expected = [truth.detach(), *torch.autograd.grad(truth, leaves)]
    loss = loss_of(name, inputs, case)()
    actual = [loss, *torch.autograd.grad(loss, case.leaves())]
    copies = case.student_hidden.shape[0] // few.student_hidden.shape[0]
    actual[1] = actual[1][: few.student_hidden.shape[0]] * copies
    return [
        float((ours.detach().double() - exact).norm() / exact.norm())
        for ours, exact in zip(actual, expected, strict=True)
    ]


def measure(name: str, inputs: Inputs, rep_ms: float) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    device = inputs.case.student_hidden.device.type
    try:
        if name in OURS:
            found = errors(name, inputs)
            columns = {field: f"{error:.2e}" for field, error in zip(ERRORS, found, strict=True)}
            limits = MAX_LOSS_ERROR, MAX_GRAD_ERROR, MAX_GRAD_ERROR
            if not all(error <= limit for error, limit in zip(found, limits, strict=True)):
                return columns | {"status": "refused: an error exceeds its limit"}
            release(device)
        step: Callable[[], Any] = floor_step(inputs.case)
        if name != "floor":
            loss, leaves = loss_of(name, inputs, inputs.case), inputs.case.leaves()
            step = lambda: torch.autograd.grad(loss(), leaves)  # noqa: E731
        returned = sum(leaf.nbytes for leaf in inputs.case.leaves())
        columns |= time_of(step, device, rep_ms, None if name == "floor" else returned)
    except torch.OutOfMemoryError:
        columns["status"] = "out of memory"
    return columns


def run_shape(
    shape: Shape, seed: int, options: argparse.Namespace, device: str, log: RowLog
) -> None:
    inputs, floor = make_inputs(shape, seed, device), 0.0
    for name in options.only:
        columns = measure(name, inputs, options.rep_ms)
        if name == "floor" and columns["status"] == "ok":
            floor = float(columns["median_ms"])
        add_row(name, shape, columns | options.environment, floor, log, ERRORS)
        release(device)


def main(arguments: list[str] | None = None) -> int:
    description, out = __doc__.splitlines()[0], RESULTS / "cross.csv"
    options = parse_options(arguments, description, IMPLEMENTATIONS, SHAPES, TINY_SHAPES, out)
    return measure_all(options, FIELDS, run_shape)


if __name__ == "__main__":
    sys.exit(main())
