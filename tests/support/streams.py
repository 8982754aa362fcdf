"""A dataset of torch without a length."""

from collections.abc import Iterator
from typing import Any

import torch


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)
