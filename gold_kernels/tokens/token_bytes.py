"""Token id -> bytes, one table for each tokenizer: different tokenizers have bytes in common.

N tokens of a completion, V vocabulary. A tokenizer is any object that behaves like a fast tokenizer
of transformers (a processor's `.tokenizer` is one); nothing of that package is imported.
"""

import re
from array import array
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from gold_kernels.tokens.arguments import is_whole
from gold_kernels.tokens.spelling import FALLBACK, read_spelling

ROLES = ("bos", "eos", "unk", "pad")
_WHITESPACE = re.compile(rb"\s*")
_EXCERPT = 20  # bytes on either side of a difference


class TokenBytes:
    """The bytes of every token of one tokenizer, and which token ends a turn.

    Special tokens spell nothing, and neither do ids without a token. `encode` tokenises text
    without special parsing: the literal text of a special token is text. Building the table takes
    about half a second for 150k tokens; do it once.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end_of_turn_id: int | None = None,  # None finds it with the chat template, else eos
        end_ids: Collection[int] | None = None,  # all that end an answer; None: end of turn, eos
    ) -> None:
        self.tokenizer = tokenizer
        self.name = _name(tokenizer)
        backend = _backend(tokenizer)
        spelling = read_spelling(self.name, backend)
        self.drops_space, self.is_spaced = spelling.drops_space, spelling.is_spaced
        self.keeps_spaces = spelling.keeps_spaces
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        self.vocab_size = size
        # One entry more: for ids that a padded head can produce and the tokenizer does not have.
        self.pieces = [b""] * (size + 1)  # (V + 1,)
        for token, token_id in vocab.items():
            self.pieces[token_id] = spelling.to_bytes(token)
        added = backend.get_added_tokens_decoder()
        if spelling.has_plain_added:
            for token_id, token in added.items():
                self.pieces[token_id] = token.content.encode()
        self.fallback_ids = frozenset(
            token_id
            for token, token_id in vocab.items()
            if spelling.has_fallback and FALLBACK.fullmatch(token)
        )
        special = {token_id for token_id, token in added.items() if token.special}
        # who trains a tokenizer has no way to give it bytes but as special tokens
        special = (special - self.fallback_ids).union(tokenizer.all_special_ids)
        for token_id in special:
            self.pieces[token_id] = b""
        self.special_ids = {added[i].content: i for i in special if i in added}
        self.lengths = torch.tensor([*map(len, self.pieces)], device="cpu")  # (V + 1,) int64
        self.is_special = torch.ones(size + 1, dtype=torch.bool, device="cpu")  # (V + 1,)
        self.is_special[list(vocab.values())] = False
        self.is_special[list(special)] = True

        self.roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
        if end_of_turn_id is None:
            end_of_turn_id = find_end_of_turn(tokenizer)
        self.roles["end_of_turn"] = end_of_turn_id
        ends = (self.roles["eos"],) if end_ids is None else end_ids
        ends = ends if isinstance(ends, Collection) else (ends,)
        self.end_ids = frozenset(i for i in (end_of_turn_id, *ends) if i is not None)
        if not all(map(is_whole, self.end_ids)):
            raise ValueError(
                "TokenBytes: end_of_turn_id and end_ids must be ids of tokens, got "
                f"{end_of_turn_id!r} and {end_ids!r}; pass convert_tokens_to_ids(token) of each."
            )

    @property
    def end_of_turn_id(self) -> int | None:
        return self.roles["end_of_turn"]

    def texts(self, ids: Tensor, lead: int = 0) -> list[bytes]:  # (N,) int64
        """What the tokens may spell, the likelier text first. Some tokenizers put a space before
        every text: then the first is without that space, as the decoder writes it, and the second
        is with it. lead: so many bytes of the first token are not of the text.
        """
        joined = self._join(ids)
        if lead:
            return [joined[lead:]]
        return [joined[1:], joined] if self._may_drop(joined) else [joined]

    def spelled(self, ids: Tensor) -> bytes:  # (N,) int64
        """The bytes of the tokens, those of a space before the text included."""
        return self._join(ids)

    def token_lengths(self, ids: Tensor) -> Tensor:  # (N,) int64 -> (N,) int64
        """Bytes of each token."""
        return self.lengths[self._rows(ids)]

    def encode(self, text: str) -> list[int]:
        """Tokens that spell the text exactly. The literal text of a special token is text.

        Raises ValueError where the tokenizer changes the text (lower-casing, NFKC, stripping).
        """
        try:
            expected = text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"TokenBytes.encode: text that has a form in UTF-8 is expected, got {text!r:.80} "
                f"({error}); leave out lone surrogates."
            ) from error
        ids = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        tokens = as_id_tensor(ids)
        ends = self.byte_ends(tokens, expected)
        if ends is None or (int(ends[-1]) if ids else 0) != len(expected):
            got = max(self.texts(tokens), key=lambda spelled: _common_length(spelled, expected))
            at = _common_length(got, expected)
            excerpt = slice(max(0, at - _EXCERPT), at + _EXCERPT)
            raise ValueError(
                f"TokenBytes.encode: the tokens of {self.name} must spell the text, got "
                f"{got[excerpt]!r} for {expected[excerpt]!r} at byte {at} of {text[:80]!r}; its "
                "normalizer or vocabulary changes this text: normalise the text likewise first, "
                "or leave it out."
            )
        return ids

    def byte_ends(
        self, ids: Tensor, text: bytes, lead: int = 0
    ) -> Tensor | None:  # (N,) int64 -> (N,) int64
        """At which byte of the text each token ends; None if the tokens spell another text. lead:
        so many bytes of the first token stand before the text.

        One of the two may stop before the other. A token that spells nothing ends where the token
        before it ends.
        """
        if self.is_spaced:
            spaced = self._spaced_ends(ids, text)
            return None if spaced is None else as_id_tensor(spaced)
        joined = self._join(ids)
        drops = (lead,) if lead else (1, 0) if self._may_drop(joined) else (0,)
        # With a run of spaces both may fit as a prefix: an exact fit is looked for first.
        drop = next((drop for drop in drops if joined[drop:] == text), None)
        if drop is None:
            drop = next((d for d in drops if _is_prefix_pair(joined[d:], text)), None)
        if drop is None:
            return None
        ends = self.lengths[self._rows(ids)].cumsum(0)
        return torch.where(ends > 0, ends - drop, ends) if drop else ends

    def ends(self, ids: Tensor, lead: int = 0) -> Tensor:  # (N,) int64 -> (N,) int64
        """The byte at which each token ends, counted from the lead, which is not of the text."""
        return self.token_lengths(ids).cumsum(0) - lead

    def is_text(self, ids: Tensor) -> Tensor:  # (N,) int64 -> (N,) bool
        return ~self.is_special[self._rows(ids)]

    def _rows(self, ids: Tensor) -> Tensor:  # (N,) rows of pieces, lengths and is_special
        return ids.clamp_max(self.vocab_size)

    def _join(self, ids: Tensor) -> bytes:
        return b"".join(map(self.pieces.__getitem__, self._rows(ids).tolist()))

    def _may_drop(self, joined: bytes) -> bool:
        is_own = self.keeps_spaces and joined[1:2] in (b"", b" ")
        return self.drops_space and joined.startswith(b" ") and not is_own

    def _spaced_ends(self, ids: Tensor, text: bytes) -> list[int] | None:
        """Ends of WordPiece tokens: whitespace before a word belongs to its first token."""
        ends, position = [], 0
        for token_id in self._rows(ids).tolist():
            piece = self.pieces[token_id]
            if piece.startswith(b" "):
                piece = piece[1:]
                if position < len(text):
                    run = _WHITESPACE.match(text, position)
                    assert run is not None, "a pattern that also matches nothing always matches"
                    position = run.end()
            if not text.startswith(piece, position) and not piece.startswith(text[position:]):
                return None
            position += len(piece)
            ends.append(position)
        return ends


def as_id_tensor(ids: Sequence[int] | Tensor) -> Tensor:  # (N,) int64
    """Token ids of a completion on the CPU."""
    try:
        if isinstance(ids, Tensor):
            tokens = ids.cpu().long()
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise TypeError(ids.dtype)
        elif len(ids) == 0:
            tokens = torch.empty(0, dtype=torch.int64, device="cpu")
        else:  # ten times as fast as torch.tensor(ids), which was half the time of an alignment
            tokens = torch.frombuffer(array("q", ids), dtype=torch.int64)
            if isinstance(next(iter(ids)), bool):  # a mask
                raise TypeError(bool)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            "as_id_tensor: whole numbers are expected as token ids of one completion, got "
            f"{repr(ids)[:60]} ({error}); pass a list of ids, or a tensor of int64."
        ) from error
    if tokens.ndim != 1 or (tokens < 0).any():
        smallest = min(tokens.flatten().tolist(), default=None)
        raise ValueError(
            "as_id_tensor: token ids of one completion, (N,) and not negative, are expected, got "
            f"shape {tuple(tokens.shape)}, smallest {smallest}; leave out prompt, padding and "
            "ignored labels."
        )
    return tokens


def _name(tokenizer: Any) -> str:
    path = getattr(tokenizer, "name_or_path", "")
    return f"{type(tokenizer).__name__} {path!r}" if path else type(tokenizer).__name__


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            "TokenBytes: a fast tokenizer (with a backend_tokenizer) is expected, got "
            f"{_name(tokenizer)}; pass processor.tokenizer, or load the tokenizer with "
            "use_fast=True."
        )
    return backend


def _is_prefix_pair(a: bytes, b: bytes) -> bool:
    return a.startswith(b) or b.startswith(a)


def _common_length(a: bytes, b: bytes) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def find_end_of_turn(tokenizer: Any) -> int | None:
    """The token with which the chat template ends a turn, else eos."""
    found = template_end_of_turn(tokenizer)
    return tokenizer.eos_token_id if found is None else found


def template_end_of_turn(tokenizer: Any) -> int | None:
    """The first added token that the chat template writes after an answer, or, where several stand
    there, the one that also ends the question; None where it writes none. It need not be special:
    some base models know <|im_end|> as text of their vocabulary.
    """
    if tokenizer.chat_template is None:
        return None
    question, answer, failure = "\ue000", "\ue001", None  # for private use: nothing changes them
    # Some templates take contents as text, some as lists of parts, and drop the other kind.
    for wrap in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        turns = [("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": wrap(text)} for role, text in turns]
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise errors of jinja2, which is not a dependency
            failure = error
            continue
        before, found, tail = rendered.rpartition(answer)
        if found:
            ends = _added_tokens(tokenizer, tail)
            of_question = _added_tokens(tokenizer, before.rpartition(question)[2])[:1]
            return next((i for i in ends if [i] == of_question), next(iter(ends), None))
    raise ValueError(
        f"TokenBytes: the chat template of {_name(tokenizer)} must render a question and its "
        f"answer, got {failure or 'no answer in the text'}; pass end_of_turn_id."
    ) from failure


def _added_tokens(tokenizer: Any, text: str) -> list[int]:
    """The first added tokens of a text, up to one that is none."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    added |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    is_end = [bool(added.get(i, "").strip()) for i in ids]
    first = is_end.index(True) if True in is_end else len(ids)
    run = takewhile(lambda pair: pair[1], zip(ids[first:], is_end[first:], strict=True))
    return [i for i, _ in run]
