"""Runs of engine_step, and what they must have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gold_trainer import configs
from support.engine_step import SECONDS, save_models
from support.processes import start_ranks


def run_engine(folder: Path, engine: str, names: Sequence[str]) -> dict[str, Any]:
    """What the cases came to on two processes, by name; "one" is a single process. An engine that
    ends in .yaml is one of the files for accelerate launch.
    """
    results, stderr = try_engine(folder, engine, names)
    assert results.keys() == set(names), stderr[-8000:]
    return results


def try_engine(folder: Path, engine: str, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The cases up to one that ends its process, and what was written to stderr."""
    folder.mkdir()
    save_models(folder, names)
    num_processes, config = 2, None
    if engine == "one":
        num_processes, engine = 1, "ddp"
    if engine.endswith(".yaml"):
        config, engine = configs.FOLDER / engine, "launched"
    seconds = SECONDS * len(names)  # each case sets its own limit
    arguments = (str(folder), engine, *names)
    done = start_ranks("engine_step", num_processes, *arguments, seconds=seconds, config=config)
    states = {name: folder / f"{name}.pt" for name in names}
    return {n: torch.load(path) for n, path in states.items() if path.exists()}, done.stderr


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The last loss, and the largest relative differences of losses, gradient norms, evaluation,
    and weights of the saved student; or the error.
    """
    if "error" in actual:
        return {"error": actual["error"]}
    result: dict[str, Any] = {"loss": f"{actual['losses'][-1]:.7g}"}
    result |= {name: f"{value:.1e}" for name, value in distances(actual, expected).items()}
    return result


def distances(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    result = {}
    for name in ("losses", "norms"):
        assert len(actual[name]) == len(expected[name]) > 0, name
        result[name] = max(map(_relative, actual[name], expected[name]))
    result["eval_loss"] = _relative(actual["eval_loss"], expected["eval_loss"])
    ours, theirs = actual["weights"], expected["weights"]
    assert ours.keys() == theirs.keys()
    result["weights"] = max(_distance(ours[key], theirs[key]) for key in theirs)
    return result


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-6))


def assert_same_run(
    actual: dict[str, Any], expected: dict[str, Any], relative: float, of: str = "the run"
) -> None:
    """Losses, gradient norms, the evaluation, and every weight of the saved student."""
    assert "error" not in actual, f"{of}: {actual['error']}"
    for name, distance in distances(actual, expected).items():
        assert distance <= relative, f"{name} of {of}: {distance:.1e}"
