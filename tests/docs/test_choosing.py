"""docs/choosing.md shows the tables that the CSV gives, and its prose no number beside theirs."""

import csv
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import rows, scales, table

PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
TABLES = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def record() -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / rows.OUTPUT).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("pair", rows.PAIRS)
def test_tables_of_accuracy_are_those_of_the_record(pair, record):
    assert table.compact(record, pair) + "\n" in TABLES


def test_every_run_of_the_record_is_in_a_table(record):
    assert {row["status"] for row in record} == {"ok"}
    assert {row["loss"] for row in record} == {*(x.name for x in rows.LOSSES), *rows.LABELS} | {
        *rows.GIVEN
    }
    cells = sum(len(re.findall(r"(?<=\| )\d+\.\d(?= \|)", t)) for t in TABLES)
    assert cells > len(table.lines_of(record))


def test_prose_has_no_result_that_no_table_has():
    shown = set(re.findall(r"\d+\.\d+", "".join(TABLES)))
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", re.sub(r"(?:^\|.*\n)+", "", PAGE, flags=re.M))
    said = set(re.findall(r"\b\d+\.\d+\b", prose))
    assert said and said <= shown | {"0.01"}  # the weight of a cross-entropy


def test_losses_have_the_fields_that_the_page_says():
    fields = next(t for t in TABLES if t.startswith("| name | fields"))
    for loss in rows.LOSSES:
        line = next(x for x in fields.splitlines() if f"`{loss.name}`" in x)
        for name in loss.fields:
            assert f"`{name}" in line or "as `hybrid_0`" in line, (loss.name, name)


def test_sizes_of_the_experiment_are_those_of_the_record(record):
    run = next(row for row in record if row["loss"] == "jsd_0")
    scale = scales.RECORD
    text = " ".join(PAGE.split())
    for expected in (
        f"{run['steps']} steps of {run['batch_size']} pictures, drawn from {scale.prompts:,}",
        f"a learning rate of {float(run['learning_rate']):.0e}".replace("e-0", "e-"),
        f"{scale.labelled:,} labelled pictures",
        f"{scale.held_out:,} questions",
        f"weight of {rows.loss_of('chunk_likelihood').crossentropy_weight}, all others 1",
    ):
        assert expected in text, expected
    teacher = next(row for row in record if row["loss"] == "teacher")
    assert f"{int(teacher['parameters']) / 1e6:.0f}M" in text
    assert f"{int(run['parameters']) / 1e6:.0f}M" in text
