"""Two processes cache a teacher together, and train from the cache as one trains with it."""

import json

import pytest
import torch

from support.cache_cases import run_of, save_pair
from support.cache_step import FIELDS
from support.processes import start_ranks
from support.trainer_cases import assert_equal_gradients


def test_two_processes_share_the_rows_and_train_as_one(tmp_path):
    pair = save_pair(tmp_path, "qwen3", count=9)
    done = start_ranks("cache_step", 2, str(tmp_path))
    assert done.returncode == 0, done.stderr
    shards = json.loads((tmp_path / "cache" / "cache.json").read_text())["shards"]
    assert {name[:8] for name in shards} == {"rows-000", "rows-001"}
    assert done.stdout.count("is complete") == 1
    state = torch.load(tmp_path / "state.pt")
    whole = FIELDS | {"per_device_train_batch_size": 4}
    losses, recorder, trainer = run_of(pair, tmp_path / "one", **whole)
    assert state["losses"] == pytest.approx(losses, rel=1e-5)
    for ours, truth in zip(state["gradients"], recorder.steps, strict=True):
        ours = {name.removeprefix("module."): gradient for name, gradient in ours.items()}
        assert_equal_gradients(ours, truth, 1e-4)
    evaluated = trainer.evaluate(pair.rows[:4])["eval_loss"]
    assert state["eval_loss"] == pytest.approx(evaluated, rel=1e-5)
