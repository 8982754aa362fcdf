"""What a plan is made for: models of their configs alone, and a micro-batch of the longest row."""

import time
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from gold_trainer import loading, refusals
from gold_trainer.batches import Example, MicroBatch, WindowBatch
from gold_trainer.caching.store import manifest_of
from gold_trainer.command_line import Run
from gold_trainer.config import GOLDConfig
from gold_trainer.data.streams import RowStream, open_rows
from gold_trainer.objectives import Objective
from gold_trainer.planning.memory import Subject
from gold_trainer.planning.passes import Stored, kept_tokens
from gold_trainer.precision import fit_to_model
from gold_trainer.preparing import prepare
from gold_trainer.sides import Side
from gold_trainer.teachers.cached import as_stored

NUM_ROWS = 64
SECONDS = 2.0  # rows that are slow to read are looked at less
FUSED = ("flash", "flex", "sdpa", "paged")  # kinds of attention that keep no scores


class Sample(NamedTuple):
    """The longest row of those that were looked at, and how many these were."""

    batch: WindowBatch
    num_tokens: int
    num_rows: int


class Found(NamedTuple):
    subject: Subject
    assumption: str  # about the micro-batch, in words


def find_subject(run: Run, num_tokens: int | None = None) -> Found:
    """num_tokens: of each row, in place of what the rows have."""
    args = run.config
    if args.teacher_models is not None:
        raise ValueError(
            "gold-trainer plan: one teacher is expected, got teacher_models with "
            f"{', '.join(args.teacher_models)}; plan with the largest as "
            "teacher_model_name_or_path, and add the weights of the others."
        )
    refusals.refuse_unusable(run.student, run.teacher, args, None, None, None, run.peft_config)
    prepared = prepare(run.student, run.teacher, args)
    student: Any = _empty(run.student, args.model_init_kwargs, None)
    fit_to_model(args, student)
    if run.peft_config is not None:
        student = loading.add_adapter(student, run.peft_config)
    if args.disable_dropout:
        loading.disable_dropout(student)
    source = args.teacher_model_init_kwargs, args.teacher_model_revision
    teacher = _empty(str(run.teacher), *source).requires_grad_(False)
    sides = (
        Side.of(student, "student", prepared.student_processor, args),
        as_stored(Side.of(teacher, "teacher", prepared.teacher_processor, args), args),
    )
    objective = prepared.objective(args, *sides)
    rows = open_rows(run.train_rows, args, **prepared.row_options)
    sample = longest_of(rows, objective, args)
    window = _window_of(sample, objective, num_tokens)

    def batch_of(size: int) -> MicroBatch:
        return objective.prepare(repeated(window, objective, size), lambda tensor: tensor)

    batch = batch_of(args.per_device_train_batch_size)
    models_and_sides = student, None if args.has_absent_teacher else teacher, sides
    stored = _stored(args)
    subject = Subject(args, *models_and_sides, objective, batch, batch_of, stored)
    return Found(subject, _assumption(sample, batch, args, num_tokens))


def _stored(args: GOLDConfig) -> Stored | None:
    if args.teacher_cache is None:
        return kept_tokens(args) if args.asks_for_tokens else None
    manifest = manifest_of(args)
    dtype = getattr(torch, manifest.dtype)
    return Stored(manifest.width, dtype, has_head=manifest.form == "hidden")


def _empty(name: str, init_kwargs: Any, revision: str | None) -> PreTrainedModel:
    """The model without weights, in the dtype and with the attention that the run would load it
    with.
    """
    model = loading.empty_model(name, init_kwargs, revision)
    given = init_kwargs or {}
    dtype = given.get("dtype", given.get("torch_dtype", "auto"))
    if dtype == "auto":
        dtype = model.config.dtype or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    attention = given.get("attn_implementation")
    if attention is not None:
        is_fused = any(name in str(attention) for name in FUSED)
        model.set_attn_implementation("sdpa" if is_fused else attention)
    return model.to(dtype)


