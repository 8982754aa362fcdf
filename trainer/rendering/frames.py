"""What a chat template writes around the texts of an answer.

An answer has two texts, each of a kind: its content and its thoughts. What follows a prompt is made
of pieces: these texts, and the marks of the template around them.
"""

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from gold_trainer.data.messages import joined_text
from gold_trainer.data.thoughts import THOUGHT_KEYS

# Kinds of texts, named as most templates name their keys.
CONTENT, THOUGHTS = "content", "reasoning_content"
# Thoughts in the text of an answer, which the prompt may have opened, and a prompt that opens them.
INLINE = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
OPENED = re.compile(r"<think>\s*$")
CLOSE = "\n</think>\n\n"


class Piece(NamedTuple):
    """Part of what follows a prompt."""

    text: str
    is_mark: bool  # the template's, not the answer's
    key: str = ""  # kind of the text; a mark that the answer's author wrote has none


class Frame(NamedTuple):
    """What a template writes around the texts of an answer."""

    prompt: str
    keys: tuple[str, ...]  # kinds of the answer's texts, in the order in which they are written
    marks: tuple[str, ...]  # before, between and after them: one more than keys

    def pieces(self, texts: Mapping[str, str]) -> list[Piece]:
        """The marks with these texts between them."""
        pieces = [Piece(self.marks[0], True)]
        for key, mark in zip(self.keys, self.marks[1:], strict=True):
            pieces += [Piece(texts[key], False, key), Piece(mark, True)]
        return pieces

    def of_thoughts_alone(self) -> "Frame":
        """Up to the thoughts: their author stopped within them."""
        return Frame(self.prompt, self.keys[:1], (self.marks[0], ""))

    def cut(self, completion: str, texts: Mapping[str, str]) -> list[Piece] | None:
        """The pieces of a rendered completion; None where other marks are around its texts."""
        first, last = self.marks[0], self.marks[-1]
        if not self.keys:
            return [Piece(completion, True)] if completion == first else None
        if not (completion.startswith(first) and completion.endswith(last)):
            return None
        rest = completion[len(first) : len(completion) - len(last)]
        if len(completion) < len(first) + len(last):
            return None
        found: dict[str, str] = {}
        for key, mark in zip(self.keys[:-1], self.marks[1:-1], strict=True):
            forms = _trimmed_forms(texts[key])
            form = next((form for form in forms if rest.startswith(form + mark)), None)
            if form is None:
                return None
            found[key], rest = form, rest[len(form) + len(mark) :]
        if rest.strip() != texts[self.keys[-1]].strip():  # the template did more than trim it
            return None
        return self.pieces({**found, self.keys[-1]: rest})


class Frames(NamedTuple):
    """What a template writes around answers of a row; None where it cannot be told."""

    prompt: str = ""  # behind which a model writes
    plain: Frame | None = None  # of content alone
    thinking: Frame | None = None  # of thoughts and content, if the model writes thoughts

    def around(self, texts: Mapping[str, str]) -> Frame | None:
        """What is written around these texts; thoughts are left out where there is no place for
        them.
        """
        if self.thinking is not None and THOUGHTS in texts:
            return self.thinking if CONTENT in texts else self.thinking.of_thoughts_alone()
        return self.plain if CONTENT in texts else None


def of_one_kind(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with its thoughts under one key, whatever its author called them."""
    thoughts = next((answer[key] for key in THOUGHT_KEYS if answer.get(key)), None)
    if thoughts is None:
        return dict(answer)
    others = {key: value for key, value in answer.items() if key not in THOUGHT_KEYS}
    return {**others, THOUGHTS: thoughts}


def texts_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """The texts of an answer by kind."""
    texts = {THOUGHTS: answer.get(THOUGHTS), CONTENT: joined_text(answer.get(CONTENT))}
    return {
        key: text
        for key, text in texts.items()
        if isinstance(text, str) and (text or key == CONTENT)
    }


def without_inline_thoughts(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer with the thoughts that its content begins with under their own key, as templates
    that look for them read it.
    """
    content = joined_text(answer.get(CONTENT))
    match = INLINE.fullmatch(content) if content and not answer.get(THOUGHTS) else None
    if match is None:
        return []
    _, thoughts, tag, rest = match.groups()
    blank = tag[len(tag.rstrip()) :]  # not every template takes it away
    return [{**answer, THOUGHTS: thoughts, CONTENT: text} for text in (rest, blank + rest)]


def with_inline_thoughts(pieces: list[Piece]) -> list[Piece]:
    """Thoughts that an author wrote into the content are thoughts, and their tags no text."""
    if any(piece.key == THOUGHTS for piece in pieces):
        return pieces
    split = []
    for piece in pieces:
        match = INLINE.fullmatch(piece.text) if piece.key == CONTENT else None
        if match is None:
            split.append(piece)
            continue
        before, thoughts, between, content = match.groups()
        split += [Piece(before, False), Piece(thoughts, False, THOUGHTS)]
        split += [Piece(between, False), Piece(content, False, CONTENT)]
    return split


def read_as_thoughts(completion: str, end: str, forms: list[dict[str, Any]]) -> list[Piece] | None:
    """The pieces of a completion that begins with thoughts between tags; None for other thoughts
    than those of a form of the answer.
    """
    if not (end and completion.endswith(end)):
        return None
    pieces = with_inline_thoughts([Piece(completion[: -len(end)], False, CONTENT)])
    texts = {piece.key: piece.text.strip() for piece in pieces if piece.key}
    expected = ({kind: text.strip() for kind, text in texts_of(form).items()} for form in forms)
    return [*pieces, Piece(end, True)] if texts in expected else None


def common_length(a: str, b: str) -> int:
    """Characters with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _trimmed_forms(text: str) -> list[str]:
    """A text as templates trim it, the longest first."""
    core = text.strip()
    if not core:
        return [text, text.strip("\n"), ""]
    lead, _, trail = text.partition(core)
    return [
        before + core + behind
        for before in (lead, lead.lstrip("\n"), "")
        for behind in (trail, trail.rstrip("\n"), "")
    ]
