"""Short runs of tiny models under each engine on all GPUs (without one: two processes of the CPU),
beside the run of one process. Writes results/engines.csv; without GPUs it only prints.

Which rows are written, or padded, may depend on the number of processes: those cases are compared
with DDP's. A case that ended its processes, or that --seconds left no time for, has a row that says
so. --together starts all engines at once: tiny models leave most of a GPU idle.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, RowLog, environment, package_versions, say

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.engine_cases import CASES
from support.engine_matrix import OF_RANKS
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
MODELS = "models"
REFUSED = {"early_evaluation", "saved_tied_head"}


def names_of(engine: str, wanted: Sequence[str]) -> list[str]:
    names = sorted(set(wanted or CASES.keys() - REFUSED))
    return [name for name in names if engine != "fsdp2_sharded" or name == "resumed"]


def run(
    scratch: Path, wanted: Sequence[str], seconds: float | None, engine: str, num_processes: int
) -> dict[str, Any]:
    """What the cases came to; what went wrong is on stderr. scratch has the models by name."""
    folder = scratch / f"{engine}-{num_processes}"
    shutil.copytree(scratch / MODELS, folder)
    names = names_of(engine, wanted)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_processes), "-m", "support.engine_step"]
    command += [str(folder), engine, *names]
    with subprocess.Popen(command, cwd=ROOT / "tests", start_new_session=True) as launcher:
        try:
            launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
    states = {name: folder / f"{name}.pt" for name in names}
    missing = {"error": "no result: this case, or one before it, ended its processes"}
    return {n: torch.load(path) if path.exists() else missing for n, path in states.items()}


def row_of(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    if "error" in expected:
        return {"error": f"nothing to compare with: {expected['error']}"}
    return differences(actual, expected)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--together", action="store_true", help="all engines at once")
    parser.add_argument("--seconds", type=float, help="of an engine")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--cases", nargs="+", default=[], choices=CASES, help="default: all")
    parser.add_argument("--output", type=Path, help="default with GPUs: results/engines.csv")
    options = parser.parse_args(arguments)
    num_gpus = torch.cuda.device_count()
    num_processes = num_gpus if num_gpus > 1 else 2
    where = environment() | package_versions(VERSIONS)
    where["device"] = f"{num_processes} x {where['device']}"
    output = options.output or (RESULTS / "engines.csv" if num_gpus > 1 else None)
    log = RowLog(output, [*FIELDS, *where])
    engines = list(dict.fromkeys(["ddp", *options.engines]))
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(1 + len(engines) if options.together else 1) as pool,
    ):
        save_models(Path(scratch) / MODELS, list(CASES))  # random: all engines get the same ones
        start = partial(run, Path(scratch), options.cases, options.seconds)
        runs = {"one process": pool.submit(start, "ddp", 1)}
        runs |= {engine: pool.submit(start, engine, num_processes) for engine in engines}
        for engine in engines:
            for case, result in runs[engine].result().items():
                name = "ddp" if case in OF_RANKS else "one process"
                if engine == name:
                    continue
                row = {"engine": engine, "case": case, "compared_with": name}
                row |= row_of(result, runs[name].result()[case])
                log.add(row | where)
                say(str(row))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
