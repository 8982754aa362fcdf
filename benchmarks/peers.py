"""What fused_linear_jsd is measured against, each as its users call it, and the floor.

N scored rows, V vocabulary, D_s and D_t hidden sizes. An implementation takes a case and beta and
returns a function without arguments whose result is the mean loss over N rows. Packages are
imported when an implementation is first used: one that is not installed, or does not import here,
costs its own rows only.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jsd_pairs import Case
from torch import Tensor

from gold_kernels.engine.products import matmul_

FLOOR_CHUNK = 2048
Prepare = Callable[[Case, float], Callable[[], Tensor]]


def eager_jsd(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    beta: float,
) -> Tensor:  # ()
    """The order of operations of TRL's GOLDTrainer, all of it in the dtype of the inputs: full
    logits, divided by a temperature of 1, log-softmax, kl_div of log-probabilities.
    """
    log_q = F.log_softmax(student_hidden @ student_weight.T / 1.0, dim=-1)
    log_p = F.log_softmax(teacher_hidden @ teacher_weight.T / 1.0, dim=-1)
    kl = partial(F.kl_div, reduction="none", log_target=True)  # kl(log b, log a) is KL(A || B)
    if beta == 0:
        rows = kl(log_q, log_p)
    elif beta == 1:
        rows = kl(log_p, log_q)
    else:
        share = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device)
        parts = torch.stack([log_q + torch.log1p(-share), log_p + share.log()])
        log_m = parts.logsumexp(dim=0)
        rows = share * kl(log_m, log_p) + (1 - share) * kl(log_m, log_q)
    return rows.sum() / student_hidden.shape[0]


def eager(case: Case, beta: float) -> Callable[[], Tensor]:
    return partial(eager_jsd, *case, beta)


def eager_compiled(case: Case, beta: float) -> Callable[[], Tensor]:
    return partial(torch.compile(eager_jsd, dynamic=False), *case, beta)


def trl(case: Case, beta: float) -> Callable[[], Tensor]:
    """The kernel of the stable DistillationTrainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss() -> Tensor:
        student, teacher = (*case[:2], None), (*case[2:], None)  # no biases
        rows, _entropy = ChunkedDivergenceFunction.apply(*student, *teacher, beta)
        return rows.sum() / rows.shape[0]

    return loss


def liger_chunked(case: Case, beta: float, *, is_compiled: bool) -> Callable[[], Tensor]:
    """Liger's loss without cross-entropy, which would be work that nobody else here does."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=is_compiled
    )
    hidden = case.student_hidden
    labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return partial(module, *case, labels)


def liger_triton(case: Case, beta: float) -> Callable[[], Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return partial(LigerFusedLinearJSD(jsd_beta=beta), *case, None)


PEERS: dict[str, Prepare] = {
    "trl": trl,
    "liger": partial(liger_chunked, is_compiled=False),
    "liger_triton": liger_triton,
    "eager": eager,
    "liger_compiled": partial(liger_chunked, is_compiled=True),
    "eager_compiled": eager_compiled,
}
# torch.compile takes seconds for each shape, so these come last and until time is up.
COMPILED = ("liger_compiled", "eager_compiled")
PACKAGES = ("trl", "liger-kernel")


def floor_step(case: Case) -> Callable[[], None]:
    """The GEMMs alone: FLOOR_CHUNK rows at a time, logits in the dtype of the inputs, grad_weight
    summed in float32. Buffers are made once, and nothing is zeroed, cast or returned.
    """
    student_hidden, student_weight, teacher_hidden, teacher_weight = (t.detach() for t in case)
    num_rows, num_entries = student_hidden.shape[0], student_weight.shape[0]
    chunk = min(FLOOR_CHUNK, num_rows)
    student_logits = student_hidden.new_empty(chunk, num_entries)
    teacher_logits = student_hidden.new_empty(chunk, teacher_weight.shape[0])
    grad_hidden = torch.empty_like(student_hidden)
    grad_weight = None
    if case.student_weight.requires_grad:
        grad_weight = torch.zeros_like(student_weight, dtype=torch.float32)

    def step() -> None:
        for start in range(0, num_rows, chunk):
            rows = slice(start, min(start + chunk, num_rows))
            size = rows.stop - rows.start
            matmul_(student_logits[:size], student_hidden[rows], student_weight.T)
            matmul_(teacher_logits[:size], teacher_hidden[rows], teacher_weight.T)
            # logits stand in for their gradient, which has the same shape and dtype
            matmul_(grad_hidden[rows], student_logits[:size], student_weight)
            if grad_weight is not None:
                logits = student_logits[:size]
                matmul_(grad_weight, logits.T, student_hidden[rows], accumulate=True)

    return step
