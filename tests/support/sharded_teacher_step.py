"""One process of test_teacher_sharding: runs with a whole teacher and with one in parts, one after
the other.

Started by support.processes: OUT_DIR ENGINE CASE [CASE ...]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from support.engine_cases import CASES, MIXED, ULD
from support.engine_step import make
from support.engines import needs_gpus, take_processes_for_gpus
from support.rank import leave_together
from support.trainer_cases import losses_of

OWN_CASES: dict[str, dict[str, Any]] = {
    "tied_teacher": {"family": "smolvlm", "images": "mixed"},
    # top_k: samples would differ by rounding
    "pictures": {**MIXED, "lmbda": 0.5, "top_k": 1},
    # and all look at pictures twice, if one of them has any
    "seq_kd": {**MIXED, "seq_kd": True, "top_k": 1, "token_weighting": "picture_detail"},
    "uld_pictures": {
        **(MIXED | ULD | {"teacher_family": "idefics3"}),
        "token_weighting": "support.weightings:unsure",
    },
    "by_name": {**CASES["by_name"], "lmbda": 0.0},
    "bf16": {"bf16": True},
}


def run(folder: Path, engine: str, case: dict[str, Any]) -> dict[str, Any]:
    trainer = make(folder, engine, dict(case))
    trainer.train()
    teacher = trainer.teacher_model
    parameters = {id(p): p for p in teacher.parameters()}.values()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return {
        "losses": losses_of(trainer),
        "norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "bytes": sum(p.untyped_storage().nbytes() for p in local),
    }


def main(output_dir: str, engine: str, *names: str) -> None:
    results = {}
    if needs_gpus(engine):
        take_processes_for_gpus()
    for name in names:
        for sharding in (None, "fsdp"):
            case = OWN_CASES[name] | {"teacher_sharding": sharding}
            if engine == "fsdp2" and name == "by_name":
                config = {"version": 2, "cpu_ram_efficient_loading": True}
                case |= {"fsdp": True, "fsdp_config": config}
            results[name, sharding] = run(Path(output_dir) / f"{name}-{sharding}", engine, case)
    if int(torch.distributed.get_rank()) == 0:
        torch.save(results, Path(output_dir) / "state.pt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
