"""DeepSpeed's ZeRO on two processes gives the losses, norms and weights of DDP: what is beside the
product of test_engine_matrix.
"""

import pytest

from support.engine_matrix import ALONE, REFUSED
from support.engine_runs import assert_same_run, run_engine

EXACT = [name for name in ALONE if name not in ("bf16", "early_evaluation")]
# What ZeRO-2 does not do in another way than ZeRO-3 is left out.
OF_ZERO_2 = ["own_teacher", "mixed_media", "on_policy_rooms"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_engine(tmp_path_factory.mktemp("ddp") / "runs", "ddp", [*EXACT, "untied", "resumed"])


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    return run_engine(tmp_path_factory.mktemp("zero3") / "runs", "zero3", [*EXACT, "bf16"])


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    return run_engine(tmp_path_factory.mktemp("zero2") / "runs", "zero2", OF_ZERO_2)


@pytest.mark.parametrize("case", EXACT)
def test_zero_3_gives_the_run_of_ddp(ddp, zero3, case):
    assert_same_run(zero3[case], ddp[case], relative=1e-5)


@pytest.mark.parametrize("case", OF_ZERO_2)
def test_zero_2_gives_the_run_of_ddp(ddp, zero2, case):
    assert_same_run(zero2[case], ddp[case], relative=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_shipped_file_for_accelerate_launch_trains_and_resumes(ddp, stage, tmp_path):
    runs = run_engine(tmp_path / "runs", f"zero{stage}.yaml", ["resumed"])
    assert_same_run(runs["resumed"], ddp["resumed"], relative=1e-5)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_what_deepspeed_cannot_do_is_refused_with_a_remedy(engine, tmp_path):
    runs = run_engine(tmp_path / "runs", engine, ["early_evaluation"])
    error = runs["early_evaluation"]["error"].removeprefix("ValueError: ")
    assert error.startswith(REFUSED[engine, "early_evaluation"])
    assert "set eval_on_start=True" in error


def test_zero_3_trains_in_bfloat16(ddp, zero3):
    """Its copies of the weights are float32, what the model computes with is bfloat16."""
    losses, expected = zero3["bf16"]["losses"], ddp["untied"]["losses"]
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != expected
