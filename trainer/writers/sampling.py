"""Draws the next tokens of a batch: each row from random numbers of its own.

So a completion depends on its seed alone, not on the rows beside it nor on the number of ranks. A
token is drawn with Gumbel's trick: the largest of log p - log E, E exponential. What decides is one
comparison, which the rounding of another batch seldom turns. E is a hash of two keys of the row and
step, and of the entry: the same on every device.

B rows, V entries of the head, R most new tokens of a row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gold_kernels.triton.launch import default_backend
from gold_trainer.speed.on_host import sent
from gold_trainer.writers.writer import Sampling

NEVER = -torch.inf
KEYS = -(2**31), 2**31
HASH = 0x9E3779B1 - 2**32, 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32  # odd, as int32
FLOAT_BITS = 31  # of a float32 that is not negative: their order is that of the numbers


class Sampler:
    """logits (B, V) -> token ids (B,) and their log-probabilities (B,), under the distribution
    that they are drawn from. In the order of transformers: bans, penalty, temperature, top_k,
    top_p, min_p. Of tokens that are equally probable top_p keeps all or none.
    """

    def __init__(
        self,
        sampling: Sampling,
        seeds: Sequence[int],  # of each row
        room: int,  # R
        num_entries: int,  # V
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = [torch.randint(*KEYS, (room, 2), generator=g) for g in generators]
        self.keys = sent(torch.stack(draws).to(torch.int32), device)  # (B, R, 2)
        is_banned = sent(sampling.is_banned(num_entries), device)
        self.bans = torch.zeros(num_entries, device=device).masked_fill(is_banned, NEVER)
        self.is_seen: Tensor | None = None  # (B, V), with a penalty of repetition alone

    def see(self, start: int, input_ids: Tensor, attention_mask: Tensor) -> None:  # (B', L)
        """Tokens of the prompts of rows from start on count as repeated; padding does not."""
        if self.sampling.repetition_penalty == 1.0:
            return
        num_entries = len(self.bans)
        if self.is_seen is None:
            shape = len(self.keys), num_entries
            self.is_seen = torch.zeros(shape, dtype=torch.bool, device=self.keys.device)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True), start):
            ids = ids[mask.bool()]
            self.is_seen[row, ids[ids < num_entries]] = True  # a placeholder may have no row

    def keep(self, rows: Tensor) -> None:  # (B',) indices
        """Go on with these rows."""
        self.keys = self.keys[rows]
        self.is_seen = None if self.is_seen is None else self.is_seen[rows]

    def __call__(self, logits: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """count (1,): how many tokens each row has."""
        logits, keys = self._processed(logits), self.keys.index_select(1, count)[:, 0]
        if self.sampling.top_k == 1:
            ids = logits.argmax(-1)
            logprobs = torch.zeros_like(logits[:, 0])
        else:
            ids, logprobs = draw(logits, keys, self.sampling)
        if self.is_seen is not None:
            self.is_seen.scatter_(1, ids[:, None], True)
        return ids, logprobs

    def _processed(self, logits: Tensor) -> Tensor:
        logits = (self.bans + logits).float()  # one pass for both
        penalty = self.sampling.repetition_penalty
        if self.is_seen is not None:
            rarer = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.is_seen, rarer, logits)
        return logits if self.sampling.temperature == 1.0 else logits / self.sampling.temperature


def draw(logits: Tensor, keys: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """ids (B,) and their log-probabilities (B,) of logits (B, V), already divided by the
    temperature, with two keys (B, 2) a row.
    """
    if default_backend(logits) == "triton":
        from gold_trainer.writers.sampling_kernel import draw_rows

        return draw_rows(without_unlikely(logits, sampling.top_k), keys, sampling)
    logits = filtered(logits, sampling)
    ids = (logits - exponential(keys, logits.shape[1]).log()).argmax(-1)
    return ids, logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def without_unlikely(logits: Tensor, top_k: int) -> Tensor:  # (B, V)
    if top_k == 0:
        return logits
    least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < least, NEVER)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:  # (B, V)
    """What top_k, top_p and min_p leave of them."""
    logits = without_unlikely(logits, sampling.top_k)
    if sampling.top_p < 1:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < nucleus_threshold(probs, sampling.top_p), NEVER)
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, NEVER)
    return logits


def logprobs_of(
    logits: Tensor,  # (B, V) of a model
    ids: Tensor,  # (B,) that were sampled
    sampling: Sampling,  # without a penalty of repetition
    is_banned: Tensor,  # (V,)
) -> Tensor:  # (B,)
    """Log-probabilities of tokens that are known; a nucleus that differs by rounding does not leave
    them out.
    """
    logits = logits.float().masked_fill(is_banned, NEVER) / sampling.temperature
    own = logits.gather(1, ids[:, None])
    kept = filtered(logits, sampling).scatter(1, ids[:, None], own)
    return own[:, 0] - kept.logsumexp(-1)


def exponential(keys: Tensor, num_entries: int) -> Tensor:  # (B, 2), int32 -> (B, V)
    """Numbers of the exponential distribution: two rounds of MurmurHash3's last step."""
    x = torch.arange(num_entries, dtype=torch.int32, device=keys.device)
    for key in keys.split(1, dim=1):
        x = (x + key) * HASH[0]  # wraps around, as it should
        x = (x ^ ((x >> 16) & 0xFFFF)) * HASH[1]
        x = (x ^ ((x >> 13) & 0x7FFFF)) * HASH[2]
        x = x ^ ((x >> 16) & 0xFFFF)
    uniform = ((x & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log1p(-uniform)


def nucleus_threshold(probs: Tensor, top_p: float) -> Tensor:  # (B, V) -> (B, 1)
    """The largest t for which entries of at least t have a mass of at least top_p: the smallest
    set of likely tokens. Found by bisection of the bits, which takes no sort.
    """
    low = torch.zeros(len(probs), 1, dtype=torch.int32, device=probs.device)
    bits = probs.contiguous().view(torch.int32)
    for bit in range(FLOAT_BITS - 1, -1, -1):
        middle = low + (1 << bit)
        mass = torch.where(bits >= middle, probs, 0).sum(-1, keepdim=True)
        low = torch.where(mass >= top_p, middle, low)
    return low.view(torch.float32)
