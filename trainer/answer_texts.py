"""Which tokens of a completion spell the answer's texts, and which the marks around them.

N tokens of a completion. Across tokenizers only texts are compared: each side has its own marks.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.tokens.ranges import TokenRange
from gold_kernels.tokens.token_bytes import TokenBytes, as_id_tensor
from gold_trainer.rendering import Frame, Frames, Piece, visible_text

CONTENT = "content"
THOUGHTS = "reasoning_content"


class AnswerTexts(NamedTuple):
    """A completion as one side wrote it."""

    ids: Tensor  # (N,) int64
    texts: dict[str, str]  # by key of the message
    ranges: dict[str, TokenRange]  # their tokens
    is_ended: bool  # its last token ends the turn


def of_pieces(table: TokenBytes, ids: list[int], pieces: list[Piece]) -> AnswerTexts:
    """A completion that was made of these pieces, or, cut, begins with them."""
    tokens, is_ended = as_id_tensor(ids), bool(ids) and ids[-1] in table.end_ids
    places, position = {}, 0
    pieces = _with_white_space(table, pieces)
    for piece in pieces:
        length = len(_spelled(table, piece))
        if not piece.is_mark:
            places[piece.key] = position, position + length
        position += length
    whole = b"".join(_spelled(table, piece) for piece in pieces)
    joined = table.spelled(tokens)
    if not places or table.is_spaced or not whole.startswith(joined):
        return _whole(table, tokens, is_ended)
    return _of_places(table, tokens, joined, places, is_ended)


def of_sample(table: TokenBytes, ids: list[int], frames: Frames) -> AnswerTexts:
    """A completion that was sampled: thoughts and content where the marks between them are found,
    content alone behind the mark that a template writes before it, else all of it content.
    """
    tokens, is_ended = as_id_tensor(ids), bool(ids) and ids[-1] in table.end_ids
    plain, thinking = frames
    if table.is_spaced:
        return _whole(table, tokens, is_ended)
    joined = table.spelled(tokens)
    places: dict[str, tuple[int, int]] = {}
    if thinking is not None and thinking.keys == (THOUGHTS, CONTENT):
        before, between, _ = (_mark_bytes(table, mark) for mark in thinking.marks)
        start = len(before) if joined.startswith(before) else 0
        end = _find(table, tokens, joined, thinking.marks[1].strip())
        if end is not None and between.strip() in joined and end[0] >= start:
            places[THOUGHTS] = start, len(joined[: end[0]].rstrip(b"\n"))
            rest = joined[end[1] :]
            places[CONTENT] = len(joined) - len(rest.lstrip(b"\n")), len(joined)
            places[THOUGHTS] = start, max(start, places[THOUGHTS][1])
    if not places and plain is not None:
        before = _mark_bytes(table, plain.marks[0])
        if before.strip() and joined.startswith(before):
            places[CONTENT] = len(before), len(joined)
    if not places:
        return _whole(table, tokens, is_ended)
    if not joined[slice(*places.get(THOUGHTS, (0, 1)))].strip():
        del places[THOUGHTS]  # an empty block of thoughts is a mark
    return _of_places(table, tokens, joined, places, is_ended)


def _of_places(
    table: TokenBytes,
    tokens: Tensor,
    joined: bytes,
    places: dict[str, tuple[int, int]],
    is_ended: bool,
) -> AnswerTexts:
    decoded = {key: _decoded(joined[slice(*place)]) for key, place in places.items()}
    if not all(is_valid for _, is_valid in decoded.values()) and len(decoded) > 1:
        return _whole(table, tokens, is_ended)
    texts = {key: text for key, (text, _) in decoded.items()}
    is_ended &= all(is_valid for _, is_valid in decoded.values())
    return AnswerTexts(tokens, texts, _ranges(table, tokens, places), is_ended)


def frame_for(frames: Frames, texts: Mapping[str, str]) -> Frame | None:
    """What the other side's template writes around these texts."""
    thinking = frames.thinking
    if THOUGHTS in texts and thinking is not None and set(thinking.keys) <= set(texts):
        return thinking
    return frames.plain


def _whole(table: TokenBytes, tokens: Tensor, is_ended: bool) -> AnswerTexts:
    text_ids = tokens[:-1] if is_ended else tokens
    text, is_valid = _decoded(table.texts(text_ids)[0])
    ranges = {CONTENT: TokenRange(0, text_ids.shape[0], 0)}
    return AnswerTexts(tokens, {CONTENT: text}, ranges, is_ended and is_valid)


def _decoded(spelled: bytes) -> tuple[str, bool]:
    """Up to the first byte that is not UTF-8, and whether that is all."""
    try:
        return spelled.decode(), True
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode(), False


def _spelled(table: TokenBytes, piece: Piece) -> bytes:
    return _mark_bytes(table, piece.text) if piece.is_mark else piece.text.encode()


def _mark_bytes(table: TokenBytes, mark: str) -> bytes:
    return visible_text(mark, [t for t, i in table.special_ids.items() if t in mark]).encode()


def _with_white_space(table: TokenBytes, pieces: list[Piece]) -> list[Piece]:
    """White space that a template writes before the texts and behind them belongs to them: a model
    may write it without a template.
    """
    first, *others = pieces
    blank = _mark_bytes(table, first.text).decode()
    if first.is_mark and others and not blank.strip():
        first = Piece("", True)
        others[0] = others[0]._replace(text=blank + others[0].text)
    if len(others) > 1:
        blank = _mark_bytes(table, others[-1].text).decode()
        if not blank.strip():
            # behind the token that ends the turn it is not part of the completion
            blank = others[-1].text[: len(others[-1].text) - len(others[-1].text.lstrip())]
            others[-2:] = [others[-2]._replace(text=others[-2].text + blank), Piece("", True)]
    return [first, *others]


def _find(
    table: TokenBytes, tokens: Tensor, joined: bytes, mark: str
) -> tuple[int, int] | None:  # bytes
    token_id = table.special_ids.get(mark)
    if token_id is None:
        place = joined.find(mark.encode()) if mark else -1
        return None if place < 0 else (place, place + len(mark.encode()))
    found = (tokens == token_id).nonzero().flatten()
    if not found.shape[0]:
        return None
    place = int(table.token_lengths(tokens)[: int(found[0])].sum())
    return place, place


def _ranges(
    table: TokenBytes, tokens: Tensor, places: dict[str, tuple[int, int]]
) -> dict[str, TokenRange]:
    ends = table.token_lengths(tokens).cumsum(0)  # (N,)
    limit = tokens.shape[0] - (tokens.shape[0] > 0 and int(tokens[-1]) in table.end_ids)
    ranges = {}
    for key, (start, stop) in places.items():
        first = int(torch.searchsorted(ends, start, right=True))
        last = int(torch.searchsorted(ends, stop)) + 1 if stop > start else first
        before = int(ends[first - 1]) if first else 0
        ranges[key] = TokenRange(min(first, limit), min(last, limit), max(0, start - before))
    return ranges
