"""Which tokens of a completion spell the answer's texts, and which the marks around them.

N tokens of a completion. Across tokenizers only texts are compared: each side has its own marks.
"""

import re
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.tokens.ranges import TextPair, TokenRange
from gold_kernels.tokens.token_bytes import TokenBytes, as_id_tensor
from gold_trainer.rendering.frames import CONTENT, THOUGHTS, Frames, Piece, common_length

MARKS = ""  # kind of a completion that is nothing but marks, a call of tools
# In the place of a special token, which spells nothing: no text has this byte.
_FENCE = b"\xff"


class AnswerTexts(NamedTuple):
    """A completion as one side wrote it."""

    table: TokenBytes
    ids: Tensor  # (N,) int64
    texts: dict[str, str]  # by kind, in order, with what was cut from their end
    starts: dict[str, int]  # bytes of the completion before each text
    is_ended: bool  # its last token ends the turn, and all its texts are there
    broken_bytes: int = 0  # behind the first that is not UTF-8
    is_whole: bool = False  # all tokens but the end are one text, whatever they spell

    def whole_range(self) -> TokenRange:
        return TokenRange(0, self._num_before_end())

    def range_of_text(self, kind: str) -> TokenRange:
        start = self.starts[kind]
        stop = start + len(self.texts[kind].encode())
        return self.whole_range() if self.is_whole else self.range_of(start, stop)

    def range_of(self, start: int, stop: int) -> TokenRange:  # bytes of the completion
        """The tokens that end in a text. The first may begin before it, a token that ends behind
        it is not its own.
        """
        ends = self.table.token_lengths(self.ids[: self._num_before_end()]).cumsum(0)  # (N,)
        first = int(torch.searchsorted(ends, start, right=True))
        last = int(torch.searchsorted(ends, stop, right=True))
        before = int(ends[first - 1]) if first else 0
        return TokenRange(first, max(first, last), max(0, start - before))

    def _num_before_end(self) -> int:
        num = self.ids.shape[0]
        return num - (num > 0 and int(self.ids[-1]) in self.table.end_ids)


def common_texts(student: AnswerTexts, teacher: AnswerTexts) -> tuple[list[TextPair], bool]:
    """The texts that both sides have, in order, and whether both end their turn behind them. Of
    white space around a text as much as both have: templates trim it, or write their own.
    """
    kinds = [kind for kind in student.texts if kind in teacher.texts]
    if kinds != [kind for kind in teacher.texts if kind in student.texts]:
        kinds = [CONTENT]  # each side has its own order
    pairs = {kind: _text_pair(student, teacher, kind) for kind in kinds}
    found = [pair for pair in pairs.values() if pair is not None]
    last = {(*side.texts,)[-1] for side in (student, teacher) if side.texts}
    is_end_common = len(last) == 1 and pairs.get(*last) is not None
    if not found and MARKS in last:  # calls that templates write in their own ways: the end remains
        own, other = student.whole_range().stop, teacher.whole_range().stop
        found = [TextPair(TokenRange(own, own), TokenRange(other, other), b"")]
        is_end_common = True
    return found, is_end_common and student.is_ended and teacher.is_ended


def _text_pair(student: AnswerTexts, teacher: AnswerTexts, kind: str) -> TextPair | None:
    texts = student.texts[kind], teacher.texts[kind]
    if student.is_whole or teacher.is_whole:
        return TextPair(student.range_of_text(kind), teacher.range_of_text(kind))
    extent = _common_extent(*texts)
    if extent is None:
        return None
    *skipped, text = extent
    num_bytes = len(text.encode())
    starts = (
        side.starts[kind] + len(own[:num_skipped].encode())
        for side, own, num_skipped in zip((student, teacher), texts, skipped, strict=True)
    )
    own, other = (
        side.range_of(start, start + num_bytes)
        for side, start in zip((student, teacher), starts, strict=True)
    )
    return TextPair(own, other, text.encode())


