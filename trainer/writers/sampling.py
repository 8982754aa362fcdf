"""Draws the next tokens of a batch: each row from random numbers of its own.

So a completion depends on its seed alone, not on the rows beside it nor on the number of ranks.
One number u in [0, 1) decides a token: the first whose cumulative probability is above u.

B rows, V entries of the head, R most new tokens of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gold_trainer.writers.writer import Sampling

NEVER = -torch.inf
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
        draws = [torch.rand(room, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.draws = torch.stack(draws).to(device)  # (B, R)
        self.is_banned = torch.zeros(num_entries, dtype=torch.bool)
        self.is_banned[sampling.banned_ids(num_entries)] = True
        self.is_banned = self.is_banned.to(device)
        self.is_seen: Tensor | None = None  # (B, V), with a penalty of repetition alone

    def see(self, input_ids: Tensor, attention_mask: Tensor) -> None:  # (B, L) of the prompts
        """Tokens of prompts count as repeated; padding does not."""
        if self.sampling.repetition_penalty == 1.0:
            return
        shape = len(input_ids), len(self.is_banned) + 1  # the last column takes the padding
        places = input_ids.masked_fill(attention_mask == 0, shape[1] - 1).clamp_max(shape[1] - 1)
        seen = torch.zeros(shape, dtype=torch.bool, device=self.draws.device)
        self.is_seen = seen.scatter_(1, places.to(seen.device), True)[:, :-1].contiguous()

    def keep(self, rows: Tensor) -> None:  # (B',) indices
        """Go on with these rows."""
        self.draws = self.draws[rows]
        self.is_seen = None if self.is_seen is None else self.is_seen[rows]

    def __call__(self, logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:  # draws: (B,)
        logits = self._processed(logits)
        if self.sampling.top_k == 1:
            ids = logits.argmax(-1)
            logprobs = torch.zeros_like(draws)
        else:
            ids, logprobs = draw(logits, draws, self.sampling)
        if self.is_seen is not None:
            self.is_seen.scatter_(1, ids[:, None], True)
        return ids, logprobs

    def _processed(self, logits: Tensor) -> Tensor:
        logits = logits.float().masked_fill(self.is_banned, NEVER)
        penalty = self.sampling.repetition_penalty
        if self.is_seen is not None:
            rarer = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.is_seen, rarer, logits)
        return logits if self.sampling.temperature == 1.0 else logits / self.sampling.temperature


def draw(logits: Tensor, draws: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """ids (B,) and their log-probabilities (B,) of logits (B, V), already divided by the
    temperature, with one number (B,) in [0, 1) a row.
    """
    if sampling.top_k > 0:
        least = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, NEVER)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        probs = probs * (probs >= nucleus_threshold(probs, sampling.top_p))
    if sampling.min_p:
        probs = probs * (probs >= sampling.min_p * probs.amax(-1, keepdim=True))
    sums = probs.cumsum(-1)
    mass = sums[:, -1:]
    # right: the first entry whose sum is above; entries of probability 0 are never the first
    ids = torch.searchsorted(sums, draws[:, None].to(sums) * mass, right=True)
    # rounding may take the product to the sum of all: then the last that has a probability
    ids = torch.minimum(ids, (sums < mass).sum(-1, keepdim=True))
    return ids[:, 0], (probs.gather(1, ids) / mass).log()[:, 0]


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
