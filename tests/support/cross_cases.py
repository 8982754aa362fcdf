"""Pairs of tiny models of two families with two tokenizers, their trainer, and what its step must
compute: row by row, no padding, full logits, float64. The reference uses nothing of trainer/.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels import CompletionAligner, TokenAlignment, VocabOverlap
from gold_kernels.tokens.ranges import TextPair, TokenRange
from gold_kernels.tokens.token_bytes import TokenBytes
from gold_kernels.uld import reference as reference_uld
from gold_trainer import GOLDConfig, GOLDTrainer
from support.eager_step import COMPLETIONS, completion_of, prompt_inputs, scored_logits
from support.tiny_models import TEXT_FAMILIES, tiny, tiny_rows
from support.trainer_cases import FIELDS, GradientRecorder

TEACHER_MERGES = 30  # of 128 on the student's side: most words are other tokens


class Side(NamedTuple):
    family: str
    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def make_sides(student: str, teacher: str) -> tuple[Side, Side]:
    return (
        Side(student, *tiny(student)),
        Side(teacher, *tiny(teacher, "teacher", num_merges=TEACHER_MERGES)),
    )


def rows_of(family: str, count: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Mixed lengths; for VLMs rows with one, two and no pictures of mixed sizes."""
    return tiny_rows(count, images=0 if family in TEXT_FAMILIES else "mixed", seed=seed)


def cross_trainer(
    output_dir: Any, rows: Any, student: Side, teacher: Side, **options: Any
) -> tuple[GOLDTrainer, GradientRecorder]:
    """options: eval_rows, peft_config, token_weighting, and fields of GOLDConfig."""
    recorder = GradientRecorder()
    eval_rows, peft_config = options.pop("eval_rows", None), options.pop("peft_config", None)
    token_weighting = options.pop("token_weighting", None)
    batch = {"per_device_train_batch_size": len(rows), "max_completion_length": 64, "max_steps": 2}
    trainer = GOLDTrainer(
        model=student.model,
        teacher_model=teacher.model,
        args=GOLDConfig(
            output_dir=str(output_dir), **(FIELDS | batch | {"use_uld_loss": True} | options)
        ),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=student.processor,
        teacher_processing_class=teacher.processor,
        callbacks=[recorder],
        peft_config=peft_config,
        token_weighting=token_weighting,
    )
    return trainer, recorder


def aligner_of(student: Side, teacher: Side, merge: str = "bayesian", **options: Any):
    return CompletionAligner.from_tokenizers(
        student.tokenizer, teacher.tokenizer, merge=merge, is_late=merge == "observed", **options
    )


def completions_of(side: Side, rows: list[dict[str, Any]]) -> list[list[int]]:
    return [completion_of(side.family, side.processor, row) for row in rows]


def written_text(side: Side, ids: list[int], table: TokenBytes) -> tuple[str, bool]:
    """What stands between the blanks that the template writes, up to a broken byte, and whether the
    turn is ended behind it.
    """
    before, behind = COMPLETIONS[side.family].partition("<")[0].split("{}")
    is_ended = ids[-1:] == [side.tokenizer.eos_token_id]
    spelled = b"".join(table.pieces[i] for i in ids)
    try:
        text = spelled.decode()
    except UnicodeDecodeError as error:
        text, is_ended = spelled[: error.start].decode(), False
    text = text.removeprefix(before)
    return text.removesuffix(behind) if is_ended else text, is_ended


def teacher_completion(student: Side, teacher: Side, student_ids: list[int]) -> list[int]:
    """The student's answer, end of turn included, in the teacher's tokens, of families without
    blanks around an answer.
    """
    assert student_ids[-1] == student.tokenizer.eos_token_id
    return completion_ids(teacher, student.tokenizer.decode(student_ids[:-1]))


def completion_ids(side: Side, text: str, *, is_ended: bool = True) -> list[int]:
    """A text between the marks of a template."""
    whole = COMPLETIONS[side.family].format(text)
    ids = side.tokenizer(whole, add_special_tokens=False)["input_ids"]
    if is_ended:
        return ids
    before = COMPLETIONS[side.family].partition("{}")[0]
    return side.tokenizer(before + text, add_special_tokens=False)["input_ids"]


def aligned(
    aligner: CompletionAligner, pair: tuple[list[int], list[int]], text: bytes
) -> TokenAlignment:
    """Groups of the text that both completions have between the blanks of their templates."""
    ranges = []
    for table, ids in zip((aligner.student, aligner.teacher), pair, strict=True):
        start = b"".join(table.pieces[i] for i in ids).index(text)
        stop, position, rows, lead = start + len(text), 0, [], 0
        for row, token_id in enumerate(ids):
            before, position = position, position + len(table.pieces[token_id])
            if start < position <= stop:
                lead = lead if rows else max(0, start - before)
                rows.append(row)
        first = rows[0] if rows else 0
        ranges.append(TokenRange(first, rows[-1] + 1 if rows else 0, lead))
    return aligner.align(*pair, [TextPair(*ranges, text)])


def parts_of(
    student: Side, teacher: Side, completions: list[list[int]], aligner: CompletionAligner
) -> tuple[list[tuple[list[int], list[int]]], list[TokenAlignment]]:
    """The student's completions, the teacher's with the same texts, and their alignments."""
    pairs, alignments = [], []
    for ids in completions:
        text, is_ended = written_text(student, ids, aligner.student)
        pairs.append((ids, completion_ids(teacher, text, is_ended=is_ended)))
        alignments.append(aligned(aligner, pairs[-1], text.encode()))
    return pairs, alignments


