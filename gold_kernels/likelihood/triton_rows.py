"""Launcher of token_rows_kernel on rows that end groups; see uld/triton_token_rows.py.

C rows of a chunk, V vocabulary.
"""

from torch import Tensor

from gold_kernels.jsd.triton_rows import FORWARD_KL, JSD, REVERSE_KL
from gold_kernels.triton.launch import row_block
from gold_kernels.triton.lines import BITS
from gold_kernels.uld.triton_token_rows import token_rows_kernel


def end_rows_(
    logits: Tensor,  # (C, V) of the student, unit column stride
    grad_logits: Tensor | None,  # (C, V), overwritten; may be logits; None: no gradient
    ids: Tensor,  # (C,) int64, the token that ends each group
    labels: Tensor,  # (C,) int64; outside the vocabulary: no label
    weights: Tensor,  # (C, 2) float32, contiguous: of the loss, of the label
    log_scales: Tensor | None,  # (C,) float32 of the group's other tokens
    log_p: Tensor,  # (C,) float32 of the group, the teacher's
    values: Tensor,  # (5, C) float32, overwritten, in the order of ChunkLikelihood.value_names
    *,
    beta: float,
    group_temperature: float,
    temperature: float,
    softcap: float | None,
) -> None:
    """Loss of the groups, and its gradient with respect to the logits of the rows that end them."""
    num_rows, vocab_size = logits.shape
    block_v, line, num_warps = row_block(vocab_size, logits.dtype)
    grad = logits if grad_logits is None else grad_logits
    token_rows_kernel[(num_rows,)](
        logits,
        grad,
        ids,
        labels,
        weights,
        values,
        log_p if log_scales is None else log_scales,
        log_p,
        logits.stride(0),
        grad.stride(0),
        values.stride(0),
        vocab_size,
        BITS.value / temperature,
        1.0 if softcap is None else softcap,
        beta,
        1.0 - beta,
        1.0 / group_temperature,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD),
        HAS_ENDS=True,
        HAS_SCALES=log_scales is not None,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
    )
