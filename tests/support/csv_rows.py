"""Rows of a CSV file that a benchmark or a sweep wrote."""

import csv
from pathlib import Path


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
