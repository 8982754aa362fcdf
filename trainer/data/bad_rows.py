"""Rows that are left out instead of ending the run: on_bad_row and on_long_prompt.

A loss is a mean over the scored tokens of the global batch, so a batch without a row is exact. Its
other rows stay where they are: neither workers nor ranks nor a resume change what a step learns
from. Where no row of a micro-batch is left, a blank one without scored tokens takes its place:
every rank runs as many forward passes as the others.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gold_trainer.batches import WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import REASONS, BadRow

logger = logging.getLogger(__name__)

NUM_WARNINGS = 3  # of each reason; the log counts all
NAME = "skipped_rows"  # in the log, and in a checkpoint's trainer_state.json


class TolerantRows(Dataset):
    """Rows with a length; in the place of one that cannot be read, a BadRow."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.rows[index]
        except ValueError as error:
            return BadRow.of(self.rows.row_of(index), error)


def tolerant(rows: Any) -> Any:
    """The rows, or the stream of rows, with a BadRow in the place of each that cannot be read."""
    if not isinstance(rows, IterableDataset):
        return TolerantRows(rows)
    stream: Any = copy(rows)
    stream.is_tolerant = True
    return stream


class TolerantCollator:
    """A collator that leaves out what it refuses, and BadRows."""

    def __init__(
        self,
        collate: Callable[[list[Any]], WindowBatch],
        blank: Callable[[int], WindowBatch],  # of a row's index, without scored tokens
        reasons: Collection[str],  # others are errors
    ) -> None:
        self.collate, self.blank, self.reasons = collate, blank, frozenset(reasons)

    def __call__(self, rows: list[Any]) -> WindowBatch:
        bad = [row for row in rows if isinstance(row, BadRow)]
        good = [row for row in rows if not isinstance(row, BadRow)]
        try:
            batch = self.collate(good) if good else self.blank(bad[0].index)
        except ValueError:  # of one of the rows: which?
            good, refused = self._sorted_out(good)
            bad += refused
            batch = self.collate(good) if good else self.blank(bad[0].index)
        return replace(batch, skipped=bad) if bad else batch

    def _sorted_out(self, rows: list[Any]) -> tuple[list[Any], list[BadRow]]:
        good, bad = [], []
        for row in rows:
            try:
                self.collate([row])
                good.append(row)
            except ValueError as error:
                bad_row = BadRow.of(row.index, error)
                if bad_row.reason not in self.reasons:
                    raise
                bad.append(bad_row)
        return good, bad


def tolerant_collator(
    collate: Callable[[list[Any]], WindowBatch],
    blank: Callable[[int], WindowBatch],
    reasons: Collection[str],  # none: the collator itself
) -> Callable[[list[Any]], Any]:
    return TolerantCollator(collate, blank, reasons) if reasons else collate


class SkippedRows(TrainerCallback):
    """Counts of rows that were left out by reason, on all ranks and since the run began: a resumed
    one goes on counting.
    """

    def __init__(self, args: GOLDConfig) -> None:
        self.reasons = args.skipped_reasons
        self.num_warned: Counter[str] = Counter()
        self.evaluated: Counter[str] = Counter()  # on this rank
        self.reset()

    def reset(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(self.reasons, 0)  # before this resume
        self.has_learnt = False  # from any row, before this resume
        # of the steps since, on the device: items that were learnt from, rows by reason
        self.totals: Tensor | None = None
        self.step: Tensor | None = None  # of the step in flight

    def count(self, batches: Iterable[WindowBatch]) -> list[int]:
        """Rows left out of these batches by reason; the first of each reason are warned of."""
        counts: Counter[str] = Counter()
        for row in (row for batch in batches for row in batch.skipped):
            counts[row.reason] += 1
            self.num_warned[row.reason] += 1
            if self.num_warned[row.reason] <= NUM_WARNINGS:
                logger.warning("GOLDTrainer: left out (%s/%s): %s", NAME, row.reason, row.message)
        return [counts[reason] for reason in self.reasons]

    def add(self, totals: Tensor) -> Tensor:
        """totals of all ranks: (2,) what the loss is a mean over, which is returned, and counts."""
        num_items, counts = totals[:2], totals[2:]
        self.step = torch.cat([num_items.sum()[None], counts]).long() if self.reasons else None
        return num_items

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reset()
        callbacks: Any = state.stateful_callbacks
        kept = callbacks.get(NAME)
        if kept:  # by a checkpoint; reasons that are errors now are in no sum
            self.has_learnt = kept["has_learnt"]
            self.counts |= kept["counts"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.step is not None:
            self.totals = self.step if self.totals is None else self.totals + self.step
            self.step = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        counts, has_learnt = self._sums()
        if any(counts.values()) and not has_learnt and state.global_step:
            raise ValueError(
                "GOLDTrainer: at least one row must be usable, got none: "
                f"{_named(counts)} were left out; look at the warnings, or run gold-trainer check."
            )

    def keep(self, state: TrainerState) -> None:
        """Into what a checkpoint is about to hold."""
        if self.reasons:
            counts, has_learnt = self._sums()
            callbacks: Any = state.stateful_callbacks  # a dict, once the state is made
            callbacks[NAME] = {"counts": counts, "has_learnt": has_learnt}

    def logs(self) -> dict[str, float]:
        """All rows, and those of each reason that came up."""
        return _logged(self._sums()[0]) if self.reasons else {}

    def start_evaluation(self) -> None:
        self.evaluated.clear()

    def count_evaluated(self, batch: WindowBatch) -> None:
        self.evaluated.update(dict(zip(self.reasons, self.count([batch]), strict=True)))

    def evaluation_logs(self, accelerator: Accelerator) -> dict[str, float]:
        if not self.reasons:
            return {}
        counts = torch.tensor([self.evaluated[reason] for reason in self.reasons])
        sums = accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()
        return _logged(dict(zip(self.reasons, sums, strict=True)))

    def _sums(self) -> tuple[dict[str, int], bool]:
        """Waits for the device."""
        num_items, *counts = [0] * (1 + len(self.reasons))
        if self.totals is not None:
            num_items, *counts = self.totals.tolist()
        sums = {r: self.counts[r] + n for r, n in zip(self.reasons, counts, strict=True)}
        return sums, self.has_learnt or num_items > 0


def _logged(counts: dict[str, int]) -> dict[str, float]:
    logs = {NAME: float(sum(counts.values()))}
    return logs | {f"{NAME}/{reason}": float(n) for reason, n in counts.items() if n}


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts.get(reason))