def off_policy_parts(
    student: Side,
    teacher: Side,
    rows: list[dict[str, Any]],
    aligner: CompletionAligner | None = None,  # None: that of both tokenizers
) -> tuple[list[tuple[list[int], list[int]]], list[TokenAlignment]]:
    """Completions of both sides and their alignments, for the eager step."""
    if aligner is None:
        aligner = aligner_of(student, teacher)
    completions, alignments = parts_of(student, teacher, completions_of(student, rows), aligner)
    num_groups = sum(alignment.num_groups for alignment in alignments)
    assert num_groups < sum(len(teacher_ids) for _, teacher_ids in completions)
    return completions, alignments


def by_position(
    completions: list[tuple[list[int], list[int]]],
    alignments: list[TokenAlignment],
    skips: bool,  # the end tokens
) -> list[TokenAlignment]:
    """The alignments of plain ULD: token i with token i."""
    none, positions = torch.empty(0, dtype=torch.int64), []
    for alignment, pair in zip(alignments, completions, strict=True):
        rows_paired = torch.arange(min(len(ids) - skips for ids in pair))
        sides = (rows_paired, rows_paired, none, none, none) * 2
        positions.append(type(alignment)(*sides, *alignment[10:]))
    return positions


def eager_cross_step(
    student: Side,
    teacher: Side,
    rows: list[dict[str, Any]],
    completions: list[tuple[list[int], list[int]]],  # of student and teacher
    alignments: list[TokenAlignment],
    *,
    is_hybrid: bool = False,
    weights: tuple[float, float] | None = None,  # of matched and other entries
    beta: float = 0.5,
    crossentropy_weight: float = 0.0,
    has_labels: list[bool] | None = None,  # of each row; None: all of them
    distillation_weight: float = 1.0,
    unit_loss: Callable[..., Tensor] | None = None,  # of logits, weights and alignment; None: ULD
    unit_weights: Callable[..., Tensor] | None = None,  # of logits, completions and alignment
    teacher_rows: list[dict[str, Any]] | None = None,  # as the teacher sees them
    **temperatures: float,
) -> tuple[float, dict[str, Tensor]]:
    """Mean ULD over all groups plus mean cross-entropy over all labels; gradients by name."""
    has_labels = [True] * len(rows) if has_labels is None else has_labels
    options: dict[str, Any] = dict(temperatures)
    if is_hybrid:
        overlap = VocabOverlap.from_tokenizers(student.tokenizer, teacher.tokenizer)
        share = overlap.num_matched / overlap.student_vocab_size
        matched_weight, unmatched_weight = weights or (share, 1 - share)
        options |= {"overlap": overlap, "beta": beta}
        options |= {"matched_weight": matched_weight, "unmatched_weight": unmatched_weight}
    models = deepcopy(student.model).double(), deepcopy(teacher.model).double()
    num_groups = sum(alignment.num_groups for alignment in alignments)
    num_labels = sum(len(ids[0]) for ids, has in zip(completions, has_labels, strict=True) if has)
    total = 0.0
    teacher_rows = rows if teacher_rows is None else teacher_rows
    for row, seen, ids, alignment, has in zip(
        rows, teacher_rows, completions, alignments, has_labels, strict=True
    ):
        views = (student, row), (teacher, seen)
        inputs = [prompt_inputs(side.processor, view) for side, view in views]
        with torch.no_grad():
            teacher_logits = scored_logits(models[1], inputs[1], ids[1])
        student_logits = scored_logits(models[0], inputs[0], ids[0])
        unit = torch.full((alignment.num_groups,), distillation_weight / max(num_groups, 1))
        if unit_weights is not None:
            unit = unit * unit_weights(student_logits, teacher_logits, ids, alignment).detach()
        own: Any = 0
        if unit_loss is not None:
            own, unit = unit_loss(student_logits, teacher_logits, alignment, unit), 0 * unit
        loss = own + reference_uld.uld_loss(
            student_logits,
            teacher_logits,
            unit.double(),
            alignment=alignment,
            labels=torch.tensor(ids[0], dtype=torch.int64),
            label_weights=torch.full((len(ids[0]),), has / max(num_labels, 1)).double(),
            weight_hard=crossentropy_weight,
            **options,
        )
        loss.backward()
        total += loss.item()
    gradients = {
        name: parameter.grad
        for name, parameter in models[0].named_parameters()
        if parameter.grad is not None
    }
    return total, gradients


def assert_equals(trainer: GOLDTrainer, recorder: GradientRecorder, expected: tuple) -> None:
    """Loss and every gradient of the trainer's first step."""
    expected_loss, gradients = expected
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - expected_loss) <= 1e-5 * expected_loss
    present = {name for name, gradient in recorder.gradients.items() if gradient.any()}
    assert present == {name for name, gradient in gradients.items() if gradient.any()}
    scale = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert scale > 0
    for name, gradient in gradients.items():
        error = (recorder.gradients[name].double() - gradient).norm()
        # A bias in front of a softmax has a gradient of zero but for rounding.
        assert error <= 1e-4 * max(gradient.norm(), 1e-4 * scale), f"{name}: {error:.1e}"


def assert_step_is_eager(
    output_dir: Any,
    sides: tuple[Side, Side],
    rows: Any,
    parts: Any = None,  # completions of both sides and how they are aligned
    eager: dict[str, Any] | None = None,  # of eager_cross_step
    **options: Any,  # of cross_trainer
) -> GOLDTrainer:
    """Takes one off-policy step."""
    parts = off_policy_parts(*sides, rows) if parts is None else parts
    expected = eager_cross_step(*sides, rows, *parts, **(eager or {}))
    trainer, recorder = cross_trainer(output_dir, rows, *sides, **({"max_steps": 1} | options))
    trainer.train()
    assert_equals(trainer, recorder, expected)
    return trainer
