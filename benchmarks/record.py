"""What every benchmark shares: where it ran, and one CSV row per case under benchmarks/results/."""

import csv
import os
import platform
import subprocess
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


def _git_sha(root: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if "GIT_SHA" in os.environ:
        return os.environ["GIT_SHA"]
    sha = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{sha}+" if git("status", "--porcelain", "--untracked-files=no") else sha


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
