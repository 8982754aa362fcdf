"""Random logits and hand-made overlaps for the tests of the ULD oracle."""

import torch
from torch import Tensor

from gold_kernels.tokens.vocabulary import VocabOverlap


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def log_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def overlap(student_ids: list[int], teacher_ids: list[int], *sizes: int) -> VocabOverlap:
    ids = (torch.tensor(side, dtype=torch.int64) for side in (student_ids, teacher_ids))
    return VocabOverlap(*ids, *sizes)
