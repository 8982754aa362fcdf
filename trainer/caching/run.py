"""The run of `gold-trainer cache-teacher`: what is missing, its room on the disk, the teacher.

N_t scored positions of a batch, D_t hidden size, W numbers that are kept of each.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

import gold_kernels
from gold_trainer.batches import SideInputs
from gold_trainer.caching import store
from gold_trainer.caching.facts import PRECISIONS, copy_description, precision_of
from gold_trainer.caching.scan import (
    Builder,
    Found,
    Scored,
    as_in_training,
    batches_of,
    collator_of,
    load,
    scan,
)
from gold_trainer.caching.store import Index, Manifest, Place, ShardWriter, head_bytes
from gold_trainer.command_line import Run
from gold_trainer.data.rows import name_of
from gold_trainer.data.streams import open_rows
from gold_trainer.empty_sides import empty_sides
from gold_trainer.preparing import Prepared
from gold_trainer.progress import num_cores, progress
from gold_trainer.rendering.collator import build_side
from gold_trainer.sides import Side
from gold_trainer.speed.attention import without_cudnn
from gold_trainer.teachers import make_live_teacher
from gold_trainer.teachers.teacher import Teacher

ENTRY_BYTES = 256  # of an example in the index, at most


class Split(NamedTuple):
    name: str
    rows: Any  # as training reads them
    found: list[Found]
    missing: list[Found]


class Encoder:
    """What is kept of the teacher's hidden states: themselves, and the head they go through."""

    form = "hidden"
    facts: dict[str, Any]  # that it adds to those of the teacher

    def __init__(self, dtype: str, teacher: Side) -> None:  # without weights
        self.facts = {"cache_dtype": dtype}
        self.dtype = None if dtype == "auto" else getattr(torch, dtype)  # None: 16-bit
        weight = teacher.head.weight
        self.width, self.head_bytes = weight.shape[1], weight.numel() * weight.element_size()

    def start(
        self, teacher: Teacher, precision: torch.dtype | None, inputs: SideInputs
    ) -> dict[str, Tensor]:
        """What training needs beside rows, to be kept as the head; inputs: of one row, which the
        teacher has seen.
        """
        head = teacher.side.head
        if self.dtype is None:
            dtype = precision or head.weight.dtype
            self.dtype = dtype if dtype.itemsize == 2 else torch.bfloat16
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def rows(self, hidden: Tensor) -> Tensor:  # (N_t, D_t) -> (N_t, W)
        return hidden.to(self.dtype)


