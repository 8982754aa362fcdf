"""What every benchmark shares: where it ran, lines that are printed at once, and one CSV row a
case under benchmarks/results/.
"""

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

RESULTS = Path(__file__).with_name("results")


def environment() -> dict[str, str]:
    """GPU (or CPU), versions and git sha; a sha with + has uncommitted changes. GIT_SHA stands in
    for it where the files are a copy of a repository elsewhere.
    """
    root = Path(__file__).parents[1]
    has_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_cuda else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "git_sha": _git_sha(root),
    }


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _git_sha(root: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if "GIT_SHA" in os.environ:
        return os.environ["GIT_SHA"]
    sha = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{sha}+" if git("status", "--porcelain", "--untracked-files=no") else sha


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of peers, empty where one is not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


class RowLog:
    """A CSV file that has each row as soon as it is measured; path None keeps rows in memory
    only. appends: to the rows that are there, of the same fields.
    """

    def __init__(self, path: Path | None, fields: Sequence[str], *, appends: bool = False) -> None:
        self.path = path
        self.fields = list(fields)
        self.rows: list[dict[str, Any]] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            header = ",".join(self.fields)
            if appends and path.exists():
                found = path.read_text(encoding="utf-8").partition("\n")[0]
                assert found == header, f"{path} has other columns: {found}"
            else:
                self._write("w", dict(zip(self.fields, self.fields, strict=True)))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            self._write("a", row)

    def _write(self, mode: str, row: dict[str, Any]) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.DictWriter(file, fieldnames=self.fields).writerow(row)