def of_pieces(table: TokenBytes, ids: list[int], pieces: list[Piece]) -> AnswerTexts:
    """A completion that was made of these pieces, or, cut, begins with them."""
    tokens, is_ended = as_id_tensor(ids), bool(ids) and ids[-1] in table.end_ids
    if len(pieces) == 1 and pieces[0].key:  # plain text
        return _whole(table, tokens, is_ended)
    spelled = [_spelled(table, piece) for piece in pieces]
    starts = [0, *accumulate(map(len, spelled))]
    kinds = [piece.key for piece in pieces if piece.key]
    marks = b"".join(text for text, piece in zip(spelled, pieces, strict=True) if not piece.key)
    whole = b"".join(spelled)
    if kinds and (table.is_spaced or not whole.startswith(table.spelled(tokens))):
        if not marks.strip():
            return _whole(table, tokens, is_ended)
        raise ValueError(
            f"the tokens of {table.name} must tell an answer from the marks around it, got a "
            f"tokenizer that changes {whole[:80]!r}; choose another tokenizer or chat template."
        )
    if not kinds:
        kind = MARKS if marks.strip() else CONTENT
        return AnswerTexts(table, tokens, {kind: marks.decode()}, {kind: 0}, is_ended)
    found = [(p.key, p.text, start) for p, start in zip(pieces, starts, strict=False) if p.key]
    return AnswerTexts(
        table,
        tokens,
        {kind: text for kind, text, _ in found},
        {kind: start for kind, _, start in found},
        is_ended,
    )


def of_sample(table: TokenBytes, ids: list[int], frames: Frames) -> AnswerTexts:
    """A completion that was sampled: thoughts and content where the marks of the template are
    found, content alone behind the mark that a template writes before it, else all of it content.
    """
    tokens, is_ended = as_id_tensor(ids), bool(ids) and ids[-1] in table.end_ids
    if table.is_spaced or frames.plain is None:
        return _whole(table, tokens, is_ended)
    sample = _Sample(table, tokens[: tokens.shape[0] - is_ended])
    places = sample.thoughts_and_content(frames)
    if CONTENT in places and is_ended:
        start, stop = places[CONTENT]
        tail = sample.fenced(_before_end(table, frames.plain.marks[-1]))
        if tail and sample.text[start:stop].endswith(tail):
            places[CONTENT] = start, stop - len(tail)
    texts, starts, num_broken = {}, {}, 0
    for kind, (start, stop) in places.items():
        first, last = sample.unfenced(start), sample.unfenced(stop)
        text, is_valid = _decoded(sample.joined[first:last])
        texts[kind], starts[kind] = text, first
        if not is_valid:
            is_ended, num_broken = False, len(sample.joined) - first - len(text.encode())
            break
    if CONTENT not in texts:
        is_ended = False
    return AnswerTexts(table, tokens, texts, starts, is_ended, num_broken)


