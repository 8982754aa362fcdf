"""The ULD benchmark runs on a CPU with small shapes, checks what it times, and loses no row."""

import math
import sys
from pathlib import Path

import pytest
import torch

from gold_kernels import fused_linear_uld, uld_loss
from gold_kernels.uld import reference as reference_uld
from support.csv_rows import csv_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_uld
import uld_pairs

UNEQUAL, EQUAL = "16x60x100x8x12", "16x80x80x8x12"


def run(path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    code = bench_uld.main(["--tiny", "--out", str(path), *arguments])
    return code, csv_rows(path)


def make_pair(n: int = 24) -> uld_pairs.Pair:
    generator = torch.Generator().manual_seed(0)
    shape = uld_pairs.Shape(n, 60, 100, 8, 12)
    return uld_pairs.make_pairs(uld_pairs.random_case(shape, generator), generator)[""]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("uld") / "uld.csv"
    code, rows = run(path)
    assert code == 0
    return path, rows


def test_every_implementation_has_a_row_with_time_and_memory(tiny_run):
    rows = tiny_run[1]
    assert [row["implementation"] for row in rows] == 2 * list(bench_uld.IMPLEMENTATIONS)
    for row in rows:
        assert row["status"] == "ok" and row["device"] and row["torch"] and row["git_sha"]
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["times_floor"]) > 0
        if row["implementation"].startswith("eager"):
            assert float(row["peak_mib"]) > 0


def test_each_of_ours_is_checked_and_near_convergence_only_where_sizes_are_equal(tiny_run):
    for row in tiny_run[1]:
        is_ours = row["implementation"] in bench_uld.OURS
        is_equal = row["V_s"] == row["V_t"]
        for field in bench_uld.ERROR_FIELDS:
            assert bool(row[field]) == (is_ours and (is_equal or not field.startswith("near_")))
        if is_ours and row["implementation"] != "gold_kernels_fast":
            # the torch backend sorts; what is left is float32, and bf16 in the fused gradients
            found = [float(row[field]) for field in bench_uld.ERROR_FIELDS if row[field]]
            limits = [1e-5, 1e-5, 1.0, 1e-5, 4e-3, 4e-3] * (3 if is_equal else 2)
            assert all(error <= limit for error, limit in zip(found, limits, strict=True))
            assert row["top64"] == "1.00e+00"


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("fused_linear_uld", lambda *a, **o: 1.01 * fused_linear_uld(*a, **o), "fused_loss"),
        ("uld_loss", lambda *a, **o: (1.03 * uld_loss(*a), uld_loss(*a, **o)[1]), "grad"),
    ],
)
def test_a_wrong_default_gets_no_time_where_sizes_differ(name, wrong, says, tmp_path, monkeypatch):
    monkeypatch.setattr(uld_pairs, name, wrong)
    only = ["--only", "floor", "gold_kernels", "--shapes"]
    code, rows = run(tmp_path / "uld.csv", *only, UNEQUAL, EQUAL)
    assert code == 1
    floor, refused, _, reported = rows
    assert floor["median_ms"] and refused["loss_error"] and not refused["median_ms"]
    assert refused["status"].startswith(f"refused: {says} error")
    assert reported["status"] == "ok" and reported["median_ms"]
    assert max(float(reported["grad_error"]), float(reported["fused_loss_error"])) > 9e-3


def test_an_error_that_is_nan_exceeds_its_limit():
    shape = uld_pairs.Shape.parse(UNEQUAL)
    good = uld_pairs.Errors(1e-5, 1e-2, 0.5, 1e-5, 1e-2, 1e-2)
    assert bench_uld.excess("gold_kernels", shape, {"": good, "peaked_": good}) == ""
    for field in set(good._fields) - {"top64"}:
        bad = good._replace(**{field: float("nan")})
        for found, says in (({"": bad}, field), ({"": good, "peaked_": bad}, f"peaked_{field}")):
            refusal = bench_uld.excess("gold_kernels", shape, found)
            assert refusal.startswith(f"refused: {says} error")
        for name in ("gold_kernels_fast", "gold_kernels_hybrid"):
            assert bench_uld.excess(name, shape, {"": bad}) == ""  # only reported


