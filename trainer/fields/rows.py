"""Fields of GOLDConfig for rows: columns to leave out, pictures to let in, rows that are bad."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gold_trainer.data.row_errors import REASONS
from gold_trainer.fields.checks import as_dict

TRAIN_ON = ("last", "all")
# Arguments of apply_chat_template that are the trainer's own, and what says the same here.
RESERVED = {
    "tools": "the column `tools`",
    "add_generation_prompt": "where the prompt ends",
    "continue_final_message": "a prompt that ends with an assistant's message",
    "chat_template": "the template of the processor, which decides what ends a turn,",
    **dict.fromkeys(("conversation", "messages"), "the row's messages"),
    **dict.fromkeys(("max_length", "truncation"), "the config field `max_length`"),
    **dict.fromkeys(
        (
            *("tokenize", "padding", "return_tensors", "return_dict", "tokenizer_kwargs"),
            *("processor_kwargs", "return_assistant_tokens_mask"),
        ),
        "nothing",
    ),
}

ON_BAD_ROW = ("error", "skip")
ON_LONG_PROMPT = ("error", "skip", "truncate_left")


@dataclass
class RowFields:
    """What a row may hold. A column that nothing uses is an error unless it is named here."""

    dataset_ignore_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns to leave out; any other that nothing uses is an error."},
    )
    train_on: str = field(
        default="last",
        metadata={
            "help": "Which of an assistant's messages are learnt: the last of a row, or all, each "
            "as an example of its own behind the messages before it.",
            "choices": TRAIN_ON,
        },
    )
    max_pixels: int | None = field(
        default=67_108_864,  # 8192 x 8192, MAX_PIXELS of data/pictures.py
        metadata={
            "help": "Most pixels of a picture's file; a larger one is an error before it is "
            "decoded. None: PIL's own limit of 178956970, which holds in any case."
        },
    )
    picture_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder that paths of pictures start from and may not leave, links followed. "
            "None: they start from the dataset's folder, or from the current one, and may lead "
            "anywhere."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat templates of both sides, for instance "
            '{"enable_thinking": false}; those of a row win over these.'
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "A row that cannot be used: error stops; skip leaves it out and counts it in "
            "the log by its reason.",
            "choices": ON_BAD_ROW,
        },
    )
    on_long_prompt: str = field(
        default="error",
        metadata={
            "help": "A prompt of max_length tokens or more: error makes its row one that cannot be "
            "used; skip leaves the row out and counts it; truncate_left keeps the last max_length "
            "- max_completion_length tokens, of text only.",
            "choices": ON_LONG_PROMPT,
        },
    )

    @property
    def skipped_reasons(self) -> tuple[str, ...]:
        """Why a row may be left out."""
        if self.on_bad_row == "skip":
            return REASONS
        return ("long_prompt",) if self.on_long_prompt == "skip" else ()

    def check_rows(self) -> None:
        refuse_reserved(as_dict(self.chat_template_kwargs), "GOLDConfig")
        folder = self.picture_folder  # '' would be the current one
        if folder is not None and not (folder and Path(folder).is_dir()):
            raise ValueError(
                "GOLDConfig: picture_folder must be a folder that exists, got "
                f"{folder!r}; None lets paths start from the dataset's folder."
            )


def refuse_reserved(template_kwargs: Mapping[str, Any], where: str) -> None:
    """ValueError for arguments of the chat template that would undo what the trainer does."""
    taken = next((name for name in template_kwargs if name in RESERVED), None)
    if taken is not None:
        raise ValueError(
            f"{where}: chat_template_kwargs must hold what only the chat template reads, got "
            f"{taken!r}, which is the trainer's own; drop it: {RESERVED[taken]} stands for it."
        )
