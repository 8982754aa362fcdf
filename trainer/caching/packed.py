"""Ids and log-probabilities of a teacher's likeliest tokens in one tensor, as a cache keeps them.

N scored rows, K entries a row, of which k are wanted.
"""

import torch
from torch import Tensor


def pack(ids: Tensor, log_probs: Tensor) -> Tensor:  # (N, K) each -> (N, 2 K) float32
    """Both in one tensor, as a cache keeps them; float32 holds ids up to 2**24."""
    return torch.cat([log_probs.float(), ids.float()], 1)


def unpack(
    rows: Tensor, k: int, num_entries: int | None = None
) -> tuple[Tensor, Tensor]:  # (N, 2 K) -> (N, k) ids, (N, k)
    """The k likeliest of the K that are there, but those that the student does not know: what they
    had goes to all others.
    """
    log_probs, ids = rows.chunk(2, 1)
    ids = ids[:, :k].long()
    if num_entries is not None:
        ids = torch.where(ids < num_entries, ids, -1)
    return ids, log_probs[:, :k].contiguous()
