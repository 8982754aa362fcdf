"""A teacher that is not there: what it says of every row lies in a folder, see caching/store.py.

N_t scored rows, D_t hidden size, V_t vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gold_trainer import loading
from gold_trainer.batches import Example, SideInputs, WindowBatch
from gold_trainer.caching import store
from gold_trainer.caching.facts import (
    facts_of_args,
    facts_of_processor,
    facts_of_teacher,
    refuse_other_facts,
)
from gold_trainer.caching.keys import Key, key_of
from gold_trainer.caching.store import Index, Manifest, form_of_cache, manifest_of
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.cache import check_head_means, check_top_k
from gold_trainer.logit_form import LogitForm
from gold_trainer.models import StoredHead
from gold_trainer.rendering.collator import Processor
from gold_trainer.sides import Side, StoredEntries
from gold_trainer.teachers.absent import AbsentTeacher

logger = logging.getLogger(__name__)

NUM_CHECKED = 16  # rows of a dataset that are looked for before a run
AGAIN = "run gold-trainer cache-teacher again, which"


def open_cache(args: GOLDConfig) -> Manifest:
    """The manifest of a cache that is complete and fits the config; no row is read."""
    assert args.teacher_cache is not None, "there is a cache"
    folder = Path(args.teacher_cache)
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(
            f"teacher_cache must be a folder that gold-trainer cache-teacher has written, got "
            f"{folder} without {store.MANIFEST}; run it with the same config first."
        )
    form = args.teacher_cache_form
    if form not in (None, manifest.form):
        raise ValueError(
            f"teacher_cache {folder} holds teacher_cache_form={manifest.form}, this run asks for "
            f"{form}; leave the field out, or make another cache."
        )
    if manifest.form == "head_means":
        check_head_means(args)
    if manifest.form == "top_k":
        check_top_k(args)
        _check_number(folder, manifest, args)
    refuse_other_facts(str(folder), manifest.facts, facts_of_args(args))
    name = args.teacher_model_name_or_path
    if name is not None:
        refuse_other_facts(str(folder), manifest.facts, facts_of_teacher(args, name))
    if not manifest.is_complete:
        raise ValueError(
            f"teacher_cache {folder} is half written; {AGAIN} goes on where it was stopped."
        )
    sizes = store.shard_sizes(folder)
    for shard, expected in manifest.shards.items():
        if sizes.get(shard) != expected:
            raise ValueError(
                f"teacher_cache {folder}: {shard} is missing or ends early, "
                f"{_bytes(sizes.get(shard))} are there of {_bytes(expected)}; {AGAIN} writes it "
                "anew."
            )
    if store.head_bytes(folder) != manifest.head_bytes:
        raise ValueError(
            f"teacher_cache {folder}: {store.HEAD} is missing or ends early; {AGAIN} writes "
            "it anew."
        )
    return manifest


def _check_number(folder: Path, manifest: Manifest, args: GOLDConfig) -> None:
    """A smaller k takes the first of a cache's tokens, which is exact: their probabilities are
    those of the whole vocabulary, and what is left has none of its own.
    """
    there = manifest.width // 2
    if args.loss_top_k > there:
        raise ValueError(
            f"GOLDConfig: loss_top_k must be at most {there}, the tokens that teacher_cache "
            f"{folder} has of a position, got {args.loss_top_k}; lower it, or make another cache "
            "with gold-trainer cache-teacher."
        )


def as_stored(side: Side, args: GOLDConfig) -> Side:
    """The teacher's, of which a cache or a server may give the likeliest tokens alone."""
    if args.teacher_cache is None and args.asks_for_tokens:
        return replace(side, entries=StoredEntries(str(args.teacher_model_server_url), {}))
    if form_of_cache(args) != "top_k":
        return side
    return replace(side, entries=StoredEntries(str(args.teacher_cache), manifest_of(args).facts))


def _bytes(sizes: list[int] | None) -> str:
    return "0 bytes" if sizes is None else f"{sum(sizes)} bytes"


