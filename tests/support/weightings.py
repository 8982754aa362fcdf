"""Functions of token_weighting that a command line names."""

from torch import Tensor

from gold_trainer import ScoredTokens

UNUSABLE = 3


def unsure(tokens: ScoredTokens) -> Tensor:  # (N,)
    """Of the teacher's log-probabilities."""
    return 1 - tokens.teacher_log_probs()


def graded(tokens: ScoredTokens, most: float = 3.0) -> Tensor:  # (N,)
    """Of places and ids alone."""
    return (1 + tokens.positions).clamp_max(most) + (tokens.ids % 2)
