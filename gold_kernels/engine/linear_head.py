"""Hidden states and the head that projects them.

N rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.products import project_
from gold_kernels.engine.slices import Slices


class LinearHead(NamedTuple):
    """Hidden states and the language-model head that projects them; row_index says which rows of
    hidden, each at most once, and in which order. With slices the weight has the entries of this
    process' slice alone.
    """

    hidden: Tensor  # (N, D), with a row_index any number of rows
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    row_index: Tensor | None = None  # (N,) int64
    slices: Slices | None = None  # over the processes of a group

    @property
    def vocab_size(self) -> int:  # V, of all processes
        return self.weight.shape[0] if self.slices is None else self.slices.total

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
        if self.bias is not None and (self.softcap is not None or self.logit_scale < 0):
            # a column masked with -inf is -softcap, or +inf, by now
            logits.masked_fill_(self.bias == -torch.inf, -torch.inf)
        return logits


def first_entries(head: LinearHead, vocab_size: int) -> LinearHead:
    """The head of the first vocab_size entries; the others have probability 0."""
    if vocab_size == head.vocab_size:
        return head
    if head.slices is not None:
        slices = head.slices.of_first(vocab_size)
        head, vocab_size = head._replace(slices=slices), slices.sizes[slices.rank]
    bias = None if head.bias is None else head.bias[:vocab_size]
    return head._replace(weight=head.weight[:vocab_size], bias=bias)
