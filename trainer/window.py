"""The micro-batches of one optimizer step: which rows they hold, and who writes the completions.

A window is all micro-batches of one device between two optimizer steps. Whatever has to be written
for it is written before its first forward, by one generate call of the student (on-policy) and,
with seq_kd, one of the teacher (off-policy).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import nn

from gold_trainer.collator import Example, GOLDCollator, token_ids_of, tokenizer_of
from gold_trainer.completions import print_completions
from gold_trainer.config import GOLDConfig
from gold_trainer.models import teaching
from gold_trainer.pairing import PairCollator
from gold_trainer.rollout import generate_completions

Batch = dict[str, Any]
SIDES = ("examples", "teacher_examples")


class RepeatSampler(torch.utils.data.Sampler[int]):
    """Every row num_generations times an epoch, one repetition beside the other.

    The data loader deals batches of batch_size to the processes in turn. Rows are ordered so that
    what one process gets for its window is a run of whole prompts: with two processes, two
    micro-batches of two rows and num_generations=4, process 0 gets a a, a a and process 1 b b, b b.
    Only where an epoch ends within a window can a prompt's repetitions be split between processes;
    rows that the data loader adds there, to give every process as many, are repeated once more.

    The order follows from seed and epoch alone, so that a resumed run, for which the Trainer skips
    batches, goes on with the same rows. The epoch is asked for, not set: after a resume not every
    data loader passes set_epoch on to a sampler that it does not know.
    """

    def __init__(
        self,
        num_rows: int,
        args: GOLDConfig,
        *,
        num_windows: int,  # at a time: one of each data-parallel process
        epoch: Callable[[], int],
    ) -> None:
        self.num_rows, self.args = num_rows, args
        self.num_windows, self.epoch = num_windows, epoch

    def __len__(self) -> int:
        return self.num_rows * self.args.num_generations

    def __iter__(self) -> Iterator[int]:
        rows = [row for row in self._order() for _ in range(self.args.num_generations)]
        size, num_windows = self.args.per_device_train_batch_size, self.num_windows
        step_rows = num_windows * window_rows(self.args)
        for start in range(0, len(rows), step_rows):
            step = rows[start : start + step_rows]
            num_micro = len(step) // (size * num_windows)  # full ones in each window
            for micro_step in range(num_micro):
                for window in range(num_windows):
                    first = (window * num_micro + micro_step) * size
                    yield from step[first : first + size]
            yield from step[num_micro * num_windows * size :]

    def _order(self) -> list[int]:
        if self.args.train_sampling_strategy == "sequential":
            return list(range(self.num_rows))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(seed + self.epoch())
        return torch.randperm(self.num_rows, generator=generator).tolist()


def window_rows(args: GOLDConfig) -> int:
    """Rows of one device between two optimizer steps."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def fetch_window(batches: Iterator[Batch], num_batches: int) -> list[Batch]:
    """The next micro-batches. Pictures of a row that comes again are those of the first time:
    datasets decode a row at each access, and workers send copies.
    """
    pictures: dict[int, list[Image.Image]] = {}  # of a row of the dataset
    return [_share_pictures(batch, pictures) for batch in islice(batches, num_batches)]


def _share_pictures(batch: Batch, pictures: dict[int, list[Image.Image]]) -> Batch:
    shared = {
        name: [replace(e, images=pictures.setdefault(e.index, e.images)) for e in batch[name]]
        for name in SIDES
        if name in batch
    }
    return {**batch, **shared}


class Rollouts:
    """Decides whose completions each micro-batch of a window learns from, and has them written."""

    def __init__(
        self,
        args: GOLDConfig,
        student: GOLDCollator,
        teacher: GOLDCollator,
        pairs: PairCollator | None,  # None: one family, examples serve both sides
        *,
        is_own_teacher: bool,
    ) -> None:
        self.args, self.pairs, self.is_own_teacher = args, pairs, is_own_teacher
        self.sides = {"student": student, "teacher": teacher}

    @cached_property
    def token_ids(self) -> dict[str, frozenset[int]]:
        """What student and teacher may write: no placeholders of pictures, and no rows of a head
        that are no token.
        """
        return {
            name: frozenset(token_ids_of(side.processor) - side.placeholder_ids)
            for name, side in self.sides.items()
        }

    def source(self, step: int, micro_step: int) -> str:
        """Student (on-policy), teacher or dataset; the same on every rank and after a resume."""
        draw = random.Random(f"{self.args.seed} {step} {micro_step}").random()
        if draw < self.args.lmbda:
            return "student"
        return "teacher" if self.args.seq_kd else "dataset"

    def complete(
        self,
        batches: list[Batch],  # of one window
        step: int,
        models: dict[str, nn.Module],  # of student and teacher
    ) -> list[Batch]:
        """The window with its completions; one generate call for all that a model has to write."""
        sources = [self.source(step, micro_step) for micro_step in range(len(batches))]
        completed = list(batches)
        for source, model in models.items():
            own = [i for i, written_by in enumerate(sources) if written_by == source]
            if not own:
                continue
            place = f"{self.args.seed} {step} {source} {self.args.process_index}"
            written = self.generate(source, model, [batches[i] for i in own], place)
            for i, batch in zip(own, written, strict=True):
                completed[i] = batch
        self._print(completed[0]["examples"], sources[0], step)
        return [
            {**batch, "is_on_policy": source == "student"}
            for batch, source in zip(completed, sources, strict=True)
        ]

    def generate(
        self, source: str, model: nn.Module, batches: list[Batch], place: str
    ) -> list[Batch]:
        """The batches with completions of the student or the teacher, of one generate call; place,
        where in the run, seeds it.
        """
        side = self.sides[source]
        name = "examples" if source == "student" or self.pairs is None else "teacher_examples"
        with teaching(model, self.is_own_teacher and source == "teacher"):
            examples = generate_completions(
                model,
                side.processor,
                [example for batch in batches for example in batch[name]],
                sorted(side.end_ids),
                self.token_ids[source],
                self.args,
                random.Random(place).getrandbits(63),
            )
        written = iter(examples)
        return [
            self._with_examples(source, batch, list(islice(written, len(batch[name]))))
            for batch in batches
        ]

    def _with_examples(self, source: str, batch: Batch, examples: list[Example]) -> Batch:
        if self.pairs is None:
            return {**batch, "examples": examples}
        if source == "student":
            return self.pairs.with_student_completions(batch, examples)
        return self.pairs.with_teacher_completions(batch, examples)

    def _print(self, examples: list[Example], source: str, step: int) -> None:
        """A table of the window's first micro-batch, where one is due."""
        is_due = step % self.args.log_completions_steps == 0 and self.args.process_index == 0
        if self.args.log_completions and is_due:
            tokenizer = tokenizer_of(self.sides["student"].processor)
            limit = self.args.num_completions_to_print
            print_completions(tokenizer, examples, source, step, limit)
