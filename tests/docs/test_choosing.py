"""docs/choosing.md shows the tables that the CSV gives, and its prose no number beside theirs."""

import re
import sys
from pathlib import Path
from statistics import mean

import pytest
import yaml

from support.csv_rows import csv_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from quality import rate_rows, rate_table, rows, scales, table, text_rows, text_table

from gold_trainer import GOLDConfig

WEIGHTS = "quality_weights.csv"
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
TABLES = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)


def read(name: str) -> list[dict[str, str]]:
    return csv_rows(ROOT / "benchmarks" / "results" / name)


@pytest.fixture(scope="module")
def record() -> list[dict[str, str]]:
    return read(rows.OUTPUT)


@pytest.mark.parametrize("pair", rows.PAIRS)
def test_tables_of_accuracy_are_those_of_the_record(pair, record):
    assert table.compact(record, pair) + "\n" in TABLES


@pytest.mark.parametrize("pair", rows.PAIRS)
def test_tables_of_learning_rates_on_pictures_are_those_of_the_record(pair):
    assert rate_table.markdown(read(rate_rows.OUTPUT), pair) + "\n" in TABLES


@pytest.mark.parametrize("student", ["small", "int4"])
def test_tables_of_text_are_those_of_the_record(student):
    assert text_table.markdown(read(WEIGHTS), student) + "\n" in TABLES


def test_the_table_of_learning_rates_is_that_of_the_record():
    assert text_table.rates(read(WEIGHTS)) + "\n" in TABLES


def test_no_loss_and_no_failure_of_the_record_is_left_out(record):
    names = {*(loss.name for loss in rows.LOSSES), *rows.LABELS, *rows.GIVEN}
    assert {row["loss"] for row in record} == names
    of_text = {*text_rows.LOSSES, *text_rows.GIVEN, "labels"}
    assert {row["loss"] for row in read(WEIGHTS)} == of_text
    assert {row["loss"] for row in read(text_rows.OUTPUT)} == of_text - {"uld"}  # which is younger
    everything = [*record, *read(rate_rows.OUTPUT), *read(WEIGHTS), *read(text_rows.OUTPUT)]
    assert {row["status"] for row in everything} == {"ok"}
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
    for pair, half in ((same, "jsd_0.5"), (cross, "hybrid_0.5")):
        for policy in rows.POLICIES:
            first = pair[half.replace("0.5", "0"), policy, "no"]
            assert mean(first) > mean(pair[half, policy, "no"])
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


def test_what_the_page_says_of_learning_rates_on_pictures_is_so():
    record = read(rate_rows.OUTPUT)
    cases = [case for case in rate_rows.cases_of([0, 1, 2]) if case.loss not in rows.GIVEN]
    run = [row for row in record if row["loss"] not in rows.GIVEN]
    text = " ".join(PAGE.split())
    assert f"Of {len(cases)} runs {len(run)} were begun in time" in text
    rate = scales.RATES_RECORD.learning_rate
    assert f"multiples of {rate:.0e}".replace("e-0", "e-") in text
    for row in run:
        assert float(row["learning_rate"]) == pytest.approx(rate * float(row["rate"]))
    for pair in rows.PAIRS:
        curves = rate_table.curves_of(record, pair)
        before, uld = curves["before"][1.0].accuracies, curves["uld"]
        assert [len(uld[factor].accuracies) for factor in rate_rows.ULD_FACTORS] == [3] * 5
        assert max(uld, key=lambda factor: uld[factor].mean) == min(rate_rows.ULD_FACTORS)
        for factor, line in uld.items():
            assert not beyond(line.accuracies, before)
            assert beyond(before, line.accuracies) == (factor >= 0.1)
        for loss in rate_rows.COMPARED[pair]:
            assert max(curves[loss], key=lambda factor: curves[loss][factor].mean) == 1.0
            assert {len(line.accuracies) for line in curves[loss].values()} <= {1, 2}


def of_text(name: str, student: str, measure: str) -> dict[tuple[str, ...], list[float]]:
    """(loss, precision, crossentropy) -> a value of each seed."""
    own = [row for row in read(name) if row["student"] == student and row["loss"] != "teacher"]
    return {line[1:4]: line.values[measure] for line in text_table.lines_of(own)}


def is_ahead(key: tuple[str, ...], values: dict[tuple[str, ...], list[float]]) -> bool:
    """Below all others, beyond the spread."""
    others = (v for k, v in values.items() if k != key)
    return all(beyond(other, values[key]) for other in others)


ALONE, BESIDE = ("jsd_0", "precise", "no"), ("jsd_0", "precise", "yes")


def test_what_the_page_says_of_text_is_so():
    kl, perplexity = (of_text(WEIGHTS, "small", name) for name in ("kl", "perplexity"))
    for values in (kl, perplexity):
        assert mean(values[ALONE]) < mean(values["jsd_0.5", "precise", "no"])
    assert is_ahead(ALONE, kl) and is_ahead(BESIDE, perplexity)
    before, labels = perplexity["before", "precise", "no"], perplexity["labels", "", "yes"]
    assert not beyond(before, perplexity[ALONE])
    assert not beyond(labels, perplexity["uld", "precise", "yes"])
    for loss in text_rows.LOSSES:
        assert len(kl[loss, "precise", "no"]) == 3 and len(kl[loss, "precise", "yes"]) == 2
        assert beyond(perplexity[loss, "precise", "no"], perplexity[loss, "precise", "yes"])
    rated = [row for row in read(WEIGHTS) if row["student"] == "small" and row["seed"] == "0"]
    at = {
        (loss, float(row["rate"])): row
        for row in rated
        for loss in ("uld", "jsd_0", "labels")
        if row["loss"] == loss and (row["crossentropy"] == "no" or loss == "labels")
    }
    uld = [float(row["perplexity"]) for (loss, _), row in at.items() if loss == "uld"]
    assert len(uld) == 5 and min(uld) > before[0]
    for loss, best in (("labels", 0.3), ("jsd_0", 3.0)):
        for measure in ("perplexity", "kl"):
            own = {r: float(row[measure]) for (name, r), row in at.items() if name == loss}
            assert min(own, key=own.__getitem__) == best, (loss, measure)


def test_what_the_page_says_of_four_bits_is_so():
    kl, perplexity = (of_text(WEIGHTS, "int4", name) for name in ("kl", "perplexity"))
    precise, *others = (kl["jsd_0", name, "no"] for name in text_rows.PRECISIONS)
    assert not any(
        beyond(a, b) for other in others for a, b in ((precise, other), (other, precise))
    )
    before, labels = ("before", "precise", "no"), ("labels", "", "yes")
    assert beyond(kl[labels], kl[before]) and beyond(kl[before], precise)
    (teacher,) = (float(r["perplexity"]) for r in read(WEIGHTS) if r["loss"] == "teacher")
    assert max(perplexity[labels]) < teacher


def test_what_the_page_says_of_the_older_record_is_so():
    kl, perplexity = (of_text(text_rows.OUTPUT, "small", name) for name in ("kl", "perplexity"))
    assert is_ahead(ALONE, kl) and is_ahead(ALONE, perplexity)
    assert beyond(perplexity[BESIDE], perplexity[ALONE])
    int4 = of_text(text_rows.OUTPUT, "int4", "perplexity")
    assert beyond(int4["labels", "", "yes"], int4["before", "precise", "no"])
    precise, *others = (int4["jsd_0", name, "no"] for name in text_rows.PRECISIONS)
    assert not any(
        beyond(a, b) for other in others for a, b in ((precise, other), (other, precise))
    )


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
