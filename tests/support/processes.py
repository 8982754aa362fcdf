"""Scripts of this folder as several processes. One that hangs prints the stacks of all its threads
and ends: every rank is started by rank.py.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from support.forks import TESTS, Forked
from support.rank import GRACE

SECONDS = 240  # of a rank, unless its script sets itself another limit
START = 30  # seconds until a launcher has started its ranks, and until it has ended them
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
CAN_FORK = not torch.cuda.is_available()  # importing may have started CUDA


def run_step(
    script: str,  # of this folder, without its ending
    output_dir: Path,
    processes: int,
    *sizes: int,  # of a batch; of most scripts then micro-batches a step
) -> dict[str, Any]:
    """What the script's first process left in state.pt."""
    output_dir.mkdir()
    done = start_ranks(script, processes, str(output_dir), *map(str, sizes))
    assert done.returncode == 0, done.stderr
    return torch.load(output_dir / "state.pt")


def start_ranks(
    script: str,
    processes: int,
    *args: str,
    seconds: int = SECONDS,  # of all that a rank does
    config: Path | None = None,  # of accelerate launch, whose processes import everything anew
) -> subprocess.CompletedProcess[str]:
    rank = ["support.rank", str(seconds), f"support.{script}", *args]
    limit = seconds + GRACE + 2 * START
    if config is not None:
        command = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        return _launch([*command, "--num_processes", str(processes), "-m", *rank], limit)
    if CAN_FORK:
        return _fork(rank, processes, limit)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return _launch([*command, "-m", *rank], limit)


def _fork(rank: list[str], processes: int, limit: int) -> subprocess.CompletedProcess[str]:
    """As torchrun does: the first that fails ends the others."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    until = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            Forked(
                Path(folder, number),
                *rank,
                environment=ENVIRONMENT | address | sizes | {"RANK": number, "LOCAL_RANK": number},
            )
            for number in map(str, range(processes))
        ]
        while None in (codes := [each.poll() for each in ranks]) and not any(codes):
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        for each in ranks:
            each.end(START)
        out, err = ("".join(getattr(e, name) for e in ranks) for name in ("stdout", "stderr"))
        assert time.monotonic() < until, f"{rank} hangs: {err}"
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess(rank, code, out, err)


def _launch(command: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *command]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        cwd=TESTS,
        start_new_session=True,
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=limit)
        except subprocess.TimeoutExpired:  # of the launcher itself: ranks have a limit of their own
            os.killpg(launcher.pid, signal.SIGKILL)
            out, err = launcher.communicate()
            raise AssertionError(f"{command} hangs: {err}") from None
    return subprocess.CompletedProcess(command, launcher.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
