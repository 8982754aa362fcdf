"""Short runs of tiny models under each engine on all GPUs (without one: two processes of the CPU),
beside the run of one process. Writes results/engines.csv; without GPUs it only prints.

Rollouts depend on the number of processes: those rows are compared with DDP's.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, RowLog, environment, package_versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.engine_cases import CASES
from support.engine_runs import differences
from support.engine_step import save_models

ROOT = Path(__file__).parents[1]
FIELDS = (
    "engine",
    "case",
    "compared_with",
    "loss",
    "losses",
    "norms",
    "eval_loss",
    "weights",
    "error",
)
VERSIONS = ("accelerate", "peft", "deepspeed")
ENGINES = ("ddp", "fsdp2", "fsdp2_sharded", "zero2", "zero3")
REFUSED = {"early_evaluation", "saved_tied_head"}
WRITTEN = {"on_policy", "on_policy_pictures", "on_policy_lora", "seq_kd", "by_name"}


def run(folder: Path, engine: str, num_processes: int) -> dict[str, Any]:
    """The cases that an engine can do; what went wrong is on stderr."""
    folder.mkdir()
    save_models(folder)
    names = sorted(CASES.keys() - REFUSED) if engine != "fsdp2_sharded" else ["resumed"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_processes), "-m", "support.engine_step"]
    subprocess.run([*command, str(folder), engine, *names], cwd=ROOT / "tests", check=False)
    states = {name: folder / f"{name}.pt" for name in names}
    return {name: torch.load(path) for name, path in states.items() if path.exists()}


def main() -> None:
    num_gpus = torch.cuda.device_count()
    num_processes = num_gpus if num_gpus > 1 else 2
    where = environment() | package_versions(VERSIONS)
    where["device"] = f"{num_processes} x {where['device']}"
    log = RowLog(RESULTS / "engines.csv" if num_gpus > 1 else None, [*FIELDS, *where])
    with tempfile.TemporaryDirectory() as scratch:
        one = run(Path(scratch) / "one", "ddp", 1)
        ddp: dict[str, Any] = {}
        for engine in ENGINES:
            runs = run(Path(scratch) / engine, engine, num_processes)
            ddp = runs if engine == "ddp" else ddp
            for case, result in runs.items():
                reference, name = (ddp, "ddp") if case in WRITTEN else (one, "one process")
                if engine == name:
                    continue
                row = {"engine": engine, "case": case, "compared_with": name}
                row |= differences(result, reference[case])
                log.add(row | where)
                sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
