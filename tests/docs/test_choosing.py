"""docs/choosing.md shows the tables that the CSV gives, and its prose no number beside theirs."""

import csv
import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from quality import rows, scales, table, text_rows, text_table

from gold_trainer import GOLDConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
TABLES = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)


def read(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def record() -> list[dict[str, str]]:
    return read(rows.OUTPUT)


@pytest.mark.parametrize("pair", rows.PAIRS)
def test_tables_of_accuracy_are_those_of_the_record(pair, record):
    assert table.compact(record, pair) + "\n" in TABLES


@pytest.mark.parametrize("student", ["small", "int4"])
def test_tables_of_text_are_those_of_the_record(student):
    assert text_table.markdown(read(text_rows.OUTPUT), student) + "\n" in TABLES


def test_no_loss_and_no_failure_of_the_record_is_left_out(record):
    names = {*(loss.name for loss in rows.LOSSES), *rows.LABELS, *rows.GIVEN}
    assert {row["loss"] for row in record} == names
    assert {row["loss"] for row in read(text_rows.OUTPUT)} == {
        *(*text_rows.LOSSES, *text_rows.GIVEN, "labels")
    } - {"uld"}  # that row is younger than this record
    assert {row["status"] for row in [*record, *read(text_rows.OUTPUT)]} == {"ok"}
    short = {line[1:4]: line.accuracies for line in table.lines_of(record) if line.tokens}
    assert [key for key, found in short.items() if len(found) != 3] == [
        ("chunk_likelihood", "on", "yes")
    ]


def beyond(better: list[float], worse: list[float]) -> bool:
    return min(better) > max(worse)


def test_what_the_page_says_is_beyond_the_spread_is(record):
    found = {line[:4]: line.accuracies for line in table.lines_of(record)}
    same = {key[1:]: found[key] for key in found if key[0] == "same"}
    cross = {key[1:]: found[key] for key in found if key[0] == "cross"}
    uld, seq_kd = cross["uld", "off", "yes"], cross["seq_kd", "off", "yes"]
    assert uld == max((v for k, v in cross.items() if k[0] == "uld"), key=max)
    assert all(beyond(cross[loss, "off", "no"], uld) for loss in ("p_kl", "hybrid_0", "h_kl"))
    assert not any(beyond(accuracies, seq_kd) for accuracies in cross.values())
    ahead = {k for k, v in same.items() if beyond(v, same["seq_kd", "off", "yes"])}
    assert ahead == {("teacher", "off", "yes"), ("jsd_0", "on", "yes")}
    assert beyond(same["before", "off", "yes"], same["labels", "off", "yes"])
    for pair in (same, cross):
        uld_alone = [v for k, v in pair.items() if k[0] == "uld" and k[2] == "no"]
        assert all(beyond(pair["before", "off", "yes"], v) for v in uld_alone)
    worse = set()
    for pair in (same, cross):
        for (loss, policy, crossentropy), accuracies in pair.items():
            if policy == "on":
                off = pair[loss, "off", crossentropy]
                assert not beyond(accuracies, off)
                worse |= {(loss, crossentropy)} if beyond(off, accuracies) else set()
    assert worse == {
        *(("uld", "yes"), ("chunk_likelihood", "no"), ("chunk_likelihood", "yes")),
        *(("jsd_0.5", "yes"), ("hybrid_0", "yes"), ("hybrid_0.5", "yes")),
    }
    text = {
        line[1:4]: line.values["perplexity"]
        for line in text_table.lines_of(
            [row for row in read(text_rows.OUTPUT) if row["student"] == "small"]
        )
    }
    best = text.pop(("jsd_0", "precise", "no"))
    assert all(k[0] == "teacher" or beyond(v, best) for k, v in text.items())
    for loss in {k[0] for k in text if k[0] in text_rows.LOSSES}:
        alone = best if loss == "jsd_0" else text[loss, "precise", "no"]
        assert beyond(text[loss, "precise", "yes"], alone) == (loss == "jsd_0")


def test_prose_and_the_decision_have_no_result_that_no_table_of_the_record_has():
    shown = set(re.findall(r"\d+\.\d+", "".join(t for t in TABLES if t.startswith("| loss "))))
    prose = re.sub(r"^\| (?:loss|name) .*\n(?:\|.*\n)+", "", PAGE, flags=re.M)
    assert "| your case | set |" in prose
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", prose)
    said = set(re.findall(r"\b\d+\.\d+\b", prose))
    assert said and said <= shown | {"0.01"}  # the weight of a cross-entropy


def test_losses_have_the_fields_that_the_page_says():
    fields = next(t for t in TABLES if t.startswith("| name | fields"))
    for loss in rows.LOSSES:
        line = next(x for x in fields.splitlines() if f"`{loss.name}`" in x)
        for name in loss.fields:
            assert f"`{name}" in line or "as `hybrid_0`" in line, (loss.name, name)


def test_what_the_decision_sets_is_known_to_the_trainer():
    decision = next(t for t in TABLES if t.startswith("| your case"))
    settings = [
        dict(re.findall(r"`(\w+): ([^`]+)`", line.split("|")[2]))
        for line in decision.splitlines()[2:]
    ]
    assert {frozenset(chosen) for chosen in settings} >= {frozenset({"beta"})}
    for chosen in settings:
        fields = {name: yaml.safe_load(value) for name, value in chosen.items()}
        GOLDConfig(output_dir="unused", report_to="none", bf16=False, **fields)


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
