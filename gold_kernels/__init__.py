"""Fused losses for knowledge distillation: language-model heads and divergence without full logits
materialised.
"""

from gold_kernels.engine.memory import peak_extra_bytes
from gold_kernels.engine.row_loss import RowLoss
from gold_kernels.engine.shared import FusedLinearLoss, fused_linear_loss
from gold_kernels.jsd.liger import FusedLinearJSDLoss
from gold_kernels.jsd.linear import JSDMetrics, fused_linear_jsd, jsd_loss
from gold_kernels.likelihood.linear import LikelihoodMetrics, fused_linear_chunk_likelihood
from gold_kernels.means.linear import fused_linear_mean_kl, head_means
from gold_kernels.means.row_loss import HeadMeans
from gold_kernels.projection.linear import ProjectedMetrics, fused_linear_projected_jsd
from gold_kernels.tokens.alignment import CompletionAligner, TokenAlignment
from gold_kernels.tokens.projection import VocabProjection
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.topk.entries import head_top_k
from gold_kernels.topk.linear import fused_linear_top_k
from gold_kernels.uld.linear import FusedLinearULDLoss, ULDMetrics, fused_linear_uld, uld_loss

__version__ = "0.2.0"

__all__ = [
    "CompletionAligner",
    "FusedLinearJSDLoss",
    "FusedLinearLoss",
    "FusedLinearULDLoss",
    "HeadMeans",
    "JSDMetrics",
    "LikelihoodMetrics",
    "ProjectedMetrics",
    "RowLoss",
    "TokenAlignment",
    "ULDMetrics",
    "VocabOverlap",
    "VocabProjection",
    "fused_linear_chunk_likelihood",
    "fused_linear_jsd",
    "fused_linear_loss",
    "fused_linear_mean_kl",
    "fused_linear_projected_jsd",
    "fused_linear_top_k",
    "fused_linear_uld",
    "head_means",
    "head_top_k",
    "jsd_loss",
    "peak_extra_bytes",
    "uld_loss",
]
