"""Why a row cannot be used: ValueErrors that know their reason, and what takes a row's place."""

from dataclasses import dataclass
from typing import ClassVar


class RowError(ValueError):
    """A row is refused; the message has row, key and remedy."""

    reason: ClassVar[str] = "other"


class LongPromptError(RowError):
    reason = "long_prompt"


class PictureError(RowError):
    reason = "picture"


class TemplateError(RowError):
    reason = "template"


class NoAnswerError(RowError):
    reason = "no_answer"


def renamed(error: ValueError, message: str) -> ValueError:
    """An error of the same reason."""
    return type(error)(message) if isinstance(error, RowError) else ValueError(message)


# As the log names them.
REASONS = ("long_prompt", "picture", "template", "no_answer", "other")


@dataclass(frozen=True)
class BadRow:
    """In the place of a row that is left out."""

    index: int  # row of the dataset
    reason: str
    message: str

    @classmethod
    def of(cls, index: int, error: ValueError) -> "BadRow":
        return cls(index, error.reason if isinstance(error, RowError) else "other", str(error))
