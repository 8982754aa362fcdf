"""What rows are, from a sample of them: conversations or plain text, and how many tokens.

Pictures and videos are neither read nor counted.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from gold_trainer.data.columns import MEDIA, TEACHER_VIEW, as_conversation
from gold_trainer.data.dataset import RowDataset, conversations
from gold_trainer.data.messages import parsed_messages

NUM_ROWS = 64
SECONDS = 2.0  # a dataset that reads slowly is looked at less
NO_TEXTS = ("role", "from", "type")  # keys whose values are no text of their own


class RowSample(NamedTuple):
    num_plain: int
    num_conversations: int
    lengths: list[int]  # tokens of the texts of each row, without the chat template

    @property
    def is_mixed(self) -> bool:
        return self.num_plain > 0 and self.num_conversations > 0

    @property
    def tokens(self) -> int:
        """Tokens of the middle row by length."""
        return round(statistics.median(self.lengths)) if self.lengths else 0

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def mixture(self) -> str:
        return (
            f"of two kinds: of {self.num_plain + self.num_conversations} looked at, "
            f"{self.num_conversations} are conversations, which get the chat template, and "
            f"{self.num_plain} are plain text, taken as it stands; text_as_messages makes "
            "conversations of all"
        )


def sample_rows(rows: RowDataset, tokenizer: Any) -> RowSample:
    """Rows that stand evenly over the dataset; those that cannot be read are left to the run."""
    texts: list[str] = []
    num_plain = 0
    columns_of, started = conversations(rows.rows), time.monotonic()
    step = max(1, -(-len(columns_of) // NUM_ROWS))
    for index in range(0, len(columns_of), step):
        if texts and time.monotonic() - started > SECONDS:
            break
        try:
            columns = rows.reader.columns(columns_of[index])
            others = (*MEDIA[0], *MEDIA[1], *TEACHER_VIEW)
            texts_alone = {k: v for k, v in columns.items() if k not in others}
            row = as_conversation(texts_alone, index)
        except Exception:  # of the dataset's own code too; the row says so when it is read
            continue
        says = parsed_messages(row.get("messages", row.get("prompt")))
        if isinstance(says, str | list | tuple):
            # a model with pictures makes messages of plain text
            num_plain += isinstance(says, str) and rows.reader.is_text
            # no tokenizer takes a lone surrogate; the row is refused when it is read
            texts.append(" ".join(_texts(row)).encode("utf-8", "replace").decode())
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
    return RowSample(num_plain, len(texts) - num_plain, lengths)


def _texts(value: Any) -> list[str]:
    """All that a row says: contents, thoughts, calls and schemas of tools."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for k, part in value.items() if k not in NO_TEXTS for text in _texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return []
