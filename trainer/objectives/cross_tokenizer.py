"""The loss of two models with two tokenizers: each side has its own processor and chat template.

N_s, N_t scored rows of a side, G aligned groups, D hidden size (D_s, D_t). A unit of the loss is a
group: a minimal run of student tokens and one of teacher tokens that end at a common byte.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gold_kernels import (
    CompletionAligner,
    ULDMetrics,
    VocabOverlap,
    VocabProjection,
    fused_linear_uld,
)
from gold_trainer import loading, models
from gold_trainer.batches import BatchAlignment, Example, MicroBatch, SideInputs, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.models import Head
from gold_trainer.objectives.objective import (
    TOKEN_WEIGHT,
    Objective,
    form_options,
    mean_of,
    memory_options,
    summed,
)
from gold_trainer.rendering.collator import Processor, build_side
from gold_trainer.rendering.pairing import SKIP_REASONS, CompletionPairs, PairCollator
from gold_trainer.sides import Side

MATCHED = ("matched_loss", "unmatched_loss", "student_matched_mass", "teacher_matched_mass")
SKIPS = tuple(f"skipped_{reason}" for reason in SKIP_REASONS)


class CrossTokenizer(Objective):
    """Plain, extended or hybrid ULD of fused_linear_uld; see ULDFields."""

    counts = ("labels", "groups", "scored_bytes", "completion_bytes", *SKIPS)
    sums: tuple[str, ...] = ULDMetrics._fields
    loss_name = "uld_loss"
    function: ClassVar[Callable[..., Any]] = staticmethod(fused_linear_uld)
    collator: PairCollator

    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None:
        pairs = CompletionPairs(args, student.collator, teacher.collator)
        self.collator = PairCollator(student.collator, teacher.collator, pairs)
        self.collators = {"student": student.collator, "teacher": teacher.collator}
        self.distillation_weight = args.uld_distillation_weight
        self.crossentropy_weight = args.uld_crossentropy_weight
        self.forms = student.form, teacher.form
        self.is_absent = args.is_told_by_examples
        self.overlap = None
        tables = pairs.aligner.student, pairs.aligner.teacher
        if args.uld_use_hybrid_loss:
            self.overlap = VocabOverlap.from_token_bytes(*tables)
        if self.overlap is not None and args.uld_relaxed_overlap:
            projection = VocabProjection.from_token_bytes(*tables)
            self.overlap = projection.relaxed_overlap(self.overlap)
        self.options = {
            **memory_options(args),
            "beta": args.beta,
            "temperature": (args.uld_student_temperature, args.uld_teacher_temperature),
            **self.own_options(args, pairs.aligner),
        }

    def own_options(self, args: GOLDConfig, aligner: CompletionAligner) -> dict[str, Any]:
        """Options of the fused loss beside those that all losses have."""
        return {
            "overlap": self.overlap,
            "matched_weight": args.uld_hybrid_matched_weight,
            "unmatched_weight": args.uld_hybrid_unmatched_weight,
        }

    @staticmethod
    def check_pair(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        models.check_modality(student, teacher)

    @staticmethod
    def teacher_processor(
        teacher_model: PreTrainedModel | str,
        args: GOLDConfig,
        given: Processor | None,
        student: Processor,
    ) -> Processor:
        is_vlm = models.is_processor(student)
        if given is None:
            name, hub_options = loading.teacher_source(teacher_model, args)
            if not name:
                raise ValueError(
                    "GOLDTrainer: use_uld_loss needs the teacher's processor, got a teacher that "
                    "was not loaded from a folder or the hub; pass teacher_processing_class=, or "
                    "set teacher_tokenizer_name_or_path."
                )
            given = loading.load_teacher_processor(name, hub_options, is_vlm)
        argument = "teacher_processing_class"
        models.check_processor(given, is_vlm, "teacher", argument)
        options = args.teacher_model_init_kwargs
        config = loading.config_of(teacher_model, "teacher", options, args.teacher_model_revision)
        models.check_picture_places(config, given, "teacher", argument)
        return given

    def prompts(self, batch: WindowBatch, writer: str) -> list[Example]:
        return batch.examples if writer == "student" else batch.teacher_examples

    def with_completions(
        self, batch: WindowBatch, writer: str, examples: list[Example]
    ) -> WindowBatch:
        if writer == "student":
            return self.collator.with_student_completions(batch, examples)
        return self.collator.with_teacher_completions(batch, examples)

    def prepare(self, batch: WindowBatch, to_device: Callable[[Tensor], Tensor]) -> MicroBatch:
        student, teacher = self.collator.student.processor, self.collator.teacher.processor
        others = batch.teacher_examples
        build = partial(build_side, shares_prompts=batch.shares_prompts)
        return MicroBatch(
            build(student, batch.examples, to_device, batch.unscored),
            SideInputs.without_tensors(others)
            if self.is_absent or self.is_teacher_apart
            else build(teacher, others, to_device, batch.teacher_unscored),
            batch.is_on_policy,
            alignment_of(batch).to(to_device),
            self.without_detail(teacher, batch, to_device),
        )

    def num_units(self, batches: list[WindowBatch]) -> int:
        return sum(alignment_of(batch).groups.num_groups for batch in batches)

    def loss(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_head: Head,
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_head: Head,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alignment = alignment_of(batch).groups
        student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
        own, row_weights, label_weights = self.term_weights(
            batch, student, teacher, item_weights, alignment.num_groups
        )
        student_weight, teacher_weight = student_head.weight, teacher_head.weight
        loss, metrics = self.function(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            row_weights=row_weights,
            alignment=alignment,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            return_metrics=True,
            **self.label_options(batch, label_weights),
            vocab_size=(
                self.forms[0].num_entries or student_weight.shape[0],
                self.forms[1].num_entries or teacher_weight.shape[0],
            ),
            **form_options(*self.forms),
            **self.options,
        )
        return loss, summed(metrics._asdict(), own)

    def logged(self) -> tuple[str, ...]:
        """Metrics whose means over groups are logged."""
        return () if self.overlap is None else MATCHED

    def batch_counts(self, batch: MicroBatch) -> dict[str, int]:
        groups, reasons = alignment_of(batch).groups, alignment_of(batch).skip_reasons
        return {
            "tokens": groups.num_student_rows,
            "completions": batch.num_completions,
            "labels": groups.num_student_rows if self.has_labels(batch) else 0,
            "groups": groups.num_groups,
            "scored_bytes": groups.scored_bytes,
            "completion_bytes": groups.completion_bytes,
            **{f"skipped_{reason}": reasons.count(reason) for reason in SKIP_REASONS},
        }

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """Means over groups, tokens, labels or bytes, as each name says; skips are counts."""
        num_groups = totals["groups"]
        result = {
            "groups_per_token": mean_of(num_groups, totals["tokens"]),
            "scored_bytes": mean_of(totals["scored_bytes"], totals["completion_bytes"]),
            **{name: totals[name] for name in SKIPS},
            **self.loss_means(self.loss_name, num_groups, totals),
        }
        if self.distillation_weight:
            weight = () if self.weighting is None else (TOKEN_WEIGHT,)
            names = *self.logged(), *weight
            result[self.loss_name] = mean_of(totals["loss"], num_groups)
            result |= {name: mean_of(totals[name], num_groups) for name in names}
        return result


def alignment_of(batch: WindowBatch | MicroBatch) -> BatchAlignment:
    assert batch.alignment is not None, "both sides' completions are aligned before they are scored"
    return batch.alignment
