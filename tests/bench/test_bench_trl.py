"""The record of trl's trainers: a patched case counts only beside the same loss of trl."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench = pytest.importorskip("bench_trl", reason="trl is of the extra dev")


def row(patched, first_loss, **fields):
    numbers = {"status": "ok", "seconds_median": 1.0, "first_loss": first_loss, "grad_norm": "1"}
    return {"trainer": "gold", "loss": "jsd", "patched": patched, **numbers, **fields}


def test_a_patched_case_with_another_loss_has_no_numbers():
    before = [row("no", "0.20000")]
    assert bench.checked(row("yes", "0.20010"), before) == row("yes", "0.20010")
    refused = bench.checked(row("yes", "0.21000"), before)
    assert refused["status"] == "refused: first loss 0.21 where trl has 0.2"
    assert "seconds_median" not in refused and "first_loss" not in refused
    assert bench.checked(row("yes", "nan"), before)["status"].startswith("refused")
    other = row("yes", "0.21000", trainer="stable")
    assert bench.checked(other, before) == other


def test_every_patched_case_has_its_trl_before_it():
    seen = set()
    for case in bench.CASES:
        if case.is_patched:
            assert (case.trainer, case.loss) in seen
        seen.add((case.trainer, case.loss))


def test_without_a_gpu_it_says_what_runs_anywhere(monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="a CUDA GPU is expected, got none; --tiny runs anywhere"):
        bench.main([])
