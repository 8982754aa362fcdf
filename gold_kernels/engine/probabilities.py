"""The floors of probabilities and log-softmax, the same for oracles and row functions."""

import torch
from torch import Tensor

# A column masked with -inf has probability 0 and this log-probability where a formula needs a
# finite one. Forward or reverse KL against a column that only the other side masks is then large
# instead of NaN.
LOG_ZERO = -1e6
LOWEST_LOGIT = -1e30  # stands for -inf
SMALLEST_REST = 1e-18  # least 1 - p of a token, where p rounds to 1


def kl_entries(first: Tensor, second: Tensor, log_ratio: Tensor) -> Tensor:
    """first log(first / second) + (second - first) of every entry, log_ratio = log(first / second).

    Summed over two distributions that is KL(first || second), since the differences sum to 0. No
    entry is negative. Near convergence it is taken from the ratio alone, as first (r + exp(-r) - 1)
    in powers of r: differences of probabilities would have lost it to rounding.
    """
    is_near = log_ratio.abs() < 0.25
    r = torch.where(is_near, log_ratio, 0)
    if r.dtype == torch.float64:  # has digits enough for the difference
        excess = r + torch.expm1(-r)
    else:
        series = 1 / 24 - r * (1 / 120 - r * (1 / 720 - r / 5040))
        excess = r * r * (1 / 2 - r * (1 / 6 - r * series))
    return torch.where(is_near, first * excess, first * log_ratio + (second - first))


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, floored at LOG_ZERO."""
    scaled = (logits / temperature).clamp_min(LOWEST_LOGIT)
    return torch.log_softmax(scaled, dim=-1).clamp_min(LOG_ZERO)
