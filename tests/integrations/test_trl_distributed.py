"""Trainers of trl on two processes, patched and not: under DDP, under ZeRO-3, whose weights are
gathered for a layer, and under FSDP2, whose heads are sharded by themselves.
"""

import pytest
import torch

from support.processes import start_ranks
from support.trl_trainers import TIMES

WRAPPERS = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine", "fsdp2": "FSDPLinear"}
KINDS = ("distillation", "gkd", "gold", "uld")


@pytest.mark.parametrize(
    ("engine", "kinds"), [("ddp", KINDS), ("zero3", KINDS), ("fsdp2", ["uld"])]
)
def test_losses_gradients_and_logs_are_those_of_trl(engine, kinds, tmp_path):
    done = start_ranks("trl_step", 2, str(tmp_path), engine, *kinds)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert list(found) == list(kinds)
    for theirs, ours in found.values():
        assert WRAPPERS[engine] in theirs["kinds"], "the engine is at work"
        assert theirs["calls"] == 0 < ours["calls"], "the patch is at work"
        assert len(ours["logs"]) == len(theirs["logs"]) == 2
        for actual, expected in zip(ours["logs"], theirs["logs"], strict=True):
            assert actual.keys() == expected.keys()
            for name in actual:
                if not any(time in name for time in TIMES):
                    assert actual[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name
        length = torch.stack([move.norm() for move in theirs["moved"].values()]).norm()
        assert length > 1e-4, "there are gradients"
        for name, expected in theirs["moved"].items():
            assert (ours["moved"][name] - expected).norm() <= 1e-4 * length, name
