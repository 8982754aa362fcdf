"""Processes forked from one that has imported everything: a Python that imports torch, transformers
and peft takes 8 s of a core before it does anything.

What is forked ends like `python -m MODULE ARGUMENT ...`: it has a group, an environment, a folder
and files of its own, and its exceptions, exit codes, signals and exit handlers are Python's. The
process it comes from only imports: no threads, no state. Hash seeds are alike in all of them.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO

TESTS = Path(__file__).parents[1]
# But nothing that is run as a module: runpy would warn.
IMPORTED = (
    *("gold_trainer.trainer", "peft", "support.cross_cases", "support.trainer_cases"),
    *("transformers.models.qwen3_vl.modeling_qwen3_vl", "deepspeed"),
)


class Forked:
    """A running process. What it wrote is in two files of its folder."""

    def __init__(
        self,
        folder: Path,  # new, of its output
        module: str,
        *args: str,
        environment: Mapping[str, str] | None = None,  # besides that of this process
        cwd: Path = TESTS,
        warns_always: bool = False,  # python -W always
    ) -> None:
        folder.mkdir(parents=True)
        self.files = {1: folder / "stdout", 2: folder / "stderr"}
        for path in self.files.values():
            path.touch()
        request = {
            "argv": [module, *args],
            "environment": {**os.environ, **(environment or {})},
            "cwd": str(cwd),
            "files": [str(path) for path in self.files.values()],
            "warns_always": warns_always,
        }
        self.pid = _ask({"start": request})
        self.returncode: int | None = None

    @property
    def stdout(self) -> str:
        return self.files[1].read_text()

    @property
    def stderr(self) -> str:
        return self.files[2].read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, seconds: float) -> int:
        """AssertionError, and its end, where it takes longer."""
        self.wait_until(lambda: self.poll() is not None, seconds)
        assert self.returncode is not None
        return self.returncode

    def wait_until(self, is_so: Any, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"{seconds} s are over: {self.stdout}\n{self.stderr}")
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to it and its children."""
        if self.poll() is None:
            os.killpg(self.pid, number)

    def end(self, seconds: float) -> None:
        """Ask it to, and make it after so many seconds."""
        self.kill(signal.SIGTERM)
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self.kill()
        self.wait(seconds)


@cache
def _server() -> "subprocess.Popen[str]":
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    server = subprocess.Popen(
        [sys.executable, "-m", "support.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    atexit.register(server.communicate)  # which closes its input
    return server


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin and server.stdout, "both are pipes"
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve() -> dict[str, Any]:
    """Answers until its input ends. A forked process returns with what it is to be."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what is imported may print
        for name in IMPORTED:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a process that looks for garbage would copy all of that
        return _answer(answers)


def _answer(answers: TextIO) -> dict[str, Any]:
    running = set()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                return request["start"]
            os.setpgid(answer, answer)  # here too: a signal may be sent before it has begun
            running.add(answer)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in running:  # of tests that failed, or were interrupted
        os.killpg(pid, signal.SIGKILL)
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["files"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["warns_always"]:
        warnings.simplefilter("always")
    sys.argv = request["argv"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process of the tests
    _become(_serve())
