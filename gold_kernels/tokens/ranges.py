"""Where the texts of a completion stand among its tokens; the others are marks of a chat template.

N tokens of a completion, n tokens of a text.
"""

from typing import NamedTuple

from torch import Tensor

from gold_kernels.tokens.token_bytes import TokenBytes


class TokenRange(NamedTuple):
    """The tokens of one text within a completion."""

    first: int
    stop: int
    lead: int = 0  # bytes of the first token that stand before the text

    def of(self, ids: Tensor) -> Tensor:  # (N,) -> (n,)
        return ids[self.first : self.stop]

    def text_rows(self, table: TokenBytes, ids: Tensor) -> Tensor:  # (N,) -> rows, ascending
        """Without special tokens, which spell nothing."""
        return table.is_text(self.of(ids)).nonzero().squeeze(1) + self.first


class TextPair(NamedTuple):
    """One text, which both sides have."""

    student: TokenRange
    teacher: TokenRange
    text: bytes | None = None  # None: what the tokens of the ranges spell