def longest_of(rows: Any, objective: Objective, args: GOLDConfig) -> Sample:
    """The longest of rows that stand evenly over the dataset, or of a stream's first ones."""
    started, best, num_rows = time.monotonic(), None, 0
    if isinstance(rows, RowStream):
        items = (row for row, _ in zip(rows, range(NUM_ROWS), strict=False))
    else:
        items = (rows[i] for i in range(0, len(rows), max(1, -(-len(rows) // NUM_ROWS))))
    iterator = iter(items)
    while best is None or time.monotonic() - started < SECONDS:
        try:
            row = next(iterator)
            batch = _written(objective.collator([row]), objective, args)
        except StopIteration:
            break
        except ValueError:  # a row that the run refuses, or leaves out
            continue
        num_rows += 1
        length = _length(batch.examples[0])
        if best is None or length > best[1]:
            best = batch, length
    if best is None:
        raise ValueError(
            "gold-trainer plan: at least one row that can be used is expected, got none; "
            "gold-trainer check says what is wrong with each."
        )
    return Sample(*best, num_rows)


def _length(example: Example) -> int:
    return example.prompt_length + len(example.written_ids)


def _written(batch: WindowBatch, objective: Objective, args: GOLDConfig) -> WindowBatch:
    """The batch, or one with a completion of the most tokens, where a model writes longer ones."""
    writers = ["student"] * (args.lmbda > 0) + ["teacher"] * args.seq_kd
    for writer in writers:
        examples = objective.prompts(batch, writer)
        collator = objective.collators[writer]
        room = [collator.room(example) for example in examples]
        lengths = [min(args.max_completion_length, r or args.max_completion_length) for r in room]
        token = collator.tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        filled = [e.with_completion(token * n) for e, n in zip(examples, lengths, strict=True)]
        written = objective.with_completions(batch, writer, filled)
        known = batch.examples[0].completion_ids
        if known is None or _length(written.examples[0]) > _length(batch.examples[0]):
            batch = written
    return batch


def _window_of(sample: Sample, objective: Objective, num_tokens: int | None) -> WindowBatch:
    batch = sample.batch
    if num_tokens is not None:
        example = objective.prompts(batch, "student")[0]
        if num_tokens <= example.prompt_length:
            raise ValueError(
                f"gold-trainer plan: tokens must be above the {example.prompt_length} of the "
                f"longest prompt, got {num_tokens}; raise it."
            )
        token = objective.collators["student"].tokenizer("a", add_special_tokens=False)["input_ids"]
        ids = token[:1] * (num_tokens - example.prompt_length)
        batch = objective.with_completions(batch, "student", [example.with_completion(ids)])
    return batch


def repeated(batch: WindowBatch, objective: Objective, size: int) -> WindowBatch:
    examples, teacher_examples = batch.examples * size, batch.teacher_examples * size
    if batch.teacher_examples is batch.examples:
        teacher_examples = examples
    whole = WindowBatch(examples, teacher_examples, source=batch.source)
    if batch.alignment is None:
        return whole
    return objective.with_completions(whole, "student", examples)


def _assumption(sample: Sample, batch: MicroBatch, args: GOLDConfig, num_tokens: int | None) -> str:
    lengths = [side.tensors["input_ids"].shape[1] for side in (batch.student, batch.teacher)]
    text = f"{args.per_device_train_batch_size} rows of {lengths[0]} tokens"
    if lengths[1] != lengths[0]:
        text += f" ({lengths[1]} of the teacher's)"
    if num_tokens is None:
        text += f", the longest of {sample.num_rows} rows looked at"
        if args.lmbda > 0 or args.seq_kd:
            text += (
                f", with max_completion_length={args.max_completion_length} where one is written"
            )
        if args.max_length is not None:
            text += f"; max_length is {args.max_length}"
    return text


def trained_numbers(model: nn.Module) -> tuple[int, int]:
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)
