"""The floors of probabilities and log-softmax, the same for oracles and row functions."""

import torch
from torch import Tensor

# A column masked with -inf has probability 0 and this log-probability where a formula needs a
# finite one. Forward or reverse KL against a column that only the other side masks is then large
# instead of NaN.
LOG_ZERO = -1e6
LOWEST_LOGIT = -1e30  # stands for -inf


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, floored at LOG_ZERO."""
    scaled = (logits / temperature).clamp_min(LOWEST_LOGIT)
    return torch.log_softmax(scaled, dim=-1).clamp_min(LOG_ZERO)
