"""Losses of two models with one vocabulary: one tokenizer and one processor serve both.

N scored rows, D hidden size (D_s, D_t). A unit of the loss is a token.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gold_kernels import fused_linear_loss
from gold_kernels.losses import make_loss
from gold_trainer import loading, models
from gold_trainer.batches import Example, MicroBatch, SideInputs, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.models import Head
from gold_trainer.objectives import one_family
from gold_trainer.objectives.objective import (
    CROSS_ENTROPY,
    Objective,
    count_tokens,
    form_options,
    memory_options,
    summed,
)
from gold_trainer.privileged.sides import completed
from gold_trainer.rendering.collator import GOLDCollator, Processor, build_side
from gold_trainer.sides import Side


class SameVocabulary(Objective):
    """Any loss of gold_kernels.losses, by name."""

    counts = ("labels",)
    collator: GOLDCollator

    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None:
        self.collator = student.collator
        self.collators = {"student": self.collator, "teacher": self.collator}
        self.distillation_weight = args.distillation_weight
        self.crossentropy_weight = args.crossentropy_weight
        self.forms = student.form, teacher.form
        self.is_absent = args.is_told_by_examples
        self.row_loss = make_loss(args.loss, **args.loss_numbers)
        self.sums = self.row_loss.value_names
        self.vocab_size = one_family.shared_vocab_size(
            student.head, teacher.head, self.collator.processor, self.collator.placeholder_ids
        )
        self.options = memory_options(args)

    @property
    def num_entries(self) -> int | None:
        """That take part, once the forms are measured; None: all of both heads."""
        limits = (self.vocab_size, *(form.num_entries for form in self.forms))
        return min((size for size in limits if size is not None), default=None)

    @property
    def entries(self) -> tuple[int | None, int | None]:
        return self.num_entries, self.num_entries

    @staticmethod
    def check_pair(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        models.check_modality(student, teacher)
        one_family.check_family(student, teacher)

    @staticmethod
    def teacher_processor(
        teacher_model: PreTrainedModel | str,
        args: GOLDConfig,
        given: Processor | None,
        student: Processor,
    ) -> Processor:
        """The student's. The teacher's own is only compared with it, where it is known."""
        pictures = getattr(given, "image_processor", None)
        if given is None:
            source = loading.teacher_source(teacher_model, args)
            given = loading.find_tokenizer(*source)
            if given is None and args.teacher_tokenizer_name_or_path is not None:
                given = loading.load_teacher_processor(*source, is_vlm=False)  # which says why
            is_vlm = models.is_processor(student)
            pictures = loading.find_picture_processor(*source) if is_vlm else None
        else:
            models.check_kind(given, "teacher_processing_class")
        if given is not None:
            one_family.check_vocabularies(student, given)
            one_family.warn_of_template(student, given)
        one_family.check_pixels(student, pictures)
        return student

    def prompts(self, batch: WindowBatch, writer: str) -> list[Example]:
        return batch.examples if writer == "student" else batch.teacher_examples

    def with_completions(
        self, batch: WindowBatch, writer: str, examples: list[Example]
    ) -> WindowBatch:
        return completed(self.collator, batch, writer, examples)

    def prepare(self, batch: WindowBatch, to_device: Callable[[Tensor], Tensor]) -> MicroBatch:
        processor, others = self.collator.processor, batch.teacher_examples
        build = partial(build_side, shares_prompts=batch.shares_prompts)
        student = teacher = build(processor, batch.examples, to_device, batch.unscored)
        if self.is_teacher_apart or (others is not batch.examples and self.is_absent):
            teacher = SideInputs.without_tensors(others)
        elif others is not batch.examples:
            teacher = build(processor, others, to_device, batch.teacher_unscored)
        coarse = self.without_detail(processor, batch, to_device)
        return MicroBatch(student, teacher, batch.is_on_policy, without_detail=coarse)

    def num_units(self, batches: list[WindowBatch]) -> int:
        return count_tokens(batches)

    def loss(
        self,
        student_hidden: Tensor,  # (N, D_s)
        student_head: Head,
        teacher_hidden: Tensor,  # (N, D_t)
        teacher_head: Head,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
        own, row_weights, label_weights = self.term_weights(
            batch, student, teacher, item_weights, student_hidden.shape[0]
        )
        loss, values = fused_linear_loss(
            self.row_loss,
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            row_weights,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            return_metrics=True,
            **self.label_options(batch, label_weights),
            vocab_size=self.num_entries,
            **form_options(*self.forms),
            **self.options,
        )
        return loss, summed(values, own)

    def batch_counts(self, batch: MicroBatch) -> dict[str, int]:
        num_tokens = len(batch.student.labels)
        return {
            "tokens": num_tokens,
            "completions": batch.num_completions,
            "labels": num_tokens if self.has_labels(batch) else 0,
        }

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """Means over scored tokens, of the cross-entropy over labels."""
        values = {name: totals[name] / max(totals["tokens"], 1) for name in self.sums}
        del values[CROSS_ENTROPY]
        losses = self.loss_means(f"{self.row_loss.name}_loss", totals["tokens"], totals)
        return values | losses if self.distillation_weight else losses