class Caching:
    """One run of the command in its folder, which it has locked."""

    def __init__(
        self,
        run: Run,
        prepared: Prepared,
        folder: Path,
        state: PartialState,
        batch_size: int | None,
        teacher_id: str | None = None,
    ) -> None:
        self.run_, self.args, self.prepared = run, run.config, prepared
        self.folder, self.state = folder, state
        self.batch_size = batch_size or run.config.per_device_train_batch_size
        self.num_workers = run.config.dataloader_num_workers or num_cores()
        _, self.sides = empty_sides(run, prepared)
        self.collate = collator_of(
            self.args, prepared.objective(self.args, *self.sides), teacher_id
        )
        self.console = Console(quiet=not state.is_main_process, highlight=False)

    def run(
        self, encoder: Encoder, manifest: Manifest | None, facts: dict[str, Any], shard_bytes: int
    ) -> None:
        """Write what is missing; the folder then is complete."""
        shards = list(store.shard_sizes(self.folder)) if manifest else []
        index = Index(self.folder, shards)
        splits = self._splits(index)
        has_head = manifest is not None and manifest.head_bytes == head_bytes(self.folder)
        self._announce(splits, encoder, has_head)
        missing = any(split.missing for split in splits)
        if missing or not has_head:
            if manifest is not None and self.state.is_main_process:
                manifest.is_complete = False
                manifest.write(self.folder)
            self.state.wait_for_everyone()
            manifest = self._write(splits, encoder, facts, shard_bytes)
        assert manifest is not None, "a cache that misses nothing has one"
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            manifest.shards = store.shard_sizes(self.folder)
            manifest.is_complete = True
            manifest.write(self.folder)
        self.state.wait_for_everyone()  # complete for whoever returns
        self._print(f"teacher cache {self.folder} is complete")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _splits(self, index: Index) -> list[Split]:
        """All rows that the run would score, read once before the teacher is."""
        run, options = self.run_, self.prepared
        given = [("train", run.train_rows, options.row_options)]
        if run.eval_rows is not None:
            given.append(("eval", run.eval_rows, options.eval_row_options))
        splits, known = [], set[bytes]()
        for name, dataset, row_options in given:
            rows = as_in_training(open_rows(dataset, self.args, **row_options), self.args)
            part = slice(self.state.process_index, None, self.state.num_processes)
            with progress() as bar:
                task = bar.add_task(f"reading {name}", total=len(range(len(rows))[part]))
                advance = partial(bar.advance, task)
                found = scan(rows, self.collate, self.num_workers, part=part, advance=advance)
            if self.state.num_processes > 1:
                found = sorted(gather_object(found))
            missing = []
            for one in found:
                if one.key.whole not in known and index.find(one.key.whole) is None:
                    missing.append(one)
                known.add(one.key.whole)
            splits.append(Split(name, rows, found, missing))
        if not any(split.found for split in splits):
            raise ValueError(
                "gold-trainer cache-teacher: at least one row must have a completion to score, got "
                "none; gold-trainer check says what is wrong with the rows."
            )
        return splits

    def _announce(self, splits: list[Split], encoder: Encoder, has_head: bool) -> None:
        """What will be written; ValueError where there is no room for it."""
        bytes_each = encoder.width * (encoder.dtype or torch.bfloat16).itemsize
        counts = ", ".join(f"{len(split.found)} of {split.name}" for split in splits)
        tokens = sum(one.num_scored for split in splits for one in split.found)
        missing = [one for split in splits for one in split.missing]
        missing_tokens = sum(one.num_scored for one in missing)
        need = missing_tokens * bytes_each + len(missing) * ENTRY_BYTES
        need += 0 if has_head else encoder.head_bytes
        free = store.free_bytes(self.folder)
        self._print(
            f"teacher cache {self.folder}: {counts} examples, {tokens} scored tokens, {bytes_each} "
            f"bytes each; {tokens - missing_tokens} are there"
        )
        self._print(f"to write: {_size(need)}; {_size(free)} are free")
        if need > free:
            raise ValueError(
                f"gold-trainer cache-teacher: the disk of teacher_cache {self.folder} must have "
                f"{_size(need)} free, got {_size(free)}; free some, choose another folder, or "
                "lower max_length."
            )

    def _write(
        self, splits: list[Split], encoder: Encoder, facts: dict[str, Any], shard_bytes: int
    ) -> Manifest:
        """The rows that are missing; a manifest is there before the first of them."""
        args, processor = self.args, self.prepared.teacher_processor
        teacher = make_live_teacher(self.run_.teacher, None, processor, args)
        teacher.place(args.device)
        # one row, for the form of the logits, which is measured when the teacher first runs
        with_rows = next(split for split in splits if split.found)
        first = [with_rows.found[0].position]
        inputs = self._inputs(next(self._load(with_rows, [first], 0)))
        with self._autocast():
            teacher.hidden_rows(inputs)
            head = encoder.start(teacher, PRECISIONS.get(facts["precision"]), self._whole(inputs))
        manifest = self._manifest(teacher, encoder, facts)
        if self.state.is_main_process:
            copy_description(args, str(self.run_.teacher), self.folder / store.TEACHER)
            store.save_head(self.folder, head)
            manifest.head_bytes = head_bytes(self.folder)
            manifest.write(self.folder)
        self.state.wait_for_everyone()
        writer = ShardWriter(self.folder, self.state.process_index, shard_bytes)
        for split in splits:
            batches = batches_of(split.missing, self.batch_size)
            batches = batches[self.state.process_index :: self.state.num_processes]
            with progress() as bar:
                task = bar.add_task(f"caching {split.name}", total=sum(map(len, batches)))
                for scored in self._load(split, batches, self.num_workers) if batches else ():
                    with self._autocast(), without_cudnn():  # as GOLDTrainer asks for them
                        rows = encoder.rows(teacher.hidden_rows(self._inputs(scored))).cpu()
                    parts = rows.split(scored.lengths)
                    for (place, key), part in zip(scored.places, parts, strict=True):
                        self._check_finite(part, place)
                        writer.add(place, key, part)
                    bar.advance(task, len(scored.places))
        writer.flush()
        return manifest

    def _load(self, split: Split, batches: list[list[int]], num_workers: int) -> Iterator[Scored]:
        is_here = self.args.teacher_model_server_url is None
        processor = self.prepared.teacher_processor if is_here else None
        builder = Builder(split.name, self.collate, processor)
        return load(split.rows, batches, builder, num_workers)

    def _inputs(self, scored: Scored) -> SideInputs:
        device, inputs = self.args.device, scored.inputs
        if isinstance(inputs, list):
            return SideInputs.without_tensors(inputs)
        return SideInputs(
            [],
            {name: tensor.to(device) for name, tensor in inputs.tensors.items()},
            inputs.scored_rows.to(device),
            inputs.labels,
        )

    def _whole(self, inputs: SideInputs) -> SideInputs:
        """The inputs with the tensors that a teacher elsewhere does without."""
        if inputs.tensors:
            return inputs
        processor, device = self.prepared.teacher_processor, self.args.device
        return build_side(processor, inputs.examples, lambda tensor: tensor.to(device))

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS.get(precision_of(self.args))
        return torch.autocast(self.args.device.type, dtype, enabled=dtype is not None)

    def _manifest(self, teacher: Teacher, encoder: Encoder, facts: dict[str, Any]) -> Manifest:
        form = teacher.side.form
        return Manifest(
            encoder.form,
            str(encoder.dtype).removeprefix("torch."),
            encoder.width,
            facts,
            {
                "teacher": self.run_.teacher,
                "revision": self.args.teacher_model_revision,
                "gold-kernels": gold_kernels.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            {"scale": form.scale, "softcap": form.softcap, "num_entries": form.num_entries},
        )

    def _check_finite(self, rows: Tensor, place: Place) -> None:
        if self.args.on_nonfinite == "error" and not rows.isfinite().all():
            raise ValueError(
                f"{name_of(place.row, place.turn)}: the teacher's hidden states must be finite, "
                f"got NaN or inf in {rows.dtype}; load the teacher in bfloat16 "
                "(teacher_model_init_kwargs), or drop the row."
            )


def _size(num_bytes: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
