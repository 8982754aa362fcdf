"""The benchmark of rollouts: which cases run, and what a row of each has."""

import sys
from pathlib import Path

import pytest

from support.csv_rows import csv_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_rollout


@pytest.fixture
def measured(monkeypatch):
    """Cases that were measured, all alike."""
    cases = []

    def measure(case, is_tiny):
        cases.append(case)
        numbers = {"tokens_per_second": 9.0, "first_write_seconds": 3.0, "compile_seconds": 2.0}
        return {**case._asdict(), "status": "ok", **numbers}

    monkeypatch.setattr(bench_rollout, "measure", measure)
    monkeypatch.setattr(bench_rollout, "greedy_tokens_agree", lambda is_tiny: "same")
    return cases


def run(path, *cases):
    code = bench_rollout.main(["--tiny", "--one-process", "--output", str(path), "--cases", *cases])
    return code, csv_rows(path)


def test_of_cases_that_share_a_process_the_first_alone_has_a_cold_call(measured, tmp_path):
    code, rows = run(tmp_path / "r.csv", "local-full-4", "generate-full-4", "local-float32-2")
    assert code == 0 and [case.training for case in measured] == ["full", "full", "float32"]
    assert [row["first_write_seconds"] for row in rows] == ["3.0", "", ""]
    assert [row["compile_seconds"] for row in rows] == ["2.0", "", ""]
    assert {row["tokens_per_second"] for row in rows} == {"9.0"}


def test_nothing_of_ours_is_measured_where_its_tokens_are_others(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rollout, "greedy_tokens_agree", lambda is_tiny: "row 0 differs")
    code, rows = run(tmp_path / "r.csv", "local-full-4", "trl-full-4")
    assert code == 1 and [case.implementation for case in measured] == ["trl"]
    assert rows[0]["status"] == "refused: greedy tokens: row 0 differs"


def test_cases_of_vllm_are_left_out_where_it_is_not_installed(
    measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench_rollout, "find_spec", lambda name: None)
    _, rows = run(tmp_path / "r.csv", "vllm-full-4", "local-full-4")
    assert [row["implementation"] for row in rows] == ["local"]
    assert "vllm is not installed here: its cases are left out" in capsys.readouterr().out
    monkeypatch.setattr(bench_rollout, "find_spec", lambda name: object())
    _, rows = run(tmp_path / "r2.csv", "vllm-full-4", "local-full-4")
    assert [row["implementation"] for row in rows] == ["vllm", "local"]


@pytest.mark.parametrize("case", ["local-half-4", "peft-full-4"])
def test_an_unknown_case_is_refused_with_one_that_is_known(case, tmp_path):
    with pytest.raises(SystemExit, match=f"a case is expected, .* local-full-16, got {case}"):
        run(tmp_path / "r.csv", case)