class StoredRows:
    """The rows of a cache by example, read from memory-mapped shards."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.index = Index(folder, list(manifest.shards))
        self.shards: dict[int, Any] = {}  # slices of those that were read from

    def of(self, example: Example) -> Tensor:  # (n, W)
        key = key_of(example)
        position = self.index.find(key.whole)
        if position is None:
            raise self._missing(example, key)
        entry = self.index.entry(position)
        stop = entry["start"] + entry["length"]
        shard = int(self.index.shards[position])
        try:
            rows = self._shard(shard)[entry["start"] : stop]
            is_whole = store.checksum(rows) == entry["checksum"]
        except (OSError, SafetensorError):
            is_whole = False
        if not is_whole:
            name = self.index.names[shard]
            raise ValueError(
                f"{example.where}: what teacher_cache {self.folder} has of it in {name} is "
                f"damaged; delete that shard ({name}.*) and {AGAIN} writes it anew."
            )
        return rows

    def _shard(self, number: int) -> Any:
        if number not in self.shards:
            path = self.folder / f"{self.index.names[number]}{store.SUFFIX}"
            file = safe_open(path, framework="pt")
            self.shards[number] = file.get_slice(store.ROWS)
        return self.shards[number]

    def _missing(self, example: Example, key: Key) -> ValueError:
        others = list(self.index.entries_of(example.index, example.turn))
        what = "it is not among the rows that were cached"
        if others:
            names = [name for name, part in key._asdict().items() if part not in _of(others, name)]
            parts = {"media": "pictures or videos"}
            what = f"the row has changed since it was cached ({_list(names, parts)})"
        return ValueError(
            f"{example.where}: teacher_cache {self.folder} has no such row, {what}; {AGAIN} adds "
            "what is missing."
        )


def _of(entries: list[dict[str, Any]], name: str) -> set[bytes]:
    return {entry[name] for entry in entries}


def _list(names: list[str], words: dict[str, str]) -> str:
    return ", ".join(words.get(name, name) for name in names) or "prompt and completion"


class CachedTeacher(AbsentTeacher):
    """Answers with what a cache holds: hidden states, or what FromMeans or FromTopK take of them.
    Its head alone is in memory, and that only for hidden states.
    """

    def __init__(self, stored: StoredRows, side: Side) -> None:
        self.stored, self.side = stored, side

    @classmethod
    def open(cls, processor: Processor, args: GOLDConfig) -> "CachedTeacher":
        """Open a cache in which source_of has found nothing wrong; processor is the teacher's."""
        assert args.teacher_cache is not None, "there is a cache"
        folder = Path(args.teacher_cache)
        for name in ("teacher_offload", "teacher_device", "teacher_model_server_url"):
            if getattr(args, name) is not None:
                logger.warning(
                    "GOLDTrainer: %s=%r is for gold-trainer cache-teacher alone: training from "
                    "teacher_cache has no weights of the teacher.",
                    name,
                    getattr(args, name),
                )
        manifest = manifest_of(args)
        refuse_other_facts(str(folder), manifest.facts, facts_of_processor(processor))
        empty = loading.empty_model(
            str(folder / store.TEACHER),
            args.teacher_model_init_kwargs,
            args.teacher_model_revision,
        )
        side = as_stored(Side.of(empty, "teacher", processor, args), args)
        form = LogitForm("teacher", is_measured=True, **manifest.logit_form)
        tensors = store.load_head(folder)
        head = side.head  # where nothing goes through it: its size alone is asked for
        if manifest.form == "hidden":
            head = StoredHead(tensors["weight"], tensors.get("bias"))
        return cls(StoredRows(folder, manifest), replace(side, head=head, form=form))

    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, D_t)
        parts = [self.stored.of(example) for example in inputs.examples if example.written_ids]
        manifest = self.stored.manifest
        empty = torch.empty(0, manifest.width, dtype=getattr(torch, manifest.dtype))
        hidden = torch.cat([empty, *parts])
        if self.device.type == "cuda":
            hidden = hidden.pin_memory()
        return hidden.to(self.device, non_blocking=True)

    def check_rows(
        self, rows: Any, collate: Callable[[list[Any]], WindowBatch], key: str | None = None
    ) -> None:
        """ValueError for a dataset that is another than the one that was cached, as a few of its
        rows show; others are refused when they come.
        """
        places = {i * (len(rows) - 1) // NUM_CHECKED for i in range(NUM_CHECKED + 1)}
        for position in sorted(places):
            try:
                batch = collate([rows[position]])
            except ValueError:  # refused, or left out, when its turn comes
                continue
            for example in batch.teacher_examples:
                if example.completion_ids and (key is None or example.teacher_id == key):
                    self.stored.of(example)
