"""The oracles of every loss under one name: plain torch, any float dtype, gradients by autograd."""

from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, log_probs
from gold_kernels.jsd.reference import head_logits, jsd_rows, linear_jsd, row_metrics
from gold_kernels.likelihood.reference import chunk_likelihood, group_log_likelihoods
from gold_kernels.projection.reference import projected_jsd, projected_jsd_rows
from gold_kernels.topk.reference import top_k_rows
from gold_kernels.uld.reference import (
    generalized_jsd_rows,
    hybrid_rows,
    linear_uld,
    sorted_l1_rows,
    span_rows,
    uld_loss,
    uld_rows,
)

__all__ = [
    "LOG_ZERO",
    "LOWEST_LOGIT",
    "chunk_likelihood",
    "generalized_jsd_rows",
    "group_log_likelihoods",
    "head_logits",
    "hybrid_rows",
    "jsd_rows",
    "linear_jsd",
    "linear_uld",
    "log_probs",
    "projected_jsd",
    "projected_jsd_rows",
    "row_metrics",
    "sorted_l1_rows",
    "span_rows",
    "top_k_rows",
    "uld_loss",
    "uld_rows",
]
