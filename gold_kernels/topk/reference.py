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
    entries = log_probs(student_logits, temperature).gather(1, teacher_ids.clamp_min(0))
    sides = []
    for side in (entries, teacher_log_probs.to(entries.dtype)):
        probs = torch.where(is_entry, side.exp(), 0)
        rest = (1 - probs.sum(1, keepdim=True)).clamp_min(SMALLEST_REST).log()
        sides.append(torch.cat([torch.where(is_entry, side, LOG_ZERO), rest], 1))
    return generalized_jsd_rows(sides[0], sides[1], beta)
