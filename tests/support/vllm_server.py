"""The stock vLLM server on a CPU, in the environment that `make test` installs for it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from gold_trainer import GOLDConfig
from gold_trainer.writers.vllm.command import server_environment, server_options
from support.processes import free_port
from support.trainer_cases import FIELDS

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
START_SECONDS = 240
KV_CACHE_BYTES = 64 * 2**20
# Without dynamo: it would compile some operators at the first request, which takes half a minute.
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class RunningServer:
    port: int
    process: subprocess.Popen
    log: Path

    @property
    def fields(self) -> dict[str, Any]:
        """Of GOLDConfig."""
        return {"use_vllm": True, "vllm_server_port": self.port, "vllm_server_timeout": 5.0}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine is a process of its own
            self.process.wait()


def assert_installed() -> None:
    """A test without the environment fails, and is not skipped."""
    assert (PYTHON.parent.parent / "installed").exists(), (
        "tests of vLLM need its environment: make .venv-vllm/installed"
    )


@contextmanager
def running_server(model: Path, folder: Path, rank: int | None = None) -> Iterator[RunningServer]:
    """A server with the options that the start line of such a run has."""
    config = GOLDConfig(
        output_dir=str(folder),
        **(FIELDS | {"use_vllm": True, "lmbda": 1.0}),
        vllm_server_port=free_port(),
    )
    options, environment = server_options(config, rank), server_environment(config, rank)
    with running_command(model, folder, options, environment) as running:
        yield running


@contextmanager
def running_command(
    model: Path, folder: Path, options: list[str], environment: dict[str, str]
) -> Iterator[RunningServer]:
    assert_installed()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [*options, "--enforce-eager", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=inherited | ENVIRONMENT | environment,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = RunningServer(int(options[options.index("--port") + 1]), process, log)
    try:
        wait_for(server)
        yield server
    finally:
        server.kill()


def wait_for(server: RunningServer) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if requests.get(f"{server.url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError(f"the vLLM server did not start:\n{server.log.read_text()[-4000:]}")
