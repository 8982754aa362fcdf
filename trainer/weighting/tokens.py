"""What a function of token_weighting sees of a micro-batch.

N scored tokens of the student (N_t of the teacher), B completions, G aligned groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gold_kernels import TokenAlignment
from gold_trainer.batches import MicroBatch
from gold_trainer.speed.on_host import sent
from gold_trainer.weighting.log_probs import ScoredSide


@dataclass(frozen=True)
class ScoredTokens:
    """The student's N scored tokens of a micro-batch, one completion behind the other.

    Tensors are on the device, and without a gradient. Log-probabilities are computed when they are
    asked for: each costs a product with the head.
    """

    batch: MicroBatch
    tokenizer: PreTrainedTokenizerBase  # the student's
    student: ScoredSide
    teacher: ScoredSide | None  # None: a cache has no hidden states of it

    @property
    def ids(self) -> Tensor:  # (N,) int64
        return self.batch.student.labels

    @property
    def rows(self) -> list[int]:  # B
        """The dataset's row of each completion."""
        return [example.index for example in self.batch.student.examples]

    @property
    def is_on_policy(self) -> bool:
        """Whether the student wrote the completions."""
        return self.batch.is_on_policy

    @property
    def lengths(self) -> list[int]:  # B
        """Tokens of each completion."""
        return [len(example.written_ids) for example in self.batch.student.examples]

    @cached_property
    def completions(self) -> Tensor:  # (N,) int64 in [0, B)
        """The completion of the micro-batch to which each token belongs."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return self.to_device(torch.arange(len(lengths)).repeat_interleave(lengths))

    @cached_property
    def positions(self) -> Tensor:  # (N,) int64
        """A token's place in its completion, from 0."""
        places = [torch.arange(length) for length in self.lengths]
        return self.to_device(torch.cat(places or [torch.empty(0, dtype=torch.int64)]))

    @cached_property
    def is_compared(self) -> Tensor:  # (N,) bool
        """Whether the loss compares the token with the teacher: with two tokenizers those in a
        group. The weight of another changes nothing.
        """
        if self.groups is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return group_of_tokens(self.groups) >= 0

    @property
    def groups(self) -> TokenAlignment | None:
        """How the tokens meet those of the teacher; None with one tokenizer."""
        return None if self.batch.alignment is None else self.batch.alignment.groups

    def student_log_probs(self) -> Tensor:  # (N,)
        """log q of each token at temperature 1."""
        rows = torch.arange(self.ids.shape[0], device=self.ids.device)
        return self.student.log_probs(rows, self.ids)

    def teacher_log_probs(self) -> Tensor:  # (N,)
        """log p of each token at temperature 1. With two tokenizers: of a group that of its bytes
        in the teacher's tokens, shared evenly by its tokens; 0 of a token in no group.
        """
        return self._of_teacher(self._known_teacher())

    def teacher_log_probs_without_detail(self) -> Tensor:  # (N,)
        """Those of a teacher that sees pictures without detail, for picture_detail."""
        teacher, hidden = self._known_teacher(), self.batch.hidden_without_detail
        return self._of_teacher(teacher if hidden is None else teacher._replace(hidden=hidden))

    def to_device(self, tensor: Tensor) -> Tensor:
        """Move a tensor from the host, without waiting for the device."""
        return sent(tensor, self.ids.device)

    def _known_teacher(self) -> ScoredSide:
        if self.teacher is None:
            raise ValueError(
                "token_weighting: the teacher's log-probabilities must be known, got a "
                "teacher_cache of head_means or top_k, or a server's loss_top_k tokens, which have "
                "not those of all tokens; make a cache of teacher_cache_form=hidden, or weigh "
                "tokens without them."
            )
        return self.teacher

    def _of_teacher(self, side: ScoredSide) -> Tensor:
        if self.groups is None:
            rows = torch.arange(self.ids.shape[0], device=self.ids.device)
            return side.log_probs(rows, self.ids)
        base_rows, base_ids, rows, ids, owners = self.groups.sides[1]
        values = side.log_probs(torch.cat([base_rows, rows]), torch.cat([base_ids, ids]))
        of_bases, of_scalars = values.split([base_rows.shape[0], rows.shape[0]])
        return shared_by_tokens(self.groups, of_bases.index_add(0, owners, of_scalars))


Function = Callable[..., Tensor]  # of ScoredTokens and token_weighting_kwargs -> (N,)


def group_of_tokens(groups: TokenAlignment) -> Tensor:  # (N,) int64; -1 of a token in no group
    base_rows, _, rows, _, owners = groups.sides[0]
    result = base_rows.new_full((groups.num_student_rows,), -1)
    result[base_rows] = torch.arange(groups.num_groups, device=base_rows.device)
    result[rows] = owners
    return result


def tokens_of_groups(groups: TokenAlignment, dtype: torch.dtype) -> Tensor:  # (G,)
    """How many of the student's tokens each has."""
    base_rows, _, _, _, owners = groups.sides[0]
    ones = torch.ones_like(base_rows, dtype=dtype)
    return ones.index_add(0, owners, torch.ones_like(owners, dtype=dtype))


def shared_by_tokens(groups: TokenAlignment, values: Tensor) -> Tensor:  # (G,) -> (N,)
    """A group's value in even parts to its tokens; 0 for tokens in no group."""
    owner = group_of_tokens(groups)
    if not groups.num_groups:
        return values.new_zeros(owner.shape[0])
    shares = values / tokens_of_groups(groups, values.dtype)
    return torch.where(owner >= 0, shares[owner.clamp_min(0)], 0)


def means_of_groups(groups: TokenAlignment, values: Tensor) -> Tensor:  # (N,) -> (G,)
    """The mean over the tokens of each group."""
    base_rows, _, rows, _, owners = groups.sides[0]
    sums = values[base_rows].index_add(0, owners, values[rows])
    return sums / tokens_of_groups(groups, values.dtype)
