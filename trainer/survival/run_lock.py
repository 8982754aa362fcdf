"""One run at a time in an output folder: a file there names the process that writes to it."""

import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = ".running.json"


class RunLock:
    """Held by the main process of a run while it trains, or writes a teacher's cache."""

    def __init__(self, folder: str, field: str = "output_dir") -> None:
        self.path, self.field = Path(folder) / NAME, field
        self.is_held = False

    def acquire(self) -> None:
        """The folder is this process' now; ValueError if it is another's, or cannot be written."""
        for _ in range(2):
            try:
                self._write()
            except FileExistsError:
                owner = self._owner()
                if not _is_gone(owner):
                    raise self._refusal(owner) from None
                logger.warning(
                    "GOLDTrainer: process %s, which wrote to %s, is gone: going on in its place.",
                    owner.get("pid", "unknown"),
                    self.path.parent,
                )
                self.path.unlink(missing_ok=True)
                continue
            except OSError as error:
                raise ValueError(
                    f"GOLDTrainer: {self.field} must be a folder that can be written, got "
                    f"{self.path.parent} ({error.strerror}); free some space, or choose another."
                ) from error
            self.is_held = True
            return
        raise self._refusal(self._owner())

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a file, and no lock of another
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            with os.fdopen(file, "w", encoding="utf-8") as writer:
                json.dump(_identity() | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}, writer)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

    def release(self) -> None:
        """Only what it holds: another trainer of this process may have the folder."""
        if self.is_held and self._owner().items() >= _identity().items():
            self.path.unlink(missing_ok=True)
        self.is_held = False

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # its writer was killed in the middle
            return {}
        return owner if isinstance(owner, dict) else {}

    def _refusal(self, owner: dict[str, Any]) -> ValueError:
        return ValueError(
            f"GOLDTrainer: {self.field} must belong to one run at a time, got {self.path.parent}, "
            f"which process {owner.get('pid')} on {owner.get('host')} has written to since "
            f"{owner.get('since')}; choose another {self.field}, or delete {self.path} if that "
            "process is gone."
        )


def _identity() -> dict[str, Any]:
    """The start tells a process from an earlier one of the same number."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "start": _start_of(pid)}


def _start_of(pid: int) -> str | None:
    """Boot and ticks since then; None where the system does not say, or the process is gone."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return f"{boot} {ticks}"


def _is_gone(owner: dict[str, Any]) -> bool:
    """A process of another host cannot be seen: it is taken to be alive."""
    if not isinstance(owner.get("pid"), int):
        return True  # no process stands in the file: its writer was killed in the middle
    if owner.get("host") != socket.gethostname():
        return False
    pid = owner["pid"]
    if pid == os.getpid():
        return not owner.items() >= _identity().items()  # a container that started again
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # alive, of another user
    start = _start_of(pid)
    return start is not None and owner.get("start") is not None and start != owner["start"]
