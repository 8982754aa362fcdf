"""Trainers of trl under an engine, patched and not; what each logs, and how far its weights move.

Arguments: a folder, an engine of support.engines, kinds of support.trl_trainers.
"""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gold_kernels.integrations.trl import jsd, stable, uld
from support.engines import ENGINES, leave_shared_memory_alone, needs_gpus, take_processes_for_gpus


def main() -> None:
    folder, engine, *kinds = sys.argv[1:]
    if needs_gpus(engine):
        take_processes_for_gpus()
    if engine.startswith("zero"):
        leave_shared_memory_alone()
    found = {kind: [run(Path(folder), engine, kind, b) for b in (False, True)] for kind in kinds}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")


def run(folder: Path, engine: str, kind: str, is_patched: bool) -> dict:
    from support.trl_trainers import build, patched

    random.seed(0)
    torch.manual_seed(0)
    place = folder / f"{kind} {is_patched} {os.environ['RANK']}"
    place.mkdir()
    # SGD: weights move by their gradients
    options = {"dtype": torch.float32, "use_cpu": not needs_gpus(engine), **ENGINES[engine]}
    options["optim"] = "sgd"
    # Llama's head is not tied to its embedding, so that FSDP2 shards it by itself
    teacher = "qwen3" if kind == "uld" else None
    trainer = build(kind, place, family="llama", teacher_family=teacher, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with patched(is_patched), counted() as calls:
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    kinds = sorted({type(module).__name__ for module in trainer.model_wrapped.modules()})
    moved = {name: whole(p) - before[name] for name, p in trainer.model.named_parameters()}
    return {"kinds": kinds, "logs": logs, "moved": moved, "calls": len(calls)}


@contextmanager
def counted() -> Iterator[list[str]]:
    """A fused loss, each time that the patch calls one."""
    calls: list[str] = []
    places = [(jsd, "fused_linear_jsd"), (stable, "fused_linear_jsd"), (uld, "fused_linear_uld")]

    def note(function: Any, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return call

    with ExitStack() as stack:
        for module, name in places:
            function = note(getattr(module, name), name)
            stack.enter_context(patch.object(module, name, function))
        yield calls


def whole(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach()
    return parameter.detach().clone()


main()
