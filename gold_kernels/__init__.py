"""Fused distillation losses: language-model heads and divergence in one call, full logits never
materialised.
"""

from gold_kernels.linear_jsd import FusedLinearJSDLoss, JSDMetrics, fused_linear_jsd
from gold_kernels.logits_jsd import jsd_loss
from gold_kernels.memory import peak_extra_bytes

__all__ = ["FusedLinearJSDLoss", "JSDMetrics", "fused_linear_jsd", "jsd_loss", "peak_extra_bytes"]
