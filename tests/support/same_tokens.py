"""Two tokenizers with the same tokens: each token is a group, each entry is projected to itself."""

import torch
from torch import Tensor

from gold_kernels import TokenAlignment, VocabProjection
from gold_kernels.tokens.alignment import SpanGroups


def same_tokens(
    ids: Tensor,  # (N,) of both sides
) -> TokenAlignment:
    rows = torch.arange(len(ids))
    return TokenAlignment.from_groups(SpanGroups(rows, rows, len(ids), 9), ids, ids, 9)


def same_projection(v_student: int, v_teacher: int | None = None) -> VocabProjection:
    """With v_teacher: onto the first of so many entries."""
    columns = torch.arange(v_student).unsqueeze(1)
    return VocabProjection.from_entries(columns, torch.ones(v_student, 1), v_teacher or v_student)
