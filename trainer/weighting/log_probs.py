"""Log-probabilities of the tokens that stand in a completion, without all logits at once.

N scored rows of a side, C rows of a chunk, D hidden size, V entries of its head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gold_trainer.logit_form import LogitForm
from gold_trainer.models import Head, whole

CHUNK_BYTES = 256 << 20  # of a chunk's logits in float32


class ScoredSide(NamedTuple):
    """Hidden states of one side at its scored rows, and what makes logits of them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    form: LogitForm
    num_entries: int | None  # that take part; None: all

    @classmethod
    def of(
        cls, hidden: Tensor, head: Head, form: LogitForm, num_entries: int | None
    ) -> "ScoredSide":
        """The head is asked for here, once: of one in parts all processes gather it."""
        weight, bias = whole(head.weight), head.bias
        return cls(hidden, weight, None if bias is None else whole(bias), form, num_entries)

    @torch.no_grad()
    def log_probs(self, rows: Tensor, ids: Tensor) -> Tensor:  # (n,), (n,) int64 -> (n,)
        """log p(ids[i] | rows[i]) at temperature 1, in float32 (float64 of float64 models)."""
        size = max(1, CHUNK_BYTES // (4 * self.weight.shape[0]))
        parts = [self._chunk(*part) for part in zip(rows.split(size), ids.split(size), strict=True)]
        return torch.cat(parts)

    def _chunk(self, rows: Tensor, ids: Tensor) -> Tensor:  # (C,), (C,) -> (C,)
        hidden = self.hidden[rows].to(self.weight.dtype)
        logits = functional.linear(hidden, self.weight, self.bias)
        logits = self.form(logits if logits.dtype == torch.float64 else logits.float())
        own = logits.gather(1, ids.clamp_max(logits.shape[1] - 1)[:, None])[:, 0]
        return own - logits[:, : self.num_entries].logsumexp(1)
