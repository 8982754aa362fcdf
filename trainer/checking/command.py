"""`gold-trainer check`: reads what a run would read, and says what it would refuse.

Rows go the way that they go in training, from the reader to the collator, in data loader workers.
Models are made of their configs, without weights.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from gold_trainer import models, refusals
from gold_trainer.batches import WindowBatch
from gold_trainer.caching.store import form_of_cache
from gold_trainer.checking.counts import Part, PartCollator, SplitReport
from gold_trainer.checking.tables import make_console, print_examples, print_split
from gold_trainer.command_line import Run, read_run
from gold_trainer.config import GOLDConfig
from gold_trainer.data.bad_rows import TolerantCollator, tolerant
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.row_errors import REASONS, BadRow
from gold_trainer.data.streams import RowStream, open_rows
from gold_trainer.empty_sides import empty_sides
from gold_trainer.objectives import CrossTokenizer, Objective
from gold_trainer.preparing import Prepared, prepare
from gold_trainer.progress import num_cores, progress
from gold_trainer.rendering.prompts import token_ids_of
from gold_trainer.teachers import source_of
from gold_trainer.teachers.cached import as_stored

BATCH_SIZE = 16


def check(argv: list[str]) -> int:
    """The exit code: 0, or 1 where a row is refused; ValueError for everything else."""
    own, argv = _own_arguments(argv)
    run = read_run(argv)
    args = run.config
    if form_of_cache(args) is not None or run.teacher is None:  # else it is yet to be made
        run = run._replace(teacher=source_of(run.teacher, args))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    refusals.refuse_unusable(run.student, run.teacher, args, None, None, None, run.peft_config)
    prepared = prepare(run.student, run.teacher, args)
    objective, facts = _objective(run, prepared)
    collator = TolerantCollator(objective.collator, objective.collator.blank, REASONS)
    console = make_console()
    for line in facts:
        console.print(line, markup=False, soft_wrap=True)
    splits = {"train": (run.train_rows, prepared.row_options, _num_rows_of_a_run(args))}
    if run.eval_rows is not None:
        splits["eval"] = (run.eval_rows, prepared.eval_row_options, None)
    reports = []
    for name, (dataset, options, limit) in splits.items():
        rows = open_rows(dataset, args, **options)
        report = _read(name, rows, PartCollator(collator, objective.collators), args, limit)
        if report.num_rows == 0:
            raise ValueError(f"gold-trainer check: {name} must have rows, got none; check splits.")
        print_split(console, report, args)
        if report.tokens and isinstance(rows, RowDataset):
            rows.first(skips_bad=True)
            console.print(f"rows: {rows.description}", markup=False, soft_wrap=True)
        reports.append(report)
        if name == "train":
            tokenizers = {side: c.tokenizer for side, c in objective.collators.items()}
            print_examples(console, list(_examples(rows, collator, own.num_examples)), tokenizers)
    num_refused = sum(report.num_refused for report in reports)
    if own.output is not None:
        result = {report.name: report.as_dict(args) for report in reports}
        Path(own.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(_verdict(num_refused, args), markup=False, soft_wrap=True)
    return 1 if num_refused else 0


def _own_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of the command itself, and the rest, which are a run's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--num_examples", default="2")
    parser.add_argument("--output")
    own, argv = parser.parse_known_args(argv)
    if not own.num_examples.isdecimal():
        raise ValueError(
            "gold-trainer check: num_examples must be a whole number, got "
            f"{own.num_examples!r}; 0 shows none."
        )
    own.num_examples = int(own.num_examples)
    if own.output is not None and Path(own.output).is_dir():
        raise ValueError(
            f"gold-trainer check: output must be a file, got the folder {own.output!r}; name a "
            "file in it."
        )
    if own.output is not None and not Path(own.output).absolute().parent.is_dir():
        raise ValueError(
            f"gold-trainer check: output must be a file in a folder that exists, got "
            f"{own.output!r}; make the folder first."
        )
    return own, argv


def _objective(run: Run, prepared: Prepared) -> tuple[Objective, list[str]]:
    """The loss of the pair without its weights, and what is known of the pair."""
    (student, teacher), sides = empty_sides(run, prepared)
    sides = sides[0], as_stored(sides[1], run.config)
    objective = prepared.objective(run.config, *sides)
    processors = prepared.student_processor, prepared.teacher_processor
    facts = []
    named = (("student", run.student, student), ("teacher", run.teacher, teacher))
    for (name, source, model), side, processor in zip(named, sides, processors, strict=True):
        kind = "text only" if prepared.is_text else "vision and language"
        facts.append(
            f"{name}: {source}, {type(models.base_model(model)).__name__}, {kind}, a head of "
            f"{side.head.out_features} rows, {len(token_ids_of(processor))} tokens"
        )
    if not isinstance(objective, CrossTokenizer):
        return objective, [*facts, "tokenizers: one for both"]
    shared = objective.overlap
    text = "" if shared is None else f", {len(shared.student_ids)} entries in common"
    return objective, [*facts, f"tokenizers: two{text}"]


def _num_rows_of_a_run(args: GOLDConfig) -> int | None:
    """How many rows of a stream a run reads; None: all."""
    if args.max_steps <= 0:
        return None
    sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    return args.max_steps * sizes[0] * sizes[1] * sizes[2]


def _read(
    name: str, rows: Any, collator: PartCollator, args: GOLDConfig, limit: int | None
) -> SplitReport:
    """All rows, in workers; of a stream, which one worker reads, as many as a run does."""
    is_stream = isinstance(rows, RowStream)
    workers = 1 if is_stream else args.dataloader_num_workers or num_cores()
    loader: DataLoader = DataLoader(
        tolerant(rows), batch_size=BATCH_SIZE, num_workers=workers, collate_fn=collator
    )
    report = SplitReport(name)
    total = limit if is_stream else len(rows)
    batches: Iterator[Part] = iter(loader)
    if is_stream and limit is not None:
        batches = islice(batches, -(-limit // BATCH_SIZE))  # to the end of a batch
    with progress() as bar:
        task = bar.add_task(name, total=total)
        for part in batches:
            bar.advance(task, report.add(part))
    return report


def _examples(rows: Any, collator: TolerantCollator, count: int) -> Iterator[WindowBatch]:
    """The first rows that can be used, one a batch."""
    readable = tolerant(rows)
    places = range(len(readable)) if isinstance(readable, Sized) else None
    items = iter(readable) if places is None else (readable[i] for i in places)
    batches = (collator([row]) for row in items if not isinstance(row, BadRow))
    return islice((batch for batch in batches if not batch.is_blank), count)


def _verdict(num_refused: int, args: GOLDConfig) -> str:
    if not num_refused:
        return "\nall rows can be used"
    if args.on_bad_row == "skip":
        return f"\n{num_refused} rows are refused; on_bad_row=skip leaves them out"
    return (
        f"\n{num_refused} rows are refused: mend or drop them, or set on_bad_row=skip to leave "
        "them out"
    )