class _Sample:
    """The bytes of tokens, the names of special tokens among them between fences."""

    def __init__(self, table: TokenBytes, ids: Tensor):
        self.names = {token_id: name for name, token_id in table.special_ids.items()}
        self.special = sorted(table.special_ids, key=len, reverse=True)
        lengths = table.token_lengths(ids).tolist()
        pieces = [table.spelled(ids[i : i + 1]) for i in range(ids.shape[0])]
        self.joined = b"".join(pieces)
        fenced = [
            _fence(self.names[token_id]) if token_id in self.names else piece
            for token_id, piece in zip(ids.tolist(), pieces, strict=True)
        ]
        self.text = b"".join(fenced)
        self.ends = [0, *accumulate(lengths)]  # bytes of the joined tokens before each
        self.fenced_ends = [0, *accumulate(map(len, fenced))]

    def unfenced(self, position: int) -> int:
        """A position in the text as one in the joined bytes."""
        i = bisect_right(self.fenced_ends, position) - 1
        return self.ends[i] + position - self.fenced_ends[i]

    def fenced(self, mark: str) -> bytes:
        names = [name for name in self.special if name in mark]
        if not names:
            return mark.encode()
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", mark)
        return b"".join(_fence(part) if part in names else part.encode() for part in parts)

    def thoughts_and_content(self, frames: Frames) -> dict[str, tuple[int, int]]:
        """Where thoughts and content stand in the text."""
        assert frames.plain is not None, "a row without frames is whole"
        found = None
        if frames.thinking is not None and frames.thinking.prompt == frames.prompt:
            found = self._thoughts(*frames.thinking.marks[:2])
        if found is None and self.text.lstrip().startswith(self.fenced("<think>")):
            found = self._thoughts("<think>", "</think>")
        if found is not None:
            return found
        return {CONTENT: (self._behind(frames.plain.marks[0]), len(self.text))}

    def _behind(self, mark: str) -> int:
        """Where a text begins behind a mark, which may stand there without its white space."""
        before = self.fenced(mark)
        forms = (before, before.strip()) if before.strip() else (before,)
        return next((len(form) for form in forms if self.text.startswith(form)), 0)

    def _thoughts(self, before: str, between: str) -> dict[str, tuple[int, int]] | None:
        start, close = self._behind(before), self.fenced(between).strip()
        stop = self.text.find(close, start) if close else -1
        is_open = not before.strip() or start > 0
        if stop < 0:  # their author stopped within them
            return {THOUGHTS: self._trimmed(start, len(self.text))} if is_open else None
        content = len(self.text) - len(self.text[stop + len(close) :].lstrip(b"\n"))
        places = {THOUGHTS: self._trimmed(start, stop), CONTENT: (content, len(self.text))}
        if places[THOUGHTS][0] == places[THOUGHTS][1]:
            del places[THOUGHTS]  # an empty block of thoughts is a mark
        return places

    def _trimmed(self, start: int, stop: int) -> tuple[int, int]:
        text = self.text[start:stop]
        start = stop - len(text.lstrip())
        return start, max(start, start + len(text.strip()))


def _before_end(table: TokenBytes, mark: str) -> str:
    """What a template writes behind an answer before the token that ends the turn."""
    names = table.tokenizer.convert_ids_to_tokens(sorted(table.end_ids))
    return mark[: min((mark.find(name) for name in names if name in mark), default=len(mark))]


def _fence(name: str) -> bytes:
    return _FENCE + name.encode() + _FENCE


def _whole(table: TokenBytes, tokens: Tensor, is_ended: bool) -> AnswerTexts:
    text_ids = tokens[:-1] if is_ended else tokens
    text, is_valid = _decoded(table.texts(text_ids)[0])
    return AnswerTexts(table, tokens, {CONTENT: text}, {CONTENT: 0}, is_ended and is_valid, 0, True)


def _decoded(spelled: bytes) -> tuple[str, bool]:
    """Up to the first byte that is not UTF-8, and whether that is all."""
    try:
        return spelled.decode(), True
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode(), False


def _spelled(table: TokenBytes, piece: Piece) -> bytes:
    """Special tokens, which are found in marks, spell nothing."""
    text = piece.text
    for name in table.special_ids if piece.is_mark else ():
        text = text.replace(name, "")
    return text.encode()


def _common_extent(own: str, other: str) -> tuple[int, int, str] | None:
    """How many characters of each stand before what both have, and that; None for other texts."""
    core = own.strip()
    if core != other.strip():
        return None
    if not core:
        return 0, 0, own[: common_length(own, other)]
    (lead, _, trail), (other_lead, _, other_trail) = own.partition(core), other.partition(core)
    num_lead = common_length(lead[::-1], other_lead[::-1])
    text = lead[len(lead) - num_lead :] + core + trail[: common_length(trail, other_trail)]
    return len(lead) - num_lead, len(other_lead) - num_lead, text
