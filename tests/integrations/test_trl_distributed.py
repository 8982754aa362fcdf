"""A trainer of trl on two processes under FSDP2, whose heads are sharded, patched and not."""

import json

import pytest

from support.processes import start_ranks


def test_sharded_heads_give_the_losses_and_norms_of_trl(tmp_path):
    done = start_ranks("trl_step", 2, str(tmp_path), "fsdp2")
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert "FSDPLinear" in theirs["kinds"], "heads are sharded by themselves"
    assert len(ours["logs"]) == 2
    for actual, expected in zip(ours["logs"], theirs["logs"], strict=True):
        for name in ("loss", "grad_norm"):
            assert actual[name] == pytest.approx(expected[name], rel=2e-5)
