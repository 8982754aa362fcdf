"""The ULD benchmark runs on a CPU with small shapes, and refuses wrong results."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_uld
import plots


def test_every_implementation_has_a_row_with_time_and_errors(tmp_path, capsys):
    assert bench_uld.main(["--tiny", "--rep-ms", "1", "--out", str(tmp_path / "uld.csv")]) == 0
    with (tmp_path / "uld.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == 2 * list(bench_uld.IMPLEMENTATIONS)
    assert {row["status"] for row in rows} == {"ok"} and all(row["median_ms"] for row in rows)
    eager = [row for row in rows if row["implementation"].startswith("eager")]
    assert all(float(row["peak_mib"]) > 0 for row in eager)
    ours = [row for row in rows if row["implementation"] == "gold_kernels"]
    assert all(float(row["loss_error"]) < 1e-5 and float(row["top64"]) == 1 for row in ours)
    assert not ours[0]["near_loss_error"] and float(ours[1]["near_grad_error"]) < 1e-3
    assert capsys.readouterr().out.count("\n") == len(rows)
    (picture,) = plots.draw_all(tmp_path / "uld.csv", tmp_path)
    assert picture.name == "uld_rows.png" and picture.stat().st_size > 10_000


def test_a_wrong_kernel_gets_no_time(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_uld, "kernel_errors", lambda *_: [2e-4, 1e-3, 1.0])
    arguments = ["--tiny", "--rep-ms", "1", "--only", "gold_kernels", "--out"]
    assert bench_uld.main([*arguments, str(tmp_path / "uld.csv")]) == 1
    text = (tmp_path / "uld.csv").read_text(encoding="utf-8")
    assert "refused: errors 2.0e-04" in text


def test_without_a_gpu_it_says_what_to_pass(capsys):
    if bench_uld.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench_uld.main([])
    assert "pass --tiny" in capsys.readouterr().err
