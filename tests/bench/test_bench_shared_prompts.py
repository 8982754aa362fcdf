"""The record of steps whose rows share prompts, and what it is made with."""

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_shared_prompts as bench


def test_lengths_are_spread_evenly_or_all_the_same():
    assert bench.lengths_of("256") == [256] * 8
    assert bench.lengths_of("64-448") == [64, 118, 173, 228, 283, 338, 393, 448]


def test_a_tiny_case_is_measured_from_end_to_end(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    case = ["--tiny", "--cases", "216:1-3", "--modes", "padded", "shared", "--steps", "1"]
    monkeypatch.setattr(bench, "NUM_ROWS", 2)
    monkeypatch.setattr(sys, "argv", ["bench_shared_prompts", *case, "--output", str(path)])
    bench.main()
    with path.open(encoding="utf-8", newline="") as file:
        padded, shared = csv.DictReader(file)
    assert padded["status"] == shared["status"] == "ok"
    assert float(shared["gradient_difference"]) < 1e-5 and padded["gradient_difference"] == ""
    assert float(shared["loss_error"]) < 1e-5
    assert float(shared["first_loss"]) == pytest.approx(float(padded["first_loss"]), rel=1e-5)
