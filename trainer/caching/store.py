"""The files of a teacher cache: shards of rows, an index of each, and a manifest.

    cache.json                  what it was made with, how far it is, sizes of its shards
    teacher/                    config, tokenizer and processor of the teacher
    head.safetensors            the teacher's head: weight (V_t, D_t), bias (V_t,) if it has one
    rows-000-00000.safetensors  "rows" (N, W): what the teacher says of N scored positions
    rows-000-00000.arrow        which example has which: key, split, row, turn, start, length

A shard counts once its index is there, which is written last and renamed into place; so a run that
is killed loses the shard at work. N scored positions of a shard, W numbers of each.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]  # it has no types
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gold_trainer.caching.keys import KEY_BYTES, Key
from gold_trainer.config import GOLDConfig

MANIFEST = "cache.json"
HEAD = "head.safetensors"
TEACHER = "teacher"
FORMAT = 1
ROWS = "rows"
SUFFIX, INDEX_SUFFIX, HALF = ".safetensors", ".arrow", ".half"

_HASH = pa.binary(KEY_BYTES)
SCHEMA = pa.schema(
    [
        ("key", _HASH),
        ("prompt", _HASH),
        ("completion", _HASH),
        ("media", _HASH),
        ("split", pa.string()),
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("start", pa.int64()),
        ("length", pa.int32()),
        ("checksum", pa.uint64()),
    ]
)


class Place(NamedTuple):
    """Where an example stood, for messages: it is found by its content."""

    split: str
    row: int
    turn: int | None


@dataclass
class Manifest:
    """cache.json."""

    form: str  # one of CACHE_FORMS
    dtype: str  # of the rows, by torch's name
    width: int
    facts: dict[str, Any]
    about: dict[str, Any]  # for the reader: names, versions
    logit_form: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = False
    shards: dict[str, list[int]] = field(default_factory=dict)  # name: bytes of rows and of index
    head_bytes: int = 0
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        text = json.dumps(vars(self), indent=2) + "\n"
        _in_one_piece(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """None where there is none; ValueError for one that is not ours."""
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')}, {FORMAT} is expected")
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"teacher_cache {folder} has a {MANIFEST} that cannot be read ({error}); make the "
                "cache again in another folder with gold-trainer cache-teacher."
            ) from error


def form_of_cache(args: GOLDConfig) -> str | None:
    """None without a cache, or before there is one."""
    manifest = None if args.teacher_cache is None else Manifest.read(Path(args.teacher_cache))
    return None if manifest is None else manifest.form


def manifest_of(args: GOLDConfig) -> Manifest:
    """The manifest of a cache that open_cache has looked at."""
    manifest = None if args.teacher_cache is None else Manifest.read(Path(args.teacher_cache))
    assert manifest is not None, "open_cache has read it"
    return manifest


def _in_one_piece(path: Path, write: Any) -> None:
    """The file is there whole, and on the disk, or not at all."""
    half = path.with_name(path.name + HALF)
    try:
        write(half)
        with open(half, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(half, path)
    except (OSError, SafetensorError) as error:  # a full disk is an error of safetensors
        half.unlink(missing_ok=True)
        raise OSError(
            f"teacher_cache: {path} cannot be written ({error}); make room, or mend the folder, "
            "and start again: what is there is kept."
        ) from error


def save_head(folder: Path, tensors: dict[str, Tensor]) -> None:
    _in_one_piece(folder / HEAD, lambda path: save_file(tensors, path))


def head_bytes(folder: Path) -> int:
    path = folder / HEAD
    return path.stat().st_size if path.is_file() else 0


def load_head(folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / HEAD, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"teacher_cache {folder}: {HEAD} is missing or ends early ({error}); run gold-trainer "
            "cache-teacher again, which writes it anew."
        ) from error


class ShardWriter:
    """Rows of examples, gathered and written a shard at a time."""

    def __init__(self, folder: Path, rank: int, shard_bytes: int) -> None:
        self.folder, self.rank, self.shard_bytes = folder, rank, shard_bytes
        taken = [path.stem for path in folder.glob(f"rows-{rank:03}-*{INDEX_SUFFIX}")]
        self.number = 1 + max((int(name.rpartition("-")[2]) for name in taken), default=-1)
        self._start_shard()

    def _start_shard(self) -> None:
        self.rows: list[Tensor] = []
        self.entries: list[dict[str, Any]] = []
        self.num_rows = self.num_bytes = 0

    def add(self, place: Place, key: Key, rows: Tensor) -> None:  # (n, W) on the CPU
        rows = rows.contiguous()
        entry = {"key": key.whole, **key._asdict(), **place._asdict()}
        entry |= {"start": self.num_rows, "length": len(rows), "checksum": checksum(rows)}
        self.entries.append(entry)
        self.rows.append(rows)
        self.num_rows += len(rows)
        self.num_bytes += rows.numel() * rows.element_size()
        if self.num_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        if not self.entries:
            return
        path = self.folder / f"rows-{self.rank:03}-{self.number:05}{SUFFIX}"
        rows = {ROWS: torch.cat(self.rows)}
        _in_one_piece(path, lambda half: save_file(rows, half))
        table = pa.Table.from_pylist(self.entries, SCHEMA)
        _in_one_piece(path.with_suffix(INDEX_SUFFIX), lambda half: _write_table(half, table))
        self.number += 1
        self._start_shard()


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table)


def checksum(rows: Tensor) -> int:
    array: Any = rows.view(torch.uint8).numpy()  # has a buffer, which its type does not say
    return xxhash.xxh3_64_intdigest(array)


def shard_sizes(folder: Path) -> dict[str, list[int]]:
    """Bytes of the rows and of the index of all shards that are there."""
    sizes = {}
    for index in sorted(folder.glob(f"rows-*{INDEX_SUFFIX}")):
        rows = index.with_suffix(SUFFIX)
        size = rows.stat().st_size if rows.is_file() else 0
        sizes[index.stem] = [size, index.stat().st_size]
    return sizes


def mend(folder: Path, manifest: Manifest) -> list[str]:
    """Deletes what a killed run left half written, and shards that are damaged; their names."""
    for half in folder.glob(f"*{HALF}"):
        half.unlink()
    damaged = []
    for name in sorted({path.stem for path in folder.glob("rows-*")}):
        rows, index = (folder / f"{name}{suffix}" for suffix in (SUFFIX, INDEX_SUFFIX))
        expected = manifest.shards.get(name)
        if index.is_file() and expected in (None, shard_sizes(folder).get(name)):
            try:
                read_index(folder, name)
                with safe_open(rows, framework="pt") as file:
                    file.get_slice(ROWS)
                continue
            except (OSError, SafetensorError, pa.ArrowInvalid):
                pass
        if index.is_file():
            damaged.append(name)
        for path in (index, rows):  # the index first: without it a shard does not count
            with suppress(FileNotFoundError):
                path.unlink()
    return damaged


def read_index(folder: Path, name: str) -> pa.Table:
    with pa.memory_map(str(folder / f"{name}{INDEX_SUFFIX}")) as file:
        return pa.ipc.open_file(file).read_all()


def _key_bytes(table: pa.Table) -> bytes:
    return b"".join(
        chunk.buffers()[1][chunk.offset * KEY_BYTES : (chunk.offset + len(chunk)) * KEY_BYTES]
        for chunk in table["key"].chunks
    )


class Index:
    """Which example is where, in all shards of a cache."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.names = names
        tables = [read_index(folder, name) for name in names]
        self.table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        self.shards = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        keys = np.frombuffer(b"".join(map(_key_bytes, tables)), np.uint8).reshape(-1, KEY_BYTES)
        # the beginnings of keys in order: 16 bytes an example in memory, the rest on the disk
        starts = np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel()
        self.order = np.argsort(starts)
        self.starts = starts[self.order]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_rows(self) -> int:
        return int(np.sum(self.table["length"].to_numpy()))

    def find(self, key: bytes) -> int | None:
        """The place of a key in the table; None where it is not there."""
        start = np.frombuffer(key[:8], dtype=np.uint64)[0]
        at = int(np.searchsorted(self.starts, start))
        while at < len(self.starts) and self.starts[at] == start:
            position = int(self.order[at])
            if self.table["key"][position].as_py() == key:
                return position
            at += 1
        return None

    def entry(self, position: int) -> dict[str, Any]:
        return self.table.slice(position, 1).to_pylist()[0]

    def entries_of(self, row: int, turn: int | None) -> Iterator[dict[str, Any]]:
        """Entries of examples that stood at this row and turn. It is slow, and for messages."""
        for position in np.flatnonzero(self.table["row"].to_numpy() == row):
            entry = self.entry(int(position))
            if entry["turn"] == turn:
                yield entry


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that the folder is on, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
