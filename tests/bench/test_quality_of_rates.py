"""The table of learning rates: a run has the rate of its row, one seed of everything comes first,
and teacher and students are schooled side by side.
"""

import csv
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_quality as bench
from quality import rate_rows, rate_table, rows, scales, tasks

from support.inline_pool import Inline


@pytest.fixture(autouse=True)
def inline(monkeypatch) -> None:
    monkeypatch.setattr(bench.Workers, "_new", lambda self: Inline())
    monkeypatch.setitem(rate_rows.SCALES, "small", scales.TINY)


def test_a_run_of_each_kind_leaves_a_row_with_its_rate(tmp_path):
    path = tmp_path / "rates.csv"
    options = ["--task", "rates", "--small", "--folder", str(tmp_path), "--output", str(path)]
    assert bench.main(options) == 0
    found = bench.rows_of(path)
    keys = [tuple(row[key] for key in rows.KEYS) for row in found]
    assert sorted(keys) == sorted(case.key for case in rate_rows.small_cases())
    assert {row["status"] for row in found} == {"ok"}
    for row in found:
        if row["loss"] not in rows.GIVEN:
            expected = scales.TINY.learning_rate * float(row["rate"])
            assert float(row["learning_rate"]) == pytest.approx(expected)


def test_the_teacher_and_students_begin_at_once_and_the_other_workers_rehearse(
    tmp_path, monkeypatch
):
    order = []

    def submit(self, place, task, *arguments):
        order.append((place, task.args[0], *arguments[2:]))
        return Inline().submit(task, *arguments)

    monkeypatch.setattr(bench.Workers, "submit", submit)
    for name in ("school_teacher", "school_student", "rehearse"):
        monkeypatch.setattr(tasks, name, partial(lambda name, *args: {}, name))
    options = bench.parse_options(["--task", "rates", "--small", "--rehearse"])
    bench.school_all(bench.Workers(4, rate_rows.TURNS), tmp_path, scales.TINY, options)
    students = [(2, "school_student", "idefics3"), (1, "school_student", "llava")]
    rehearsals = [(place, "rehearse", rate_rows.TURNS[place % 2]) for place in (1, 2, 3)]
    assert order == [(0, "school_teacher"), *students, *rehearsals]


def test_one_seed_of_everything_comes_first_then_the_others_of_uld():
    cases = rate_rows.cases_of([0, 1, 2])
    assert len({case.key for case in cases}) == len(cases)
    assert [case.rank for case in cases] == sorted(case.rank for case in cases)
    assert {case.loss for case in cases if case.rank == 1} == {"uld"}
    for pair in rows.PAIRS:
        of_uld = [case for case in cases if case.loss == "uld" and case.pair == pair]
        assert sorted({case.rate for case in of_uld}) == [0.03, 0.1, 0.3, 1.0, 3.0]
        assert len(of_uld) == 3 * 5
        for loss in rate_rows.COMPARED[pair]:
            own = [case for case in cases if (case.pair, case.loss) == (pair, loss)]
            assert len(own) == 3 * 3
            assert {case.crossentropy for case in own} == {"yes" if loss == "seq_kd" else "no"}


def fake_row(loss: str, seed: int, rate: float, accuracy: float) -> dict[str, str]:
    row = dict.fromkeys(bench.fields_of(rate_rows), "") | {"pair": "cross", "policy": "off"}
    row |= {"loss": loss, "seed": str(seed), "rate": str(rate), "status": "ok"}
    return row | {"accuracy": str(accuracy), "crossentropy": "no"}


def test_the_table_has_a_mean_for_each_rate_and_a_blank_where_none_was_run(tmp_path):
    found = [fake_row("before", 0, 1.0, 0.3), fake_row("teacher", 0, 1.0, 0.9)]
    found += [fake_row("uld", seed, 0.1, 0.2 + 0.1 * seed) for seed in (0, 1)]
    found += [fake_row("uld", 0, 1.0, 0.0), fake_row("p_kl", 0, 1.0, 0.4)]
    found.append(fake_row("p_kl", 1, 1.0, 0.9) | {"status": "ValueError: no"})
    text = rate_table.report(found, tmp_path / "rates.png")
    assert "| loss | 0.1 x | 1 x | spread | seeds |" in text
    assert "| `uld` | 25.0 | 0.0 | 10.0 | 1 |" in text  # the fewest seeds
    assert "| `p_kl` |  | 40.0 |  | 1 |" in text
    cross = text.split("two tokenizers")[1]
    assert cross.index("teacher") < cross.index("p_kl") < cross.index("before") < cross.index("uld")
    with Image.open(tmp_path / "rates.png") as picture:
        assert min(picture.size) > 200


def test_the_plot_of_a_record_goes_to_the_docs_however_its_path_is_written(tmp_path, monkeypatch):
    results, plots = tmp_path / "results", tmp_path / "images"
    for folder in (results, plots):
        folder.mkdir()
    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(bench, "PLOTS", plots)
    monkeypatch.chdir(tmp_path)
    with (results / "rates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, bench.fields_of(rate_rows))
        writer.writeheader()
        writer.writerow(fake_row("uld", 0, 1.0, 0.2))
    assert bench.main(["--task", "rates", "--report", "--output", "results/rates.csv"]) == 0
    assert [path.name for path in plots.iterdir()] == ["rates.png"]
    assert [path.name for path in results.iterdir()] == ["rates.csv"]
