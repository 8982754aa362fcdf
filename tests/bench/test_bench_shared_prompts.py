"""The record of steps whose rows share prompts, and what it is made with."""

import sys
from pathlib import Path

import pytest

from support.csv_rows import csv_rows

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_shared_prompts as bench


def lengths_of(completion, num_steps=3):
    writer = bench.KnownWriter(completion, 7)
    written = [writer.complete(["a prompt"], None) for _ in range(num_steps)]
    return [[len(completion.token_ids) for completion in step[0]] for step in written]


def test_lengths_are_all_the_same_or_drawn_anew_in_each_step():
    assert lengths_of("256") == [[256] * 8] * 3
    steps = lengths_of("64-448")
    assert steps == lengths_of("64-448") and steps[0] != steps[1] != steps[2]
    assert all(64 <= length <= 448 for step in steps for length in step)


def test_a_tiny_case_is_measured_from_end_to_end(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    case = ["--tiny", "--cases", "216:1-3", "--modes", "padded", "shared", "--steps", "1"]
    monkeypatch.setattr(bench, "NUM_ROWS", 2)
    monkeypatch.setattr(sys, "argv", ["bench_shared_prompts", *case, "--output", str(path)])
    bench.main()
    padded, shared = csv_rows(path)
    assert padded["status"] == shared["status"] == "ok"
    assert float(shared["gradient_difference"]) < 1e-5 and padded["gradient_difference"] == ""
    assert float(shared["loss_error"]) < 1e-5
    assert float(shared["first_loss"]) == pytest.approx(float(padded["first_loss"]), rel=1e-5)
