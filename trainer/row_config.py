"""Fields of GOLDConfig for rows: columns that are left out, and pictures that are let in."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class RowFields:
    """What a row may hold. A column that nothing uses is an error unless it is named here."""

    dataset_ignore_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns to leave out; any other that nothing uses is an error."},
    )
    max_pixels: int | None = field(
        default=8192 * 8192,  # MAX_PIXELS of pictures.py, as the help shows it
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

    def check_rows(self) -> None:
        if self.picture_folder is not None and not Path(self.picture_folder).is_dir():
            raise ValueError(
                "GOLDConfig: picture_folder must be a folder that exists, got "
                f"{self.picture_folder!r}; None lets paths start from the dataset's folder."
            )
