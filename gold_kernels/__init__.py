"""Fused losses for knowledge distillation: language-model heads and divergence without full logits
materialised.
"""

from gold_kernels.engine.memory import peak_extra_bytes
from gold_kernels.jsd.linear import FusedLinearJSDLoss, JSDMetrics, fused_linear_jsd
from gold_kernels.jsd.logits import jsd_loss
from gold_kernels.tokens.alignment import CompletionAligner, TokenAlignment
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.uld.linear import FusedLinearULDLoss, ULDMetrics, fused_linear_uld
from gold_kernels.uld.logits import uld_loss

__version__ = "0.2.0"

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
