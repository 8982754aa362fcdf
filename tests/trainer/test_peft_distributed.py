"""Two gloo processes train an adapter whose student is its own teacher as one does."""

import pytest

from support.processes import run_step

pytest.importorskip("peft")


def test_two_processes_give_the_loss_and_adapter_of_one(tmp_path):
    one = run_step("peft_distributed_step", tmp_path / "one", 1, 4, 1)
    two = run_step("peft_distributed_step", tmp_path / "two", 2, 1, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["eval_losses"] == pytest.approx(one["eval_losses"], rel=1e-5)
    assert 1e-3 < one["eval_losses"][1] < one["eval_losses"][0]
    parts = (".visual.", ".language_model.", "lm_head.modules_to_save.")
    assert all(any(part in name for name in one["trained"]) for part in parts)
    for name, weight in one["weights"].items():
        assert two["start"][name].equal(one["start"][name]), f"{name}: another adapter"
        step = (weight - one["start"][name]).norm()
        error = (two["weights"][name] - weight).norm()
        assert error <= 1e-4 * step, f"{name}: {error:.1e} after a step of {step:.1e}"
        assert (step > 0) == (name in one["trained"]), name
