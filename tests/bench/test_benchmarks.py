"""The benchmark of the JSD runs anywhere, finds wrong results, survives failing peers and loses no
row.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gold_kernels import fused_linear_jsd
from support.csv_rows import csv_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_jsd
import jsd_pairs
import peers
import plots

SHAPE = "32x1009x8x12"  # with the other arguments about a second in all
SMALL = ["--tiny", "--shapes", SHAPE, "--betas", "0.5"]


def run(path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    code = bench_jsd.main([*SMALL, "--out", str(path), *arguments])
    return code, csv_rows(path)


def make_pair(n: int = 24) -> jsd_pairs.Pair:
    generator = torch.Generator().manual_seed(0)
    shape = jsd_pairs.Shape(n, 301, 8, 12)
    case = jsd_pairs.random_case(shape, generator, torch.float64, is_frozen=False)
    return jsd_pairs.random_and_near_converged(case, 0.5, generator)[0]


def test_every_case_gets_a_row_with_times_and_errors(tmp_path):
    code, rows = run(tmp_path / "jsd.csv", "--only", "floor", "gold_kernels", "eager")
    assert code == 0
    assert [(row["implementation"], row["head"]) for row in rows if row["part"] == "shapes"] == [
        (name, head) for head in bench_jsd.HEADS for name in ("floor", "gold_kernels", "eager")
    ]
    assert {row["budget_bytes"] for row in rows if row["part"] == "budgets"} == {str(1 << 20)}
    for row in rows:
        assert row["status"] == "ok" and row["device"] and row["git_sha"]
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        if row["implementation"] != "floor":
            assert float(row["times_floor"]) > 0 and float(row["grad_hidden_error"]) > 0
            assert (row["grad_weight_error"] == "") == (row["head"] == "frozen")
    ours, eager = (
        [row for row in rows if row["implementation"] == name] for name in ("gold_kernels", "eager")
    )
    assert float(ours[0]["near_loss_error"]) < 5e-3 < 1 < float(eager[0]["near_loss_error"])


def test_ours_beyond_its_error_limit_gets_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_jsd, "fused_linear_jsd", lambda *args, **options: 1.01 * fused_linear_jsd(*args)
    )
    code, rows = run(tmp_path / "jsd.csv", "--only", "gold_kernels", "--heads", "frozen")
    assert code == 1
    assert all(row["status"].startswith("refused: loss error 1.0e-02") for row in rows)
    assert rows and not any(row["median_ms"] for row in rows)


def test_an_error_that_is_nan_exceeds_its_limit():
    good, bad = jsd_pairs.Errors(1e-6, 2e-3, None), jsd_pairs.Errors(1e-6, float("nan"), None)
    assert bench_jsd.excess("gold_kernels", [good, good]) == ""
    assert bench_jsd.excess("gold_kernels", [bad, good]).startswith("refused: grad_hidden error")
    assert bench_jsd.excess("gold_kernels", [good, bad]).startswith("refused: near grad_hidden")
    assert bench_jsd.excess("gold_kernels_fast", [good, bad]) == ""  # only reported


def test_a_failing_peer_costs_its_row_only(tmp_path, monkeypatch):
    def fail(case, beta):
        raise torch.OutOfMemoryError("no memory\nand a second line")

    monkeypatch.setitem(peers.PEERS, "trl", fail)
    only = ("--heads", "frozen", "--only", "trl", "eager")
    code, rows = run(tmp_path / "jsd.csv", *only)
    assert code == 0
    assert [row["status"] for row in rows] == ["OutOfMemoryError: no memory", "ok"]


@pytest.mark.parametrize(("name", "package"), [("trl", "trl"), ("liger", "liger_kernel")])
def test_peers_run_on_a_cpu_where_they_are_installed(name, package, tmp_path):
    code, rows = run(tmp_path / "jsd.csv", "--heads", "trainable", "--only", name)
    assert code == 0 and len(rows) == 1
    if find_spec(package) is None:
        assert rows[0]["status"].startswith("ModuleNotFoundError")
    else:
        assert rows[0]["status"] == "ok"
        # bfloat16 logits cost Liger its loss; an error of 1 would be a call with swapped sides
        assert float(rows[0]["loss_error"]) < 0.1 and float(rows[0]["grad_weight_error"]) < 0.1


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    def interrupt(case, beta):
        raise KeyboardInterrupt

    monkeypatch.setitem(peers.PEERS, "trl", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "jsd.csv", "--only", "eager", "trl")
    assert [row["implementation"] for row in csv_rows(tmp_path / "jsd.csv")] == ["eager"]


def test_compilers_do_not_start_when_time_is_up(tmp_path):
    names = [*peers.COMPILED, "eager"]
    code, rows = run(tmp_path / "jsd.csv", "--seconds", "0", "--heads", "frozen", "--only", *names)
    assert code == 0
    assert [row["status"] for row in rows] == ["ok", *["not run: 0 s were over"] * 2]


def test_a_tiny_run_leaves_the_record_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_jsd, "RESULTS", tmp_path)
    assert bench_jsd.main([*SMALL, "--only", "floor"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["64x100x8", "64x100x8x4", "64x100xax8"])
def test_a_shape_that_cannot_be_read_says_so(text):
    with pytest.raises(ValueError, match=f"expected NxVxD_sxD_t with D_t >= D_s, got {text}"):
        jsd_pairs.Shape.parse(text)


def test_without_a_gpu_only_tiny_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none; --tiny"):
        bench_jsd.main(["--quick"])


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_eager_in_float64_is_the_oracle(beta):
    generator = torch.Generator().manual_seed(0)
    shape = jsd_pairs.Shape(24, 301, 8, 12)
    case = jsd_pairs.random_case(shape, generator, torch.float64, is_frozen=False)
    for pair in jsd_pairs.random_and_near_converged(case, beta, generator):
        found = jsd_pairs.errors(pair, peers.eager(pair.case, beta))
        # the stored answer is float32
        assert found.loss < 1e-9 and found.grad_hidden < 1e-6 and found.grad_weight < 1e-6


def test_errors_see_a_wrong_last_row_and_a_wrong_factor():
    pair = make_pair(n=192)  # three copies of 64 rows
    case = pair.case
    scaled = jsd_pairs.errors(pair, lambda: 1.01 * peers.eager(case, 0.5)())
    assert scaled == pytest.approx((0.01, 0.01, 0.01), rel=1e-4)
    weights = torch.full((192,), 1 / 192, dtype=torch.float64)
    weights[-1] = 0
    lost = jsd_pairs.errors(pair, lambda: fused_linear_jsd(*case, weights))
    assert lost.grad_hidden > 0.02 and lost.loss > 1e-3


def test_near_converged_logits_differ_by_one_per_cent_of_the_weight():
    generator = torch.Generator().manual_seed(0)
    shape = jsd_pairs.Shape(64, 301, 16, 24)
    case = jsd_pairs.random_case(shape, generator, torch.float64, is_frozen=False)
    case = jsd_pairs.near_converged_case(case, generator)
    student, teacher = (case[i].detach() @ case[i + 1].detach().T for i in (0, 2))
    assert case.teacher_hidden.shape == (64, 24) and case.teacher_weight.shape == (301, 24)
    assert float((teacher - student).norm() / student.norm()) == pytest.approx(0.01, rel=0.1)


def test_plots_are_drawn_from_the_csv_alone(tmp_path):
    path = tmp_path / "jsd.csv"
    options = ["--shapes", SHAPE, "16x1009x8x12", "32x503x8x8", "--betas", "0.5", "0"]
    run(path, *options, "--heads", "frozen", "--only", "floor", "gold_kernels")
    drawn = plots.draw_all(path, tmp_path / "plots")
    assert [picture.name for picture in drawn] == [
        "jsd_rows.png",
        "jsd_budget.png",
        "jsd_error.png",
    ]
    assert all(picture.stat().st_size > 10_000 for picture in drawn)


def test_a_line_joins_the_measured_cases_and_leaves_out_failed_ones():
    axes = plots.plt.figure().add_subplot()
    row = {"implementation": "trl", "p20_ms": 1.0, "p80_ms": 4.0}
    rows = [row | {"N": n, "median_ms": ms} for n, ms in ((256, 3.0), (64, 2.0), (1024, None))]
    plots.draw_lines(axes, rows, "N", "median_ms")
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [64, 256] and line.get_ydata().tolist() == [2.0, 3.0]
    plots.plt.close("all")


def test_plots_of_an_empty_csv_say_so(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("part,implementation\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected rows in .*empty.csv, got none; run bench_jsd"):
        plots.read_rows(path)


@pytest.mark.parametrize("loss", ["jsd", "uld"])
def test_cases_of_pytest_benchmark_run(loss):
    options = ["--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    path = Path(bench_jsd.__file__).with_name(f"test_speed_of_{loss}.py")
    with torch.compiler.set_stance("force_eager"):  # a compiler takes 10 s a case
        assert pytest.main([str(path), *options]) == 0
