"""FSDP2 on two processes gives the losses, norms and weights of DDP: what is beside the product of
test_engine_matrix.
"""

from importlib.util import find_spec

import pytest
import torch

from gold_trainer import configs
from support.engine_matrix import ALONE, REFUSED
from support.engine_runs import assert_same_run, run_engine

BFLOAT16 = ("bf16", "bf16_own_teacher")
EIGHT_BITS = ("adamw_8bit",) if find_spec("torchao") else ()
INEXACT = (*BFLOAT16, *EIGHT_BITS)
NOT_EXACT = ("bf16", "early_evaluation", "saved_tied_head")
EXACT = [name for name in ALONE if name not in NOT_EXACT]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_engine(
        tmp_path_factory.mktemp("ddp") / "runs", "ddp", [*EXACT, *INEXACT, "resumed", "compiled"]
    )


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return run_engine(
        tmp_path_factory.mktemp("fsdp") / "runs", "fsdp2", [*EXACT, *INEXACT, "compiled"]
    )


@pytest.mark.parametrize("case", EXACT)
def test_fsdp_gives_the_run_of_ddp(ddp, fsdp, case):
    assert_same_run(fsdp[case], ddp[case], relative=1e-5)


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


def test_checkpoints_of_parts_resume_and_end_in_a_whole_model(ddp, tmp_path):
    """With the file that is shipped for accelerate launch, as it stands."""
    assert "SHARDED_STATE_DICT" in (configs.FOLDER / "fsdp2.yaml").read_text()
    runs = run_engine(tmp_path / "runs", "fsdp2.yaml", ["resumed"])
    assert_same_run(runs["resumed"], ddp["resumed"], relative=1e-5)


def test_what_fsdp_cannot_do_is_refused_with_a_remedy(tmp_path):
    runs = run_engine(tmp_path / "runs", "fsdp2", ["early_evaluation", "saved_tied_head"])
    early, saved = (run["error"].removeprefix("ValueError: ") for run in runs.values())
    assert early.startswith(REFUSED["fsdp2", "early_evaluation"])
    assert "set eval_on_start=True" in early
    assert saved.startswith(REFUSED["fsdp2", "saved_tied_head"])
    assert "tie_word_embeddings" in saved
