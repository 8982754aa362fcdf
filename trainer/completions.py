"""Sample completions as a table in the console."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gold_trainer.batches import Example

PROMPT_CHARACTERS = 200


def print_completions(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    source: str,  # "student", "teacher" or "dataset"
    step: int,
    limit: int | None,
) -> None:
    """One line an example: dataset row, pictures, end of the prompt, completion with its end
    token.
    """
    table = Table(title=f"Step {step}: completions of the {source}", show_lines=True)
    for column in ("row", "pictures", "prompt", "completion"):
        table.add_column(column, overflow="fold")
    for example in examples[:limit]:
        table.add_row(
            example.where.removeprefix("row "),
            str(len(example.images)),
            Text(example.prompt_text[-PROMPT_CHARACTERS:]),
            Text(str(tokenizer.decode(example.written_ids))),
        )
    Console().print(table)
