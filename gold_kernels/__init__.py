"""Fused losses for knowledge distillation: language-model heads and divergence without full logits
materialised.
"""

from gold_kernels.alignment import CompletionAligner, TokenAlignment
from gold_kernels.linear_jsd import FusedLinearJSDLoss, JSDMetrics, fused_linear_jsd
from gold_kernels.linear_uld import FusedLinearULDLoss, ULDMetrics, fused_linear_uld
from gold_kernels.logits_jsd import jsd_loss
from gold_kernels.logits_uld import uld_loss
from gold_kernels.memory import peak_extra_bytes
from gold_kernels.vocabulary import VocabOverlap

__all__ = [
    "CompletionAligner",
    "FusedLinearJSDLoss",
    "FusedLinearULDLoss",
    "JSDMetrics",
    "TokenAlignment",
    "ULDMetrics",
    "VocabOverlap",
    "fused_linear_jsd",
    "fused_linear_uld",
    "jsd_loss",
    "peak_extra_bytes",
    "uld_loss",
]
