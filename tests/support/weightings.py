"""Functions of token_weighting that a command line names."""

import torch
from torch import Tensor

from gold_trainer import ScoredTokens

UNUSABLE = 3


def unsure(tokens: ScoredTokens) -> Tensor:  # (N,)
    """A weight of the teacher's log-probabilities."""
    return 1 - tokens.teacher_log_probs()


def graded(tokens: ScoredTokens, most: float = 3.0) -> Tensor:  # (N,)
    """A weight of places and ids alone."""
    return (1 + tokens.positions).clamp_max(most) + (tokens.ids % 2)


def by_gap(tokens: ScoredTokens, power: float = 1.0) -> Tensor:  # (N,)
    """A weight of everything that a function may ask for."""
    gap = (tokens.teacher_log_probs() - tokens.student_log_probs()).abs()
    even = torch.where(tokens.completions % 2 == 0, 1.0, 0.25)
    return (tokens.positions % 3 + 1) * gap**power * even + (tokens.ids == tokens.ids[0])


def found_later(tokens: ScoredTokens, row: int) -> Tensor:  # (N,)
    """As a device tells of weights that cannot be, here of those of a row."""
    tokens.batch.bad_weights = torch.tensor(row in tokens.rows)
    return torch.ones_like(tokens.ids)
