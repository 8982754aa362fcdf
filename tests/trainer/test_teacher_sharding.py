"""A teacher in parts on two processes teaches as one that is whole on each."""

import pytest
import torch

from support.engine_step import save_models
from support.processes import start_ranks

SECONDS = 240  # of a rank
DDP = ("tied_teacher", "pictures", "seq_kd", "uld_pictures", "bf16")
FSDP = ("seq_kd", "by_name")


def run(folder, engine, names):
    save_models(folder, ["by_name"])
    done = start_ranks("sharded_teacher_step", 2, str(folder), engine, *names, seconds=SECONDS)
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(folder / "state.pt")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ddp"), "ddp", DDP)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fsdp"), "fsdp2", FSDP)


def assert_same(results, name):
    whole, parts = results[name, None], results[name, "fsdp"]
    for key in ("losses", "norms", "eval_loss"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-6), key
    # a layer of few rows has more on the first process
    assert parts["bytes"] <= 0.52 * whole["bytes"]


@pytest.mark.parametrize("name", DDP)
def test_beside_a_student_that_is_whole(ddp, name):
    assert_same(ddp, name)


@pytest.mark.parametrize("name", FSDP)
def test_beside_a_student_in_parts(fsdp, name):
    assert_same(fsdp, name)
