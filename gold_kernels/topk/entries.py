"""A teacher's k likeliest tokens, from its hidden states and head.

N rows, C rows of a chunk, k entries a row, D hidden size, V vocabulary. With m the largest logit of
a row, divided by the temperature,

    log p_v = z_v - m - log(1 + sum of exp(z_u - m) over all u but the largest)

so that a teacher who is sure keeps what its likeliest token leaves: 1 - p has its digits although p
is 1.
"""

from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import refuse_slices
from gold_kernels.engine.chunk_plan import Limits, Needs, float_dtype
from gold_kernels.engine.chunking import run_chunks
from gold_kernels.engine.heads import check_head, only_head
from gold_kernels.engine.kinds import is_whole
from gold_kernels.engine.linear_head import first_entries
from gold_kernels.engine.options import resolve_options
from gold_kernels.engine.probabilities import LOG_ZERO


class EntriesOptions(TypedDict, total=False):
    """Options of head_top_k; see LinearOptions. They are the teacher's."""

    teacher_bias: Tensor | None  # (V,)
    vocab_size: int | None
    chunk_size: int | None
    budget_bytes: int
    final_logit_softcapping: float | None
    logit_scale: float


@torch.compiler.disable(reason="head_top_k runs outside the graph: call it before")
@torch.no_grad()
def head_top_k(
    teacher_hidden: Tensor,  # (N, D)
    teacher_weight: Tensor,  # (V, D)
    k: int,
    *,
    temperature: float = 1.0,
    **options: Unpack[EntriesOptions],
) -> tuple[Tensor, Tensor]:  # (N, k) int64 ids, the likeliest first; (N, k) their log-probabilities
    """What fused_linear_top_k takes of a teacher: its k likeliest tokens, in float32 (float64 of
    float64 inputs).

    Shapes: teacher_hidden (N, D), teacher_weight (V, D). Returns ids (N, k) int64, the likeliest
    first, and their log-probabilities (N, k).

    Logits are float32, and made for as many rows at a time as budget_bytes holds: no more than that
    is extra memory beside what is returned. Which of several equal logits is the last of the k is
    left to torch.topk. Raises ValueError for what does not fit, with the remedy.
    """
    function = "head_top_k"
    chosen = resolve_options(function, options, EntriesOptions)
    refuse_slices(function, chosen, teacher_weight=teacher_weight, teacher_hidden=teacher_hidden)
    checks.check_one_temperature(function, temperature)
    teacher = only_head("teacher", teacher_hidden, teacher_weight, chosen)
    teacher = check_head(function, "teacher", teacher)
    chosen = checks.check_options(function, chosen, teacher.hidden)
    size = teacher.weight.shape[0]
    teacher = first_entries(
        teacher, checks.check_vocabulary(function, size, size, chosen.vocab_size)
    )
    _check_number(function, k, teacher.weight.shape[0])
    wide = float_dtype(teacher.hidden)
    log_probs = teacher.hidden.new_empty(teacher.num_rows, k, dtype=wide)
    ids = torch.empty_like(log_probs, dtype=torch.int64)

    def row_function(logits: Tensor, _: None, __: Tensor | None, rows: slice, ___: Tensor) -> None:
        logits.div_(temperature)
        values, found = logits.topk(k, -1)
        largest = values[:, :1].clone()
        logits.sub_(largest).exp_().scatter_(1, found[:, :1], 0)
        log_sum = logits.sum(-1, keepdim=True).log1p_()
        ids[rows] = found
        log_probs[rows] = values.sub_(largest).sub_(log_sum).clamp_min_(LOG_ZERO)

    limits = Limits(chosen.chunk_size, chosen.budget_bytes, row_bytes=16 * k)  # values and ids
    weights = log_probs.new_ones(teacher.num_rows)
    run_chunks(teacher, None, weights, row_function, Needs(False, False, False), limits)
    return ids, log_probs


def _check_number(function: str, k: int, vocab_size: int) -> None:
    if not (is_whole(k) and 1 <= k <= vocab_size):
        raise ValueError(
            f"{function}: k must be a whole number in [1, {vocab_size}], the entries of the "
            f"vocabulary, got {k!r}; 64 is usual, and fused_linear_jsd compares all."
        )
