"""The benchmark of the training step runs on a CPU with tiny models, checks ours before it is timed
and loses no row.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.csv_rows import csv_rows

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_train_step as bench
from record import RESULTS

NUM_TOKENS, NAN = 24, float("nan")
TINY = ["--tiny", "--completion-tokens", str(NUM_TOKENS)]


def test_a_case_in_its_own_process_leaves_a_row_with_time_and_error(tmp_path):
    path = tmp_path / "step.csv"
    options = ["--implementations", "gold_kernels", "--loss", "uld", "--output", str(path)]
    assert bench.main([*TINY, *options]) == 0
    (row,) = csv_rows(path)
    assert (row["implementation"], row["loss"]) == ("gold_kernels", "uld")
    assert row["completion_tokens"] == str(NUM_TOKENS) and row["status"] == "ok"
    assert float(row["seconds_median"]) > 0 and float(row["grad_norm"]) > 0
    assert float(row["loss_error"]) < 1e-5  # float32 on a CPU
    assert row["device"] and row["torch"] and row["git_sha"]


@pytest.mark.parametrize(
    ("loss", "factor", "found"),
    [("jsd", 1.01, "1.0e-02"), ("uld", 1.01, "1.0e-02"), ("uld", NAN, NAN)],
)
def test_ours_beyond_its_error_limit_gets_no_time(loss, factor, found, monkeypatch):
    compute_loss = bench.GOLDTrainer.compute_loss
    monkeypatch.setattr(
        bench.GOLDTrainer, "compute_loss", lambda *args, **options: factor * compute_loss(*args)
    )
    row = bench.measure(bench.Case("gold_kernels", loss, NUM_TOKENS), 0.0, is_tiny=True)
    assert row["status"].startswith(f"refused: loss error {found} exceeds")
    assert "seconds_median" not in row


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 1037, 8192])
def test_a_sample_has_the_completion_tokens_it_is_named_for_each_a_group(num_tokens, tmp_path):
    case = bench.Case("gold_kernels", "uld", num_tokens)
    trainer = bench.build_trainer(case, str(tmp_path), is_tiny=True)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    groups = batch.alignment.groups
    assert groups.num_groups == groups.num_student_rows == 2 * num_tokens
    assert batch.alignment.skip_reasons == [None, None]


def test_ours_come_first_and_each_loss_has_its_lengths():
    cases = bench.cases_of(bench.parse_options(["--tiny"]))
    expected = {"gold_kernels": [518, 1037, 2060, 8192], "trl": [518, 1037, 2060]}
    assert cases == [
        bench.Case(name, loss, length)
        for name, lengths in expected.items()
        for loss in ("jsd", "uld")
        for length in lengths
    ]
    only_uld = bench.cases_of(bench.parse_options(["--tiny", "--loss", "uld"]))
    assert only_uld == [case for case in cases if case.loss == "uld"]


def test_out_of_memory_at_any_point_is_a_row(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = bench.Case("trl", "uld", NUM_TOKENS)
    monkeypatch.setattr(bench, "build_trainer", fail)
    row = bench.measure(case, 0.0, is_tiny=True)
    assert row["status"] == "out of memory" and row["device"] and row["loss"] == "uld"
    assert bench.is_as_expected(row)
    assert not bench.is_as_expected(row | {"implementation": "gold_kernels"})


def test_a_process_that_dies_costs_its_row_only(tmp_path, monkeypatch):
    codes = iter((-9, 0))

    def run(command, **options):
        return subprocess.CompletedProcess(command, next(codes), 'noise\n{"status": "ok"}\n')

    monkeypatch.setattr(bench.subprocess, "run", run)
    path = tmp_path / "step.csv"
    options = ["--implementations", "trl", "--output", str(path)]
    assert bench.main([*TINY, *options]) == 1
    assert [row["status"] for row in csv_rows(path)] == ["failed with -9", "ok"]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    rows = iter([{"implementation": "gold_kernels", "loss": "jsd", "status": "ok"}])

    def interrupt(*args):
        for row in rows:
            return row
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_in_own_process", interrupt)
    path = tmp_path / "step.csv"
    with pytest.raises(KeyboardInterrupt):
        bench.main([*TINY, "--output", str(path)])
    assert [row["status"] for row in csv_rows(path)] == ["ok"]


def test_what_time_is_not_left_for_is_stopped_or_does_not_start(tmp_path):
    path = tmp_path / "step.csv"
    options = ["--seconds", "0.2", "--implementations", "gold_kernels", "--output", str(path)]
    assert bench.main([*TINY, *options]) == 1
    stopped, not_run = (row["status"] for row in csv_rows(path))
    assert stopped == "stopped: 0.2 s were over" and not_run == "not run: 0.2 s were over"


def test_a_tiny_run_leaves_the_record_alone(monkeypatch):
    assert bench.parse_options(["--tiny"]).output is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.parse_options([]).output == RESULTS / "train_step.csv"


def test_without_a_gpu_only_tiny_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="a CUDA GPU is expected, got none; --tiny"):
        bench.main([])


def test_the_record_has_the_columns_that_are_written_now():
    rows = csv_rows(RESULTS / "train_step.csv")
    assert rows and set(rows[0]) == set(bench.FIELDS)
    assert {row["loss"] for row in rows} == {"jsd", "uld"}
    assert all((row["status"] == "ok") == bool(row["seconds_median"]) for row in rows)
