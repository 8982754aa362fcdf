"""Scripts of this folder as several processes. One that hangs prints the stacks of all its threads
and ends: every rank is started by rank.py.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from support.rank import GRACE

TESTS = Path(__file__).parents[1]
SECONDS = 240  # of a rank, unless its script sets itself another limit
START = 30  # seconds until torchrun has started its ranks, and until it has ended them


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
    script: str,
    processes: int,
    *args: str,
    seconds: int = SECONDS,  # of all that a rank does
    config: Path | None = None,  # of accelerate launch; without one torchrun starts the ranks
) -> subprocess.CompletedProcess[str]:
    if config is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(config), "--num_processes", str(processes)]
    command += ["-m", "support.rank", str(seconds), f"support.{script}", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=TESTS,
        start_new_session=True,
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=seconds + GRACE + 2 * START)
        except subprocess.TimeoutExpired:  # of the launcher itself: ranks have a limit of their own
            os.killpg(launcher.pid, signal.SIGKILL)
            out, err = launcher.communicate()
            raise AssertionError(f"{command} hangs: {err}") from None
    return subprocess.CompletedProcess(command, launcher.returncode, out, err)
