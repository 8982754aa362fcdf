"""FSDP2 and DeepSpeed's ZeRO on two processes give the losses, norms and weights of DDP: what is
beside the product of test_engine_matrix.
"""

from importlib.util import find_spec

import pytest
import torch

from gold_trainer import configs
from support.engine_matrix import ALONE, REFUSED
from support.engine_runs import assert_same_run, run_engine

BFLOAT16 = ("bf16", "bf16_own_teacher")
EIGHT_BITS = ("adamw_8bit",) if find_spec("torchao") else ()
OF_ZERO_3 = [
    *(name for name in ALONE if name not in ("bf16", "early_evaluation")),
    *("own_top_k", "shared_prompts"),
]
OF_FSDP = [name for name in OF_ZERO_3 if name != "saved_tied_head"]
# What ZeRO-2 does not do in another way than ZeRO-3 is left out.
OF_ZERO_2 = ["own_teacher", "mixed_media", "on_policy_rooms"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    names = [*OF_ZERO_3, *BFLOAT16, *EIGHT_BITS, "untied", "resumed", "compiled"]
    return run_engine(tmp_path_factory.mktemp("ddp") / "runs", "ddp", names)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    names = [*OF_FSDP, *BFLOAT16, *EIGHT_BITS, "compiled", "early_evaluation", "saved_tied_head"]
    return run_engine(tmp_path_factory.mktemp("fsdp") / "runs", "fsdp2", names)


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    names = [*OF_ZERO_3, "bf16", "early_evaluation"]
    return run_engine(tmp_path_factory.mktemp("zero3") / "runs", "zero3", names)


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    names = [*OF_ZERO_2, "early_evaluation"]
    return run_engine(tmp_path_factory.mktemp("zero2") / "runs", "zero2", names)


@pytest.mark.parametrize("case", OF_FSDP)
def test_fsdp_gives_the_run_of_ddp(ddp, fsdp, case):
    assert_same_run(fsdp[case], ddp[case], relative=1e-5)


@pytest.mark.parametrize("case", OF_ZERO_3)
def test_zero_3_gives_the_run_of_ddp(ddp, zero3, case):
    assert_same_run(zero3[case], ddp[case], relative=1e-5)


@pytest.mark.parametrize("case", OF_ZERO_2)
def test_zero_2_gives_the_run_of_ddp(ddp, zero2, case):
    assert_same_run(zero2[case], ddp[case], relative=1e-5)


def test_layers_in_parts_are_compiled(ddp, fsdp):
    """Their weights are gathered by hooks, which are around what is compiled."""
    assert_same_run(fsdp["compiled"], ddp["compiled"], relative=1e-5)
    kinds = ["Qwen3DecoderLayer of the student", "Qwen3DecoderLayer of the teacher"]
    assert ddp["compiled"]["compiled"] == kinds
    assert fsdp["compiled"]["compiled"] == [f"FSDP{kinds[0]}", kinds[1]]


@pytest.mark.parametrize("case", EIGHT_BITS)
def test_moments_in_8_bits_are_those_of_ddp(ddp, fsdp, case):
    """Weights may differ by what 8 bits round: a part of one is cut into other blocks of 256."""
    for name in ("losses", "norms", "eval_loss"):
        assert fsdp[case][name] == pytest.approx(ddp[case][name], rel=1e-4), name


@pytest.mark.parametrize("case", BFLOAT16)
def test_a_loss_under_bfloat16_is_not_rounded_to_it(ddp, fsdp, case):
    """FSDP casts what a model returns. Its weights are bfloat16 in more places than autocast's."""
    assert_same_run(fsdp[case], ddp[case], relative=1e-2)
    for loss in fsdp[case]["losses"]:
        assert torch.tensor(loss).bfloat16().item() != loss


def test_zero_3_trains_in_bfloat16(ddp, zero3):
    """Its copies of the weights are float32, what the model computes with is bfloat16."""
    losses, expected = zero3["bf16"]["losses"], ddp["untied"]["losses"]
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != expected


@pytest.mark.parametrize("file", ["fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def test_the_shipped_file_for_accelerate_launch_trains_and_resumes(ddp, file, tmp_path):
    """That of FSDP2 saves checkpoints of parts, which end in a whole model."""
    is_in_parts = "SHARDED_STATE_DICT" in (configs.FOLDER / file).read_text()
    assert is_in_parts == file.startswith("fsdp")
    runs = run_engine(tmp_path / "runs", file, ["resumed"])
    assert_same_run(runs["resumed"], ddp["resumed"], relative=1e-5)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_an_evaluation_before_training_is_refused_with_a_remedy(engine, fsdp, zero2, zero3):
    runs = {"fsdp2": fsdp, "zero2": zero2, "zero3": zero3}[engine]
    error = runs["early_evaluation"]["error"].removeprefix("ValueError: ")
    assert error.startswith(REFUSED[engine, "early_evaluation"])
    assert "set eval_on_start=True" in error


def test_a_tied_head_that_fsdp_would_save_twice_is_refused_with_a_remedy(fsdp):
    error = fsdp["saved_tied_head"]["error"].removeprefix("ValueError: ")
    assert error.startswith(REFUSED["fsdp2", "saved_tied_head"])
    assert "tie_word_embeddings" in error
