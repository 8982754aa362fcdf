"""Hidden states and the head that projects them.

N rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.products import project_


class LinearHead(NamedTuple):
    """Hidden states and the language-model head that projects them; row_index says which rows of
    hidden, each at most once, and in which order.
    """

    hidden: Tensor  # (N, D), with a row_index any number of rows
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    row_index: Tensor | None = None  # (N,) int64

    @property
    def num_rows(self) -> int:  # N
        return (self.hidden if self.row_index is None else self.row_index).shape[0]

    def rows_of(self, rows: slice) -> Tensor:  # (C, D)
        return self.hidden[rows if self.row_index is None else self.row_index[rows]]

    def project_(self, logits: Tensor, rows: slice) -> Tensor:
        """Overwrite logits (C, V) with softcap(logit_scale (hidden W^T + bias)) of some rows."""
        project_(logits, self.rows_of(rows), self.weight)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
            if self.bias is not None:  # a column masked with -inf is now -softcap
                logits.add_(torch.where(self.bias == -torch.inf, self.bias, 0))
        return logits


def first_entries(head: LinearHead, vocab_size: int) -> LinearHead:
    """The head of the first vocab_size entries; the others have probability 0."""
    if vocab_size == head.weight.shape[0]:
        return head
    bias = None if head.bias is None else head.bias[:vocab_size]
    return head._replace(weight=head.weight[:vocab_size], bias=bias)
