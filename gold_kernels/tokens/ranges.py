"""Where the texts of a completion stand among its tokens; the others are marks of a chat template.

N tokens of a completion, n tokens of a text.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gold_kernels.tokens.token_bytes import TokenBytes

SIDES = ("student", "teacher")


class TokenRange(NamedTuple):
    """The tokens of one text within a completion."""

    first: int
    stop: int
    lead: int = 0  # bytes of the first token that stand before the text

    def of(self, ids: Tensor) -> Tensor:  # (N,) -> (n,)
        return ids[self.first : self.stop]

    def text_rows(self, table: TokenBytes, ids: Tensor) -> Tensor:  # (N,) -> rows, ascending
        """Rows of text: without special tokens, which spell nothing."""
        return table.is_text(self.of(ids)).nonzero().squeeze(1) + self.first


class TextPair(NamedTuple):
    """One text, which both sides have."""

    student: TokenRange
    teacher: TokenRange
    text: bytes | None = None  # None: what the tokens of the ranges spell


def check_texts(texts: Sequence[TextPair], num_student: int, num_teacher: int) -> None:
    """One behind the other on both sides."""
    last = [0, 0]
    for text in texts:
        if not isinstance(text, TextPair):
            raise ValueError(
                f"CompletionAligner.align: texts must be TextPairs, got {type(text).__name__}; "
                "pass [TextPair(TokenRange(...), TokenRange(...))]."
            )
        ranges = (text.student, num_student), (text.teacher, num_teacher)
        for place, ((first, stop, _), size) in enumerate(ranges):
            if not last[place] <= first <= stop <= size:
                raise ValueError(
                    f"CompletionAligner.align: texts must be ranges of the {SIDES[place]}'s "
                    f"{size} tokens, one behind the other, got {first} to {stop} behind "
                    f"{last[place]}; pass those of this completion in order."
                )
            last[place] = stop
