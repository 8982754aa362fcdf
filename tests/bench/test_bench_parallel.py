"""The benchmark of heads in slices runs with one process too; a wrong loss has no time."""

import sys
from pathlib import Path

import pytest

from support.csv_rows import csv_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_parallel

from support.processes import free_port


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """What torchrun sets."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


def test_every_loss_has_a_row_with_its_ratio_and_a_wrong_one_has_no_time(tmp_path, monkeypatch):
    def wrong(*tensors, process_group=None):
        factor = 1 if process_group is None else 2
        return factor * bench_parallel.fused_linear_jsd(*tensors)

    monkeypatch.setitem(bench_parallel.LOSSES, "skew_kl", wrong)
    out = tmp_path / "parallel.csv"
    arguments = ["--tiny", "--only", "jsd", "skew_kl", "--shapes", "8x100x8x12"]
    assert bench_parallel.main([*arguments, "--out", str(out)]) == 1
    rows = csv_rows(out)
    assert [row["loss"] for row in rows] == ["jsd", "skew_kl"] * 2
    for row in rows:
        if row["loss"] == "skew_kl":
            assert row["status"].startswith("refused") and not row["slices_ms"]
        else:
            ratio = float(row["slices_ms"]) / float(row["whole_ms"])
            assert row["status"] == "ok" and abs(float(row["ratio"]) / ratio - 1) < 0.01
