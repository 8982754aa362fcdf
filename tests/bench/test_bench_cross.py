"""The benchmark of losses of two tokenizers, on tiny shapes."""

import sys
from pathlib import Path

import pytest
import torch

from support.csv_rows import csv_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_cross


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "cross.csv"
    assert bench_cross.main(["--tiny", "--out", str(path)]) == 0
    return {row["implementation"]: row for row in csv_rows(path)}


def test_every_loss_is_timed_beside_its_eager_form(rows):
    assert set(rows) == set(bench_cross.IMPLEMENTATIONS)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert all(float(row["times_floor"]) > 0 for row in rows.values())


def test_ours_are_held_to_float64(rows):
    for name, row in rows.items():
        errors = [row[field] for field in bench_cross.ERRORS]
        assert all(errors) == (name in bench_cross.OURS)


def test_a_loss_that_is_off_gets_no_time(monkeypatch):
    monkeypatch.setattr(bench_cross, "MAX_LOSS_ERROR", 0.0)
    inputs = bench_cross.make_inputs(bench_cross.Shape(16, 30, 50, 8, 8), 0, "cpu")
    columns = bench_cross.measure("projected_jsd", inputs, 1)
    assert columns["status"].startswith("refused") and "median_ms" not in columns
    assert torch.isfinite(torch.tensor(float(columns["loss_error"])))