def test_out_of_memory_is_a_row_and_the_next_case_runs(tmp_path, monkeypatch):
    eager = bench_uld.eager

    def fail(case, dtype):
        if dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("no memory")
        return eager(case, dtype)

    monkeypatch.setattr(bench_uld, "eager", fail)
    only = ["--only", "eager_bf16", "eager_float32", "--shapes", UNEQUAL]
    code, rows = run(tmp_path / "uld.csv", *only)
    assert code == 0 and [row["status"] for row in rows] == ["out of memory", "ok"]
    assert not rows[0]["median_ms"] and rows[1]["median_ms"]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    def interrupt(case, dtype):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_uld, "eager", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "uld.csv", "--only", "floor", "eager_bf16", "--shapes", UNEQUAL)
    assert [row["implementation"] for row in csv_rows(tmp_path / "uld.csv")] == ["floor"]


def test_a_tiny_run_leaves_the_record_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_uld, "RESULTS", tmp_path)
    assert bench_uld.main(["--tiny", "--only", "floor", "--shapes", UNEQUAL]) == 0
    assert not list(tmp_path.iterdir())


def test_errors_see_a_wrong_row_of_the_last_copy(monkeypatch):
    pair = make_pair()  # three copies of 8 rows
    right = uld_pairs.errors(pair, None, None)
    assert right.fused_loss < 1e-5 and right.fused_grad_hidden < 4e-3
    weights = torch.full((24,), 1 / 24)
    weights[-1] = 0
    monkeypatch.setattr(
        uld_pairs,
        "fused_linear_uld",
        lambda *tensors, **options: fused_linear_uld(*tensors, weights, **options),
    )
    lost = uld_pairs.errors(pair, None, None)
    assert lost.fused_loss > 1e-2 and min(lost.fused_grad_hidden, lost.fused_grad_weight) > 1e-2


@pytest.mark.parametrize("is_hybrid", [False, True])
def test_the_oracle_is_the_reference_from_hidden_states(is_hybrid):
    pair, generator = make_pair(), torch.Generator().manual_seed(1)
    overlap = uld_pairs.random_overlap(uld_pairs.Shape.parse(UNEQUAL), generator)
    assert overlap.num_matched == 36 == overlap.teacher_ids.unique().shape[0]
    overlap = overlap if is_hybrid else None
    case = [tensor.detach().double() for tensor in pair.case]
    case[0].requires_grad_()
    loss = reference_uld.linear_uld(*case, **uld_pairs.loss_options(overlap))
    (grad_hidden,) = torch.autograd.grad(loss, case[0])
    rows, grad = uld_pairs.oracle(pair.student_logits, pair.teacher_logits, overlap)
    torch.testing.assert_close(rows.mean(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad @ case[1] / 3, grad_hidden[16:], rtol=1e-9, atol=1e-15)


def test_the_near_converged_teacher_is_the_student_with_one_per_cent_of_noise():
    generator = torch.Generator().manual_seed(0)
    case = uld_pairs.random_case(uld_pairs.Shape(8, 500, 500, 16, 24), generator)
    pairs = uld_pairs.make_pairs(case, generator)
    random, near = pairs[""], pairs["near_"]
    assert torch.equal(random.student_logits, near.student_logits)
    distance = (near.teacher_logits - near.student_logits).norm() / near.student_logits.norm()
    assert float(distance) == pytest.approx(0.01, rel=0.1)


def test_a_peaked_row_has_most_of_its_entries_far_below_one_in_v():
    generator = torch.Generator().manual_seed(0)
    case = uld_pairs.random_case(uld_pairs.Shape(8, 4096, 6000, 64, 64), generator)
    peaked = uld_pairs.make_pairs(case, generator)["peaked_"]
    for logits in (peaked.student_logits, peaked.teacher_logits):
        log_probs = logits.log_softmax(-1) + math.log(logits.shape[1])
        assert float(log_probs.median()) < -6
        assert float(logits.softmax(-1).amax(-1).mean()) > 0.1


@pytest.mark.parametrize("text", ["64x100x90x8", "64x100xax8x8", "0x10x20x4x4", "8x50x50x8x4"])
def test_a_shape_that_cannot_be_read_says_so(text):
    with pytest.raises(ValueError, match=f"expected NxV_sxV_txD_sxD_t, .* got {text}; write"):
        uld_pairs.Shape.parse(text)


def test_without_a_gpu_it_says_what_to_pass(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_uld.main([])
    assert "pass --tiny" in capsys.readouterr().err
