"""Why a row cannot be used: ValueErrors that know their reason, and what takes a row's place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

MAX_SHOWN = 300  # characters


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


class ColumnsError(ValueError):
    """A column that nobody knows: no row is left out for it, whatever on_bad_row says."""


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, in ASCII, and not all of a long one."""
    return _cut(ascii(value))


def told(error: Exception) -> str:
    """What another library's error says, in one line."""
    return _cut(str(error)) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error that goes on with a trace or advice, as compilers' do."""
    return str(error).partition("\n")[0] or type(error).__name__


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[: MAX_SHOWN - 3]}..."


@contextmanager
def reading(index: int, dataset: str) -> Iterator[None]:
    """Around a dataset's own code, which may decode pictures: its errors name the row."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("row "):
            raise
        raise ValueError(
            f"row {index}: the {dataset} cannot give it ({type(error).__name__}: {told(error)}); "
            "mend or drop the row."
        ) from error


def renamed(error: ValueError, message: str) -> ValueError:
    """An error of the same reason."""
    kind = type(error) if isinstance(error, RowError | ColumnsError) else ValueError
    return kind(message)


# As the log names them.
REASONS = ("long_prompt", "picture", "template", "no_answer", "other")


@dataclass(frozen=True)
class BadRow:
    """Stands in the place of a row that is left out."""

    index: int  # row of the dataset
    reason: str
    message: str

    @classmethod
    def of(cls, index: int, error: ValueError) -> "BadRow":
        """Raises what is no row's own fault."""
        if isinstance(error, ColumnsError):
            raise error
        return cls(index, error.reason if isinstance(error, RowError) else "other", str(error))
