"""The oracle of the loss of a teacher's top k: plain torch, any float dtype.

N scored rows, k entries a row, V vocabulary. P teacher, Q student.
"""

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, SMALLEST_REST, log_probs
from gold_kernels.uld.reference import generalized_jsd_rows


def top_k_rows(
    student_logits: Tensor,  # (N, V)
    teacher_ids: Tensor,  # (N, k) int64; negative for none
    teacher_log_probs: Tensor,  # (N, k)
    *,
    beta: float = 0.0,
    temperature: float = 1.0,  # of the student
) -> Tensor:  # (N,)
    """Generalized JSD of k + 1 outcomes: each entry, and any other."""
    is_entry = teacher_ids >= 0
    log_q = log_probs(student_logits, temperature)
    entries = torch.where(is_entry, teacher_ids, log_q.shape[1])  # a column more for none
    is_other = torch.ones_like(torch.nn.functional.pad(log_q, (0, 1))).scatter(1, entries, 0)
    student = log_q.gather(1, teacher_ids.clamp_min(0))
    teacher = torch.where(is_entry, teacher_log_probs.to(log_q.dtype), LOG_ZERO)
    rests = (log_q.exp() * is_other[:, :-1]).sum(1), 1 - teacher.exp().sum(1)
    sides = [
        torch.cat(
            [torch.where(is_entry, side, LOG_ZERO), rest.clamp_min(SMALLEST_REST).log()[:, None]], 1
        )
        for side, rest in zip((student, teacher), rests, strict=True)
    ]
    return generalized_jsd_rows(sides[0], sides[1], beta)
