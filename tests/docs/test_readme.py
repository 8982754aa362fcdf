"""README is short, and each number of its table is the one in benchmarks/results/."""

import re
from pathlib import Path

import pytest

from support.csv_rows import csv_rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
JSD = {
    "part": "shapes",
    "head": "trainable",
    "N": "4096",
    "V": "151936",
    "D_s": "2048",
    "D_t": "4096",
    "beta": "0.5",
}
STEP = {"completion_tokens": "1037", "batch_size": "4"}
COLUMNS = ("gold_kernels", "trl", "liger_compiled", "eager")
MODES = {"regional": "gold_kernels", "trl": "trl", "off": "layers that are not compiled"}
# rows of the table: file, cases, column of the file, format of the number
ROWS = (
    ("jsd.csv", JSD, "median_ms", ".1f"),
    ("jsd.csv", JSD, "peak_extra_mib", ".0f"),
    ("jsd.csv", JSD, "near_grad_hidden_error", ".2g"),
    ("train_step_compiled.csv", STEP | {"loss": "jsd"}, "seconds_median", ".2f"),
    ("train_step_compiled.csv", STEP | {"loss": "uld"}, "seconds_median", ".2f"),
)


def table() -> list[list[str]]:
    """Cells of README's first table, without its head and without the names of its rows."""
    lines = re.search(r"(?:^\|.*\n)+", README, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")][1:] for line in lines[2:]]


def implementation_of(row: dict[str, str]) -> str:
    return row["implementation"] if "implementation" in row else MODES[row["mode"]]


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_readme_links_every_page():
    own = {"index.md", "notes.md"}  # README itself, and benchmarks/NOTES.md
    pages = [f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if page.name not in own]
    assert pages and [page for page in pages if f"({page}" not in README] == []


def test_table_has_at_most_five_rows_and_five_columns_of_one_number_each():
    cells = table()
    assert len(cells) == len(ROWS) == 5
    for row in cells:
        assert len(row) == len(COLUMNS) == 4
        assert all(re.fullmatch(r"|[\d.]+", cell) for cell in row), row


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_numbers_of_a_row_are_those_of_the_record(index):
    file, case, column, style = ROWS[index]
    record = [row for row in csv_rows(RESULTS / file) if case.items() <= row.items()]
    for name, cell in zip(COLUMNS, table()[index], strict=True):
        found = [row for row in record if implementation_of(row) == name]
        assert len(found) == (1 if cell else 0), f"{name}: {found}"
        if found:
            assert float(cell) == float(format(float(found[0][column]), style))
            assert found[0]["device"] == "NVIDIA H200"
            assert found[0]["torch"].startswith("2.11") and found[0]["triton"].startswith("3.6")
