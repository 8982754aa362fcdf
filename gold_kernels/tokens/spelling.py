"""How the entries of a tokenizer's vocabulary become bytes.

The tokenizer's own definition says how tokens spell bytes: its decoder, or its pre-tokenizer if it
has no decoder. Known are byte-level BPE (GPT-2's alphabet), SentencePiece with or without byte
fallback, and WordPiece.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(NamedTuple):
    """How a tokenizer's entries become bytes."""

    to_bytes: Callable[[str], bytes]
    drops_space: bool  # the first token may start with a space that the text does not have
    has_fallback: bool = False  # <0x0A> is the byte 0x0A
    is_spaced: bool = False  # WordPiece: tokens do not say whether whitespace stood before a word
    has_plain_added: bool = False  # added tokens are written in characters, the others in bytes
    keeps_spaces: bool = False  # of drops_space: a text that begins with a space gets no other one


def _steps(component: Any) -> list[dict[str, Any]]:
    """The definition of a normalizer, pre-tokenizer or decoder, sequences flattened."""
    # The same JSON as in backend.to_str(), without half a second for the merges of 150k tokens.
    return [] if component is None else _flatten(json.loads(component.__getstate__()))


def _flatten(definition: dict[str, Any]) -> list[dict[str, Any]]:
    if definition["type"] != "Sequence":
        return [definition]
    parts = next(value for value in definition.values() if isinstance(value, list))
    return [step for part in parts for step in _flatten(part)]


def read_spelling(name: str, backend: Any) -> Spelling:
    pre_tokenizer = _steps(backend.pre_tokenizer)
    decoder = _steps(backend.decoder) or pre_tokenizer
    types = {step["type"] for step in decoder}
    drops_space = (
        any(step["type"] == "ByteLevel" and step["add_prefix_space"] for step in pre_tokenizer)
        or any(step["type"] == "Prepend" for step in _steps(backend.normalizer))
        or any(step["type"] == "Strip" and step["start"] > 0 for step in decoder)
        or any(
            step["type"] == "Metaspace" and step["prepend_scheme"] != "never"
            for step in (*pre_tokenizer, *decoder)
        )
    )
    if "ByteLevel" in types:
        # its decoder keeps all spaces, that of SentencePiece drops the first one
        keeps = len(types) == 1 and all(s["type"] != "Prepend" for s in _steps(backend.normalizer))
        return Spelling(_byte_level_piece, drops_space, has_plain_added=True, keeps_spaces=keeps)
    if "WordPiece" in types:
        prefix = next(step["prefix"] for step in decoder if step["type"] == "WordPiece")
        return Spelling(_word_piece(prefix), True, is_spaced=True)
    replacements = _replacements(decoder)
    if not replacements:
        raise ValueError(
            f"TokenBytes: {name} must be byte-level BPE, SentencePiece or WordPiece, got a decoder "
            f"of {sorted(types) or 'no steps'}; choose another tokenizer, or give it the decoder "
            "that it was made for."
        )
    has_fallback = "ByteFallback" in types
    return Spelling(_sentence_piece(replacements, has_fallback), drops_space, has_fallback)


def _replacements(decoder: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the decoder writes for what: a space for SentencePiece's U+2581."""
    metaspaces = [(s["replacement"], " ") for s in decoder if s["type"] == "Metaspace"]
    replaces = [s for s in decoder if s["type"] == "Replace" and "String" in s["pattern"]]
    return metaspaces + [(step["pattern"]["String"], step["content"]) for step in replaces]


def _byte_alphabet() -> dict[int, int]:
    """Character -> byte, as GPT-2 writes bytes. Printable Latin-1 characters stand for themselves;
    the other bytes are written from U+0100 on. A Latin-1 character that stands for no byte is
    mapped beyond Latin-1, so that encoding it fails.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(itself))
    alphabet = dict.fromkeys(others, 0xFFFF)
    return alphabet | {0x100 + i: byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # not all in the alphabet: plain text, as the decoder has it
        return token.encode()


def _sentence_piece(
    replacements: list[tuple[str, str]], has_fallback: bool
) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        if has_fallback and token.startswith("<0x"):
            match = FALLBACK.fullmatch(token)
            if match:
                return bytes([int(match[1], 16)])
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return token.encode()

    return to_bytes


def _word_piece(prefix: str) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        is_continued = token.startswith(prefix)
        return token[len(prefix) :].encode() if is_continued else b" " + token.encode()

    return to_bytes
