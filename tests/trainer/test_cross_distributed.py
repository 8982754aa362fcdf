"""Two gloo processes distil across families as one does on the same global batch."""

import pytest

from support.cross_cases import make_sides
from support.processes import run_step


def test_two_processes_give_the_loss_and_weights_of_one(tmp_path):
    one = run_step("cross_distributed_step", tmp_path / "one", 1, 4, 1)
    two = run_step("cross_distributed_step", tmp_path / "two", 2, 1, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["log"]) == len(two["log"]) == 1, "both steps are in one window"
    assert two["log"][0] == pytest.approx(one["log"][0], rel=1e-5)
    # rows 0 and 2 are of the first process, 3 and 5 of the second
    counts = {"skipped_unspelled": 3, "skipped_no_common_end": 1}
    assert two["log"][0] == two["log"][0] | counts
    start = make_sides("lfm2_vl", "qwen3_vl")[0].model.state_dict()
    moved = 0
    for name, weight in one["weights"].items():
        step = (weight - start[name]).norm()
        error = (two["weights"][name] - weight).norm()
        # 1e-6: float32 rounding of weights near 1 that the step barely moves
        assert error <= 1e-4 * step + 1e-6, f"{name}: {error:.1e} after a step of {step:.1e}"
        moved += not weight.equal(start[name])
    assert moved > len(start) // 2
