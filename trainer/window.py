"""The micro-batches of one optimizer step: which rows they hold, and who writes the completions.

A window is all micro-batches of one device between two optimizer steps. Whatever has to be written
for it is written before its first forward: one writer's call for what the student writes
(on-policy) and, with seq_kd, one for what the teacher writes (off-policy).
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gold_trainer.batches import Example, PromptTensors, SideInputs, WindowBatch
from gold_trainer.completions import print_completions
from gold_trainer.config import GOLDConfig
from gold_trainer.data.videos import Video
from gold_trainer.objectives import Objective
from gold_trainer.sampling_check import SamplingCheck
from gold_trainer.sharding import missing_media, num_calls
from gold_trainer.sides import Side
from gold_trainer.writers import Completion, Prompt, Sampling, Writer

RowKey = tuple[int, int | None]  # row of the dataset and turn
Pictures = dict[tuple[str, RowKey], tuple[list[Image.Image], list[Video]]]  # by side
SEED_BITS = 62  # of a prompt: what its number of completions adds stays a number of 64 bits


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


def fetch_window(
    batches: Iterator[WindowBatch], num_batches: int, repeats: bool = True
) -> list[WindowBatch]:
    """The next micro-batches. Where rows are repeated, pictures of a row that comes again are those
    of the first time: datasets decode a row at each access, and workers send copies.
    """
    if not repeats:  # two rows of a stream may have one number
        return list(islice(batches, num_batches))
    pictures: Pictures = {}
    return [_share_pictures(batch, pictures) for batch in islice(batches, num_batches)]


def _share_pictures(batch: WindowBatch, pictures: Pictures) -> WindowBatch:
    def shared(side: str, example: Example) -> Example:
        key = side, (example.index, example.turn)
        images, videos = pictures.setdefault(key, (example.images, example.videos))
        return replace(example, images=images, videos=videos)

    examples = teacher_examples = [shared("student", example) for example in batch.examples]
    if batch.teacher_examples is not batch.examples:
        teacher_examples = [
            new if teacher is old else shared("teacher", teacher)
            for new, old, teacher in zip(
                examples, batch.examples, batch.teacher_examples, strict=True
            )
        ]
    return replace(batch, examples=examples, teacher_examples=teacher_examples)


def _key(example: Example) -> tuple[Any, ...]:
    """A key that repetitions of a row in a window share: they share its pictures."""
    media = tuple(map(id, (*example.images, *example.videos)))
    return example.index, example.turn, example.prompt_text, media


class Rollouts:
    """Decides whose completions each micro-batch of a window learns from, and has them written."""

    def __init__(
        self,
        args: GOLDConfig,
        objective: Objective,
        writers: Mapping[str, Writer],  # of "student" and "teacher"
        models: Mapping[str, nn.Module | None],  # the same; None where no module is here
        tokenizer: PreTrainedTokenizerBase,  # the student's
    ) -> None:
        self.args, self.objective, self.writers, self.models = args, objective, writers, models
        self.tokenizer = tokenizer
        is_noisy = bool(args.neftune_noise_alpha) or not args.disable_dropout
        self.sampling_check = SamplingCheck(args.device, is_noisy=is_noisy)
        self.begin()

    def begin(self) -> None:
        """A run begins."""
        self.ages: list[int] = []  # since the last log: steps that rollouts' weights were behind
        self.sampling_check.reset()

    @cached_property
    def sampling(self) -> dict[str, Sampling]:
        """What each writer samples from."""
        collators = self.objective.collators
        return {name: Sampling.of(self.args, collators[name]) for name in self.writers}

    def check(self, hidden: Tensor, side: Side, inputs: SideInputs) -> None:  # (N, D)
        """Compare the odds that the student gives to what it has written with those of its
        writer.
        """
        self.sampling_check.add(hidden, side.head, side.form, inputs, self.sampling["student"])

    def logs(self, accelerator: Accelerator) -> dict[str, float]:
        ages, self.ages = self.ages, []
        stale = {}
        if self.args.use_vllm and ages:  # the same on every rank, as weights go over together
            stale = {"rollout_age": sum(ages) / len(ages)}
        return self.sampling_check.logs(accelerator) | stale if self.args.lmbda > 0 else {}

    def source(self, step: int, micro_step: int) -> str:
        """Student (on-policy), teacher or dataset; the same on every rank and after a resume."""
        draw = random.Random(f"{self.args.seed} {step} {micro_step}").random()
        if draw < self.args.lmbda:
            return "student"
        return "teacher" if self.args.seq_kd else "dataset"

    def look_ahead(self, batches: list[WindowBatch], step: int) -> None:
        """Writers see the prompts of the window of a later step, within the step before it."""
        for name, writer in self.writers.items():
            own = [
                batch
                for i, batch in enumerate(batches)
                if self.source(step, i) == name and not batch.is_blank
            ]
            writer.look_ahead(self._prompts(name, own, step, None))

    def ask(self, batches: list[WindowBatch], step: int) -> Callable[[], Iterator[Example]] | None:
        """Have a server write the student's completions of the window of a later step, with the
        weights of the step before it. They are there when the answer is called, on all ranks.
        """
        due = [i for i in range(len(batches)) if self.source(step, i) == "student"]
        if not due:
            return None
        writer = self.writers["student"]
        writer.sync_weights(self.models["student"], step - 1)
        own = [batches[i] for i in due if not batches[i].is_blank]
        before = self._before(own)
        prompts = self._prompts("student", own, step, before)  # a server's: others need none
        answer = writer.start(prompts, self.sampling["student"])
        return lambda: self._examples(prompts, answer(), step)

    def complete(
        self,
        batches: list[WindowBatch],
        step: int,
        asked: Callable[[], Iterator[Example]] | None = None,  # for the student's completions
    ) -> list[WindowBatch]:
        """The window with its completions; one call of each writer that has to write."""
        sources = [self.source(step, micro_step) for micro_step in range(len(batches))]
        completed = [
            replace(batch, source=source) for batch, source in zip(batches, sources, strict=True)
        ]
        for name, writer in self.writers.items():
            due = [i for i, source in enumerate(sources) if source == name]
            if not due:
                continue
            own = [i for i in due if not batches[i].is_blank]
            mine = [completed[i] for i in own]
            if name == "student" and asked is not None:
                written = self._with(asked(), name, mine)
            else:
                writer.sync_weights(self.models[name], step)
                before = self._before(mine)
                written = self.write(name, mine, step, before) if mine else []
                if not mine and not writer.runs_together:  # it ends what the new weights began
                    writer.complete([], self.sampling[name])
                elif not mine and self.args.world_size > 1:  # sharded weights write on all ranks
                    self._completed(name, [completed[due[0]]], step)
            for i, batch in zip(own, written, strict=True):
                completed[i] = batch
        shown = next((batch for batch in completed if not batch.is_blank), None)
        if shown is not None:
            self._print(shown.examples, shown.source, step)
        return completed

    def write(
        self,
        name: str,
        batches: list[WindowBatch],
        step: int | str,  # or what else makes the seeds of this call different
        before: Mapping[RowKey, int] | None = None,  # completions of a row that others write
    ) -> list[WindowBatch]:
        """The batches with completions of one writer's call."""
        return self._with(self._completed(name, batches, step, before), name, batches)

    def _with(
        self, examples: Iterator[Example], name: str, batches: list[WindowBatch]
    ) -> list[WindowBatch]:
        return [
            self.objective.with_completions(
                batch, name, list(islice(examples, len(self.objective.prompts(batch, name))))
            )
            for batch in batches
        ]

    def _before(self, batches: list[WindowBatch]) -> Mapping[RowKey, int]:
        """How many completions of a row are written on ranks before this one: where an epoch ends,
        a row may be on several.
        """
        if self.args.world_size == 1 or self.args.num_generations == 1:
            return {}
        ranks: list[list[RowKey]] = gather_object(
            [[(e.index, e.turn) for batch in batches for e in batch.examples]]
        )
        return Counter(key for rank in ranks[: self.args.process_index] for key in rank)

    def _completed(
        self,
        name: str,
        batches: list[WindowBatch],
        step: int | str,
        before: Mapping[RowKey, int] | None = None,
    ) -> Iterator[Example]:
        prompts = self._prompts(name, batches, step, before)
        written = self.writers[name].complete(prompts, self.sampling[name])
        made = self.writers[name].take_made()
        return self._examples(prompts, written, step, made if len(batches) == 1 else None)

    def _examples(
        self,
        prompts: list[Prompt],
        written: list[list[Completion]],
        step: int | str,
        made: PromptTensors | None = None,  # of a micro-batch that is all that was written
    ) -> Iterator[Example]:
        for prompt, completions in zip(prompts, written, strict=True):
            for completion in completions:
                self.ages += [step - completion.version] if isinstance(step, int) else []
                example = prompt.example.with_sample(completion.token_ids, completion.logprobs)
                yield replace(example, made=made)

    def _prompts(
        self,
        name: str,
        batches: list[WindowBatch],
        step: int | str,
        before: Mapping[RowKey, int] | None,
    ) -> list[Prompt]:
        """Prompts of the batches' rows and, behind them, of rows that run the vision tower as
        others do.
        """
        rows = [e.unanswered() for batch in batches for e in self.objective.prompts(batch, name)]
        side = {"student": "unscored", "teacher": "teacher_unscored"}[name]
        if self.writers[name].runs_together:
            rows += missing_media(rows, [e for batch in batches for e in getattr(batch, side)])
        return self._prompts_of(rows, name, step, before or {})

    def _prompts_of(
        self, rows: list[Example], name: str, step: int | str, before: Mapping[RowKey, int]
    ) -> list[Prompt]:
        """Runs of one row with the same pictures are one prompt. Its seed follows from the run's,
        the step, the side and the row; a row that comes again goes on where its last run ended.
        """
        prompts: list[Prompt] = []
        repetitions = Counter(before)
        for (index, turn, *_), run in groupby(rows, _key):
            examples = list(run)
            place = f"{self.args.seed} {step} {name} {index} {turn}"
            seed = random.Random(place).getrandbits(SEED_BITS) + repetitions[index, turn]
            repetitions[index, turn] += len(examples)
            room = self._room(examples[0])
            prompts.append(Prompt(examples[0], room, seed, len(examples)))
        return prompts

    def _room(self, example: Example) -> int:
        room, max_length = self.args.max_completion_length, self.args.max_length
        return room if max_length is None else min(room, max_length - example.prompt_length)

    def evaluated(self, batch: WindowBatch) -> WindowBatch:
        """The batch of an evaluation; where seq_kd rows have no completion, the teacher's."""
        is_due = any(example.completion_ids is None for example in batch.examples)
        is_written = num_calls(self.models["teacher"], int(is_due), self.args.device) > 0
        if is_due:
            (batch,) = self.write("teacher", [batch], "eval")
        elif is_written:  # on another rank, by a teacher that is in parts
            self._completed("teacher", [batch], "eval")
        return batch

    def _print(self, examples: list[Example], source: str, step: int) -> None:
        """A table of the window's first micro-batch, where one is due."""
        is_due = step % self.args.log_completions_steps == 0 and self.args.process_index == 0
        if self.args.log_completions and is_due:
            limit = self.args.num_completions_to_print
            print_completions(self.tokenizer, examples, source, step, limit)
