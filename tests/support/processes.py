"""Scripts of this folder as several processes, and in a Python of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]


def run_step(
    script: str,  # of this folder, without its ending
    output_dir: Path,
    processes: int,
    batch_size: int,
    accumulation: int,
) -> dict[str, Any]:
    """What the script's first process left in state.pt."""
    output_dir.mkdir()
    done = start_ranks(script, processes, str(output_dir), str(batch_size), str(accumulation))
    assert done.returncode == 0, done.stderr
    return torch.load(output_dir / "state.pt")


def start_ranks(
    script: str, processes: int, *args: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", f"support.{script}", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS, timeout=timeout
    )
