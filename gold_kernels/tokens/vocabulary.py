"""Which vocabulary entries of a student and a teacher are the same, by bytes and by role.

V_s, V_t entries of the tokenizers, K matched entries.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels.tokens.arguments import check_tables, is_whole
from gold_kernels.tokens.token_bytes import TokenBytes

MATCHED_ROLES = ("end_of_turn", "eos")  # never pad, which no model is to predict


class _Overlap(NamedTuple):
    student_ids: Tensor  # (K,) int64, ascending
    teacher_ids: Tensor  # (K,) int64, the partner of each
    student_vocab_size: int  # V_s, entries of the tokenizer; its head may have more rows
    teacher_vocab_size: int  # V_t


class VocabOverlap(_Overlap):
    """Matched entries: one student id with one teacher id.

    Text tokens match by equal bytes: "\\u0120the" of a byte-level vocabulary and "\\u2581the" of
    SentencePiece are the same entry. Special tokens match by role alone: end of turn with end of
    turn, and eos with eos where neither is the end of turn. If several tokens of a side have equal
    bytes, the one with the lowest id is taken. Byte-fallback tokens come last, since a tokenizer
    uses them only where it has no other.
    """

    def __new__(
        cls,
        student_ids: Tensor,
        teacher_ids: Tensor,
        student_vocab_size: int,
        teacher_vocab_size: int,
    ) -> "VocabOverlap":
        sides = (
            ("student", student_ids, student_vocab_size),
            ("teacher", teacher_ids, teacher_vocab_size),
        )
        for side, ids, size in sides:
            is_ids = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim == 1
            if not (is_ids and is_whole(size) and size >= 0):
                got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(
                    f"VocabOverlap: the {side}'s ids must be a tensor (K,) of int64, and the size "
                    f"of its vocabulary a whole number, got {got} and {size!r}; pass "
                    "torch.tensor(ids) and len(tokenizer)."
                )
            if ids.unique().shape[0] != ids.shape[0]:
                raise ValueError(
                    f"VocabOverlap: each of the {side}'s entries has one partner at most, got "
                    f"{ids.shape[0]} ids of which {ids.unique().shape[0]} differ; drop the others."
                )
            if ids.shape[0] and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(
                    f"VocabOverlap: the {side}'s ids must be in [0, {size}), got "
                    f"{int(ids.min())} to {int(ids.max())}; pass those of its tokenizer."
                )
        if student_ids.shape != teacher_ids.shape:
            raise ValueError(
                f"VocabOverlap: student_ids and teacher_ids must be pairs, got "
                f"{student_ids.shape[0]} and {teacher_ids.shape[0]}; pass one partner for each."
            )
        return super().__new__(
            cls, student_ids, teacher_ids, student_vocab_size, teacher_vocab_size
        )

    @classmethod
    def from_tokenizers(
        cls,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_end_of_turn_id: int | None = None,  # None: see TokenBytes
        teacher_end_of_turn_id: int | None = None,
    ) -> "VocabOverlap":
        """Build it from two fast tokenizers. An end of turn that is not given is found in the
        tokenizer: the token with which its chat template ends a turn, or else eos.
        """
        return cls.from_token_bytes(
            TokenBytes(student_tokenizer, end_of_turn_id=student_end_of_turn_id),
            TokenBytes(teacher_tokenizer, end_of_turn_id=teacher_end_of_turn_id),
        )

    @classmethod
    def from_token_bytes(cls, student: TokenBytes, teacher: TokenBytes) -> "VocabOverlap":
        check_tables("VocabOverlap.from_token_bytes", student=student, teacher=teacher)
        student_entries, teacher_entries = _entries(student), _entries(teacher)
        pairs = sorted(
            (student_id, teacher_entries[key])
            for key, student_id in student_entries.items()
            if key in teacher_entries
        )
        ids = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2)
        return cls(
            ids[:, 0].contiguous(), ids[:, 1].contiguous(), student.vocab_size, teacher.vocab_size
        )

    @property
    def num_matched(self) -> int:  # K
        return self.student_ids.shape[0]

    @property
    def student_share(self) -> float:
        """The share of the student's vocabulary that is matched."""
        return self.num_matched / max(1, self.student_vocab_size)

    @property
    def teacher_share(self) -> float:
        return self.num_matched / max(1, self.teacher_vocab_size)

    def student_mass(self, weights: Tensor) -> Tensor:  # (..., V) -> (...)
        """Share of probabilities, or of the token counts of a text sample, on matched entries; 0
        where there are none.
        """
        return _share(weights, self.student_ids, self.student_vocab_size)

    def teacher_mass(self, weights: Tensor) -> Tensor:  # (..., V) -> (...)
        return _share(weights, self.teacher_ids, self.teacher_vocab_size)

    def report(
        self,
        student_weights: Tensor | None = None,  # (..., V_s) probabilities or token counts
        teacher_weights: Tensor | None = None,  # (..., V_t)
    ) -> str:
        """Which share of each vocabulary is matched and, given weights, of their mass."""
        sides = [
            (f"of the student's {self.student_vocab_size}", self.student_share),
            (f"of the teacher's {self.teacher_vocab_size}", self.teacher_share),
        ]
        if student_weights is not None:
            mass = self.student_mass(student_weights).mean().item()
            sides.append(("of the student's probability mass", mass))
        if teacher_weights is not None:
            mass = self.teacher_mass(teacher_weights).mean().item()
            sides.append(("of the teacher's probability mass", mass))
        shares = ", ".join(f"{share:.1%} {name}" for name, share in sides)
        return f"{self.num_matched} entries matched: {shares}"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VocabOverlap":
        return self._replace(
            student_ids=self.student_ids.to(device, non_blocking=non_blocking),
            teacher_ids=self.teacher_ids.to(device, non_blocking=non_blocking),
        )


def _entries(table: TokenBytes) -> dict[bytes | str, int]:
    """Bytes or role -> the id that stands for it. No id stands for two of them."""
    roles: dict[int, str] = {}
    for role in MATCHED_ROLES:
        token_id = table.roles[role]
        if token_id is not None:
            roles.setdefault(token_id, role)
    entries: dict[bytes | str, int] = {}
    ordinary = (i for i in range(table.vocab_size) if i not in table.fallback_ids)
    for token_id in (*ordinary, *sorted(table.fallback_ids)):
        piece = table.pieces[token_id]
        if piece and token_id not in roles:
            entries.setdefault(piece, token_id)
    return entries | {role: token_id for token_id, role in roles.items()}


def _share(weights: Tensor, ids: Tensor, size: int) -> Tensor:  # (..., V), (K,) -> (...)
    if not isinstance(weights, Tensor) or weights.ndim == 0 or weights.shape[-1] < size:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"VocabOverlap: weights must be a tensor (..., V), V at least {size}, the tokenizer's "
            f"entries, got {got}; pass probabilities, or counts.bincount(minlength={size})."
        )
    if not weights.is_floating_point():
        weights = weights.double()
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    total = weights.sum(-1, dtype=dtype)
    return torch.where(total != 0, weights[..., ids].sum(-1, dtype=dtype) / total, 0)
