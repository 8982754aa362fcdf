"""The student's vocabulary in the teacher's: which entries of the teacher an entry of the student
begins with, and with what weight.

V_s, V_t entries of the tokenizers, P pieces of an entry at most, K entries of the teacher that have
any weight, F folds, E pairs of entries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels.tokens.arguments import check_tables, is_number, is_whole
from gold_kernels.tokens.token_bytes import TokenBytes
from gold_kernels.tokens.vocabulary import VocabOverlap

NUM_PIECES = 4
DECAY = 0.1  # each piece weighs a tenth of the one before it
RELAXED_WEIGHT = 0.6  # least weight of a pair that H-KL takes for matched
FOLD_WIDTH = 4


class Folds(NamedTuple):
    """Sums of up to FOLD_WIDTH weighted numbers, whose numbers may be folds themselves: a column of
    any length is summed in any order of rows, without atomics.

    The first level reads probabilities of the student, each later level folds before it.
    """

    ids: Tensor  # (FOLD_WIDTH, F) int32
    weights: Tensor  # (FOLD_WIDTH, F) float32; 0 where there is nothing
    starts: tuple[int, ...]  # first fold of each level, then F
    teacher_ids: Tensor  # (K,) int32, ascending
    places: Tensor  # (K,) int32, the fold that has the sum of each
    row_places: Tensor  # (P, V_s) int32, the fold of each piece of an entry
    row_weights: Tensor  # (P, V_s) float32

    @property
    def num_folds(self) -> int:  # F
        return self.starts[-1]

    def tensors(self) -> list[Tensor]:
        """On the device all but the last, which the host reads."""
        parts = [part for part in self if isinstance(part, Tensor)]
        return [*parts, torch.tensor(self.starts, device="cpu")]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Folds":
        ids, weights, *others, starts = tensors
        return cls(ids, weights, tuple(starts.tolist()), *others)


class VocabProjection(NamedTuple):
    """W (V_s, V_t) with few entries a row: Q W is the student's distribution over the entries with
    which the teacher would write on.

    An entry with equal bytes, or of the same role, has weight 1. The bytes of any other are
    tokenised by the teacher, and its first pieces share a weight of 1, each a tenth of the one
    before. So what the teacher writes first has nearly all of it, which is exact for a weight of 1
    on the first piece. Entries that spell nothing and have no role have no weight.
    """

    columns: Tensor  # (V_s, P) int64 entries of the teacher; -1 for none
    weights: Tensor  # (V_s, P) float32
    student_vocab_size: int  # V_s, entries of the tokenizer; its head may have more rows
    teacher_vocab_size: int  # V_t
    folds: Folds

    @classmethod
    def from_entries(
        cls,
        columns: Tensor,  # (V_s, P) int64; -1 for none
        weights: Tensor,  # (V_s, P)
        teacher_vocab_size: int,
    ) -> "VocabProjection":
        is_pair = isinstance(columns, Tensor) and isinstance(weights, Tensor)
        if not is_pair or columns.dtype != torch.int64 or weights.is_complex():
            got = (columns.dtype, weights.dtype) if is_pair else type(columns).__name__
            raise ValueError(
                "VocabProjection: columns and weights must be tensors, columns of int64, got "
                f"{got}; pass torch.tensor(...) of both, and weights of float32."
            )
        if not is_whole(teacher_vocab_size):
            raise ValueError(
                "VocabProjection: teacher_vocab_size must be a whole number, got "
                f"{teacher_vocab_size!r}; pass the teacher's len(tokenizer)."
            )
        is_entry = columns >= 0
        if columns.shape != weights.shape or columns.ndim != 2:
            raise ValueError(
                "VocabProjection: columns and weights must both be (V_s, P), got "
                f"{tuple(columns.shape)} and {tuple(weights.shape)}; pass one weight an entry."
            )
        largest = int(columns.max()) if columns.numel() else -1
        if largest >= teacher_vocab_size:
            raise ValueError(
                f"VocabProjection: columns must be below {teacher_vocab_size}, the teacher's "
                f"entries, got {largest}; pass -1 where a row has no further entry."
            )
        given = weights[is_entry].float()
        if not bool((given.isfinite() & (given > 0)).all()):
            raise ValueError(
                "VocabProjection: weights must be positive and finite, got "
                f"{float(given.min()) if given.numel() else 0}; leave out an entry with column -1."
            )
        weights = torch.where(is_entry, weights.float(), 0)
        return cls(
            *(columns, weights, columns.shape[0], teacher_vocab_size),
            _fold(columns, weights),
        )

    @classmethod
    def from_tokenizers(
        cls,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        num_pieces: int = NUM_PIECES,
        decay: float = DECAY,
    ) -> "VocabProjection":
        """Build it from two fast tokenizers. The teacher tokenises every entry that it does not
        have: make it once. num_pieces share a weight of 1, each with decay times that of the one
        before.
        """
        student, teacher = TokenBytes(student_tokenizer), TokenBytes(teacher_tokenizer)
        return cls.from_token_bytes(student, teacher, num_pieces=num_pieces, decay=decay)

    @classmethod
    def from_token_bytes(
        cls,
        student: TokenBytes,
        teacher: TokenBytes,
        *,
        num_pieces: int = NUM_PIECES,
        decay: float = DECAY,
    ) -> "VocabProjection":
        """Pieces after the first num_pieces are left out."""
        is_count = is_whole(num_pieces) and num_pieces >= 1
        if not is_count or not (is_number(decay) and 0 <= decay <= 1):
            raise ValueError(
                "VocabProjection: num_pieces must be at least 1 and decay in [0, 1], got "
                f"{num_pieces} and {decay}; {NUM_PIECES} and {DECAY} are the defaults."
            )
        check_tables("VocabProjection.from_token_bytes", student=student, teacher=teacher)
        shared = VocabOverlap.from_token_bytes(student, teacher)
        pairs = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
        by_bytes = {student.pieces[i]: t for i, t in pairs.items() if student.pieces[i]}
        rows: list[list[int]] = [[] for _ in range(student.vocab_size)]
        others: list[int] = []
        for i, piece in enumerate(student.pieces[: student.vocab_size]):
            if i in pairs:
                rows[i] = [pairs[i]]
            elif piece in by_bytes:  # a second entry of the same bytes
                rows[i] = [by_bytes[piece]]
            elif piece:
                others.append(i)
        most = sum(decay**k > torch.finfo(torch.float32).tiny for k in range(num_pieces))
        for i, ids in zip(
            others, _split(teacher, [student.pieces[i] for i in others]), strict=True
        ):
            rows[i] = ids[:most]
        columns = torch.full((len(rows), num_pieces), -1, device="cpu")
        weights = torch.zeros(len(rows), num_pieces, dtype=torch.float32, device="cpu")
        for size in range(1, num_pieces + 1):
            own = [i for i, ids in enumerate(rows) if len(ids) == size]
            shares = weights.new_tensor([decay**k for k in range(size)], dtype=torch.float64)
            if own:
                columns[own, :size] = columns.new_tensor([rows[i] for i in own])
                weights[own, :size] = (shares / shares.sum()).float()
        return cls.from_entries(columns, weights, teacher.vocab_size)

    def relaxed_overlap(
        self, exact: VocabOverlap, least_weight: float = RELAXED_WEIGHT
    ) -> VocabOverlap:
        """The overlap with further pairs: an unmatched entry of the student and the piece with the
        largest weight of it, if that is at least least_weight and no other entry's partner. Of
        several the one of the largest weight is taken, then of the lowest id.
        """
        sizes = self.student_vocab_size, self.teacher_vocab_size
        if not isinstance(exact, VocabOverlap) or exact[2:] != sizes:
            got = exact[2:] if isinstance(exact, VocabOverlap) else type(exact).__name__
            raise ValueError(
                f"VocabProjection: the exact overlap must be a VocabOverlap of {sizes} entries, "
                f"got {got}; pass VocabOverlap.from_tokenizers of the same tokenizers."
            )
        if not (is_number(least_weight) and least_weight > 0):
            raise ValueError(
                f"VocabProjection: least_weight must be positive, got {least_weight}; "
                f"{RELAXED_WEIGHT} is the default."
            )
        taken, matched = set(exact.teacher_ids.tolist()), set(exact.student_ids.tolist())
        heaviest, best = (side.tolist() for side in self.weights.max(1))
        order = sorted(range(len(heaviest)), key=lambda i: (-heaviest[i], i))
        pairs = list(zip(exact.student_ids.tolist(), exact.teacher_ids.tolist(), strict=True))
        for i in order:
            if heaviest[i] < least_weight:
                break
            partner = int(self.columns[i, best[i]])
            if i not in matched and partner not in taken:
                taken.add(partner)
                pairs.append((i, partner))
        ids = torch.tensor(sorted(pairs), dtype=torch.int64, device="cpu").reshape(-1, 2)
        return VocabOverlap(ids[:, 0].contiguous(), ids[:, 1].contiguous(), *exact[2:])

    def to(self, device: torch.device | str) -> "VocabProjection":
        if self.folds.ids.device == torch.device(device):
            return self
        *tensors, starts = self.folds.tensors()
        moved = Folds.from_tensors([*(part.to(device) for part in tensors), starts])
        return self._replace(folds=moved)


def _split(table: TokenBytes, pieces: list[bytes]) -> list[list[int]]:
    """Tokens that spell the bytes: those of the tokenizer where they do, else the longest entry at
    every place, as for a part of a character; up to a place where there is none.
    """
    texts = {i: text for i, piece in enumerate(pieces) if (text := _text(piece)) is not None}
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = table.tokenizer(list(texts.values()), **options)["input_ids"] if texts else []
    found = dict(zip(texts, encoded, strict=True))
    entries: dict[bytes, int] = {}
    for token_id, entry in enumerate(table.pieces[: table.vocab_size]):
        if entry:
            entries.setdefault(entry, token_id)
    longest = max(map(len, entries), default=0)
    result = []
    for i, piece in enumerate(pieces):
        ids = found.get(i, [])
        spells = b"".join(table.pieces[j] for j in ids if j < table.vocab_size) == piece
        result.append(list(ids) if spells else _longest_entries(piece, entries, longest))
    return result


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _longest_entries(piece: bytes, entries: dict[bytes, int], longest: int) -> list[int]:
    ids, start = [], 0
    while start < len(piece):
        sizes = range(min(longest, len(piece) - start), 0, -1)
        size = next((n for n in sizes if piece[start : start + n] in entries), 0)
        if not size:
            break
        ids.append(entries[piece[start : start + size]])
        start += size
    return ids


def _fold(columns: Tensor, weights: Tensor) -> Folds:
    """Levels of sums over the rows of each column."""
    device = columns.device
    rows, pieces = (columns >= 0).nonzero().unbind(1)  # (E,)
    targets, order = columns[rows, pieces].sort(stable=True)
    inputs, factors = rows[order], weights[rows, pieces][order]
    teacher_ids, segments = targets.unique_consecutive(return_inverse=True)
    places = torch.zeros_like(teacher_ids)
    all_ids, all_weights, starts = [], [], [0]
    while True:
        counts = segments.bincount(minlength=len(teacher_ids))
        sizes = -(-counts // FOLD_WIDTH)  # folds of each segment in this level
        position = (
            torch.arange(len(segments), device=device) - (counts.cumsum(0) - counts)[segments]
        )
        first = sizes.cumsum(0) - sizes
        fold, lane = first[segments] + position // FOLD_WIDTH, position % FOLD_WIDTH
        num_folds = int(sizes.sum())
        ids = torch.zeros(FOLD_WIDTH, num_folds, dtype=torch.int32, device=device)
        of_fold = torch.zeros_like(ids, dtype=torch.float32)
        ids[lane, fold], of_fold[lane, fold] = inputs.int(), factors
        all_ids.append(ids)
        all_weights.append(of_fold)
        places = torch.where(sizes == 1, starts[-1] + first, places)
        is_open = sizes > 1
        inputs = starts[-1] + torch.arange(num_folds, device=device)
        owners = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        starts.append(starts[-1] + num_folds)
        is_left = is_open[owners]
        segments, inputs = owners[is_left], inputs[is_left]
        factors = torch.ones_like(segments, dtype=torch.float32)
        if not len(segments):
            break
    num_places = int(columns.max()) + 2 if columns.numel() else 1
    column_places = places.new_zeros(num_places)
    column_places[teacher_ids] = places
    row_places = column_places[columns.clamp_min(0)].T.int()
    return Folds(
        torch.cat(all_ids, 1),
        torch.cat(all_weights, 1),
        tuple(starts),
        teacher_ids.int(),
        places.int(),
        row_places.contiguous(),
        weights.T.contiguous(),
    )
