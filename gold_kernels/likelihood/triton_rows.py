"""token_rows_kernel on rows that end groups; see uld/triton_token_rows.py.

C rows of a chunk, V vocabulary.
"""

from torch import Tensor

from gold_kernels.uld.triton_token_rows import Ends, launch_token_rows_


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
    launch_token_rows_(
        *(logits, grad_logits, ids, labels, weights, values),
        Ends(log_scales, log_p, beta, group_temperature),
        temperature=temperature,
        softcap=softcap,
    )
