"""Runs of engine_step, and what they must have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gold_trainer import configs
from support.engine_step import CASES, save_models
from support.processes import start_ranks


def run_engine(folder: Path, engine: str, names: Sequence[str]) -> dict[str, Any]:
    """What the cases came to on two processes, by name. An engine that ends in .yaml is one of the
    files for accelerate launch.
    """
    folder.mkdir()
    if any(CASES[name].get("is_by_name") for name in names):
        save_models(folder)
    config = None
    if engine.endswith(".yaml"):
        config, engine = configs.FOLDER / engine, "launched"
    done = start_ranks("engine_step", 2, str(folder), engine, *names, config=config)
    state = folder / "state.pt"
    assert state.exists(), done.stderr[-8000:]
    results = torch.load(state)
    assert results.keys() == set(names), done.stderr[-8000:]
    return results


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The last loss, and the largest relative differences of losses, gradient norms, and weights
    of the saved student; or the error.
    """
    if "error" in actual:
        return {"error": actual["error"]}
    result: dict[str, Any] = {"loss": f"{actual['losses'][-1]:.7g}"}
    for name in ("losses", "norms"):
        pairs = zip(actual[name], expected[name], strict=True)
        result[name] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    ours, theirs = actual["weights"], expected["weights"]
    assert ours.keys() == theirs.keys()
    result["weights"] = max(_distance(ours[key], theirs[key]) for key in theirs)
    return {key: f"{value:.1e}" if key != "loss" else value for key, value in result.items()}


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-6))


def assert_same_run(actual: dict[str, Any], expected: dict[str, Any], relative: float) -> None:
    """Losses, gradient norms, the evaluation, and every weight of the saved student."""
    assert "error" not in actual, actual["error"]
    for name in ("losses", "norms"):
        assert len(actual[name]) == len(expected[name]) > 0
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            assert abs(ours - theirs) <= relative * abs(theirs), name
    assert abs(actual["eval_loss"] - expected["eval_loss"]) <= relative * expected["eval_loss"]
    weights, expected_weights = actual["weights"], expected["weights"]
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert (weights[name] - weight).norm() <= relative * weight.norm(), name
