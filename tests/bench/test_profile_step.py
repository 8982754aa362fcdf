"""The record of steps beside each other: its columns, and that all modes take the same step."""

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import profile_step
from record import RESULTS


def test_all_modes_of_the_record_have_one_loss_and_one_gradient():
    with (RESULTS / "train_step_compiled.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and set(rows[0]) == set(profile_step.FIELDS)
    for row in rows:
        first = next(
            other
            for other in rows
            if all(other[name] == row[name] for name in ("loss", "completion_tokens"))
        )
        assert row["mode"] in profile_step.MODES and row["status"] == "ok"
        assert float(row["first_loss"]) == pytest.approx(float(first["first_loss"]), rel=1e-4)
        assert float(row["grad_norm"]) == pytest.approx(float(first["grad_norm"]), rel=5e-3)


def test_a_compiled_step_of_the_record_needs_no_more_memory_than_others():
    with (RESULTS / "train_step_compiled.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["micro_batches"] == "1"]
    peaks = {(r["mode"], (r["loss"], r["completion_tokens"])): float(r["peak_gib"]) for r in rows}
    compiled = {case: peak for (mode, case), peak in peaks.items() if mode == "regional"}
    assert len(compiled) >= 3
    for case, peak in compiled.items():
        assert all(peak <= peaks.get((mode, case), peak) for mode in ("off", "trl"))
