"""Two gloo processes train as one does on the same global batch."""

import pytest

from support.processes import run_step
from support.tiny_models import tiny


def test_two_processes_give_the_loss_and_weights_of_one(tmp_path):
    """Rows with one, two and no pictures; some micro-batches leave a rank without any picture. Both
    runs evaluate first, which must not leave the model without DDP. Tokens are weighed, and the
    teacher has views of its own.
    """
    one = run_step("distributed_step", tmp_path / "one", 1, 4, 1)
    two = run_step("distributed_step", tmp_path / "two", 2, 1, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["eval_losses"] == pytest.approx(one["eval_losses"], rel=1e-5)
    start = tiny("qwen3_vl")[0].state_dict()
    for name, weight in one["weights"].items():
        step = (weight - start[name]).norm()
        error = (two["weights"][name] - weight).norm()
        # 1e-6: float32 rounding of weights near 1 that the step barely moves
        assert error <= 1e-4 * step + 1e-6, f"{name}: {error:.1e} after a step of {step:.1e}"
    moved = [name for name, weight in one["weights"].items() if not weight.equal(start[name])]
    assert any("visual" in name for name in moved)
    assert any("language_model" in name for name in moved)
