"""Checkpoints that are complete or do not count: which there are, which to resume from.

A checkpoint is complete once it has its mark, which is written last, in one piece, and lists the
files with their sizes. A folder without the mark, of an older run or of another trainer, is looked
at file by file.
"""

import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

MARK = "complete.json"
STATE = "trainer_state.json"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".distcp")
ZIPPED = (".pt", ".pth", ".bin")  # as torch.save writes
NAME = re.compile(r"checkpoint-(\d+)$")


def clear(folder: Path) -> None:
    """Nothing of an earlier checkpoint of this step is mixed with the new one, and what is left
    of a save that failed takes no space.
    """
    (folder / MARK).unlink(missing_ok=True)
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def saving(folder: Path, accelerator: Accelerator, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the context the ranks write a checkpoint; after it, it is there or it is not. Its mark
    has the run's settings.
    """
    if accelerator.is_main_process:
        clear(folder)
    accelerator.wait_for_everyone()
    try:
        yield
    except Exception:
        if accelerator.is_main_process:
            clear(folder)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark_complete(folder, settings)


def mark_complete(folder: Path, settings: Mapping[str, Any]) -> None:
    """The files are on the disk, then the mark is, in one piece."""
    sizes = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    unfinished = folder / f"{MARK}.part"
    with unfinished.open("w", encoding="utf-8") as file:
        mark = {"saved": time.time(), "settings": dict(settings), "files": sizes}
        json.dump(mark, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MARK)


def settings_of(folder: Path) -> dict[str, Any]:
    """Settings of the run that wrote a checkpoint; empty where nothing says them."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        return {}


def what_is_wrong(folder: Path, *, is_sharded: bool = False, num_ranks: int = 1) -> str | None:
    """Why the run cannot go on from this checkpoint; None: it can. is_sharded: FSDP and DeepSpeed
    write files of their own.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        sizes = {}
    except (OSError, ValueError, KeyError) as error:
        return f"{MARK} cannot be read ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return _unreadable(folder, is_sharded) or _missing(folder, is_sharded, num_ranks)


def _missing(folder: Path, is_sharded: bool, num_ranks: int) -> str | None:
    needed = [STATE]
    if not is_sharded:
        needed += ["optimizer.pt", "scheduler.pt"]
        if not any((folder / name).is_file() for name in (*WEIGHTS, INDEX)) and not list(
            folder.glob("*/adapter_model.*")
        ):
            return f"{WEIGHTS[0]} is missing"
    needed += (
        ["rng_state.pth"] if num_ranks == 1 else [f"rng_state_{i}.pth" for i in range(num_ranks)]
    )
    absent = [name for name in needed if not (folder / name).is_file()]
    if _num_writers(folder) not in (None, num_ranks):  # the run's settings say so
        absent = [name for name in absent if not name.startswith("rng_state")]
    return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing" if absent else None


def _num_writers(folder: Path) -> int | None:
    """Processes that have left their random numbers; None: they are not all there."""
    if (folder / "rng_state.pth").is_file():
        return 1
    there = len(list(folder.glob("rng_state_*.pth")))
    are_all = all((folder / f"rng_state_{i}.pth").is_file() for i in range(there))
    return there if there > 1 and are_all else None


def _unreadable(folder: Path, is_sharded: bool) -> str | None:
    """A file that ends early, told from its table of contents; weights are not read."""
    for path in sorted(folder.glob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.name in (STATE, INDEX):
                content = json.loads(path.read_text(encoding="utf-8"))
                for name in set(content.get("weight_map", {}).values()):
                    if not (folder / name).is_file():
                        return f"{name} is missing"
            elif path.suffix in ZIPPED and not is_sharded and not zipfile.is_zipfile(path):
                return f"{path.name} ends early"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders of checkpoints, the one saved last at the end."""
    folders = [path for path in output_dir.glob("checkpoint-*") if NAME.search(path.name)]
    return sorted((path for path in folders if path.is_dir()), key=_age)


def refuse_others(output_dir: str, limit: int | None) -> None:
    """ValueError for folders that save_total_limit would delete and that no run has made."""
    others = [p for p in Path(output_dir).glob("checkpoint-*") if not NAME.search(p.name)]
    named = sorted(path.name for path in others if path.is_dir())
    if limit is not None and named:
        raise ValueError(
            "GOLDTrainer: save_total_limit deletes older folders named checkpoint-..., got "
            f"{', '.join(named)} in {output_dir}, which no run has saved; rename it or move it."
        )


def step_of(folder: Path) -> int:
    match = NAME.search(folder.name)
    assert match is not None, "the name of a checkpoint"
    return int(match[1])


def find_newest(output_dir: Path, **kind: Any) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete checkpoint, and the incomplete ones that are newer, with the reasons."""
    refused: dict[Path, str] = {}
    for folder in reversed(checkpoints_in(output_dir)):
        reason = what_is_wrong(folder, **kind)
        if reason is None:
            return folder, refused
        refused[folder] = reason
    return None, refused


def _age(folder: Path) -> tuple[float, int]:
    """Time, then step: a run that went back to an earlier step is the newer one."""
    try:
        saved = json.loads((folder / MARK).read_text(encoding="utf-8"))["saved"]
    except (OSError, ValueError, KeyError):
        saved = folder.stat().st_mtime
    return saved, step_of(folder)


def _files(folder: Path) -> Iterator[Path]:
    """What a run goes on from; a model card or a template may be edited."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.suffix in SUFFIXES or path.name in (STATE, INDEX)):
            yield path
