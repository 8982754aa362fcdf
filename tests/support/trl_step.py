"""A trainer of trl under an engine, patched and not; what each logs, for the first process.

Arguments: a folder, an engine of support.engines.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch

from support.engines import ENGINES, leave_shared_memory_alone, needs_gpus, take_processes_for_gpus


def main() -> None:
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    if needs_gpus(engine):
        take_processes_for_gpus()
    if engine.startswith("zero"):
        leave_shared_memory_alone()
    from support.trl_trainers import build, patched

    found = []
    for is_patched in (False, True):
        random.seed(0)
        torch.manual_seed(0)
        place = folder / f"{is_patched} {os.environ['RANK']}"
        place.mkdir()
        options = {"dtype": torch.float32, "use_cpu": not needs_gpus(engine), **ENGINES[engine]}
        # Llama's head is not tied to its embedding, so that FSDP2 shards it by itself
        trainer = build("uld", place, family="llama", teacher_family="qwen3", **options)
        with patched(is_patched):
            trainer.train()
        kinds = sorted({type(module).__name__ for module in trainer.model_wrapped.modules()})
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found.append({"kinds": kinds, "logs": logs})
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


main()
