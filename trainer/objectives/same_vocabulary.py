"""Losses of two models with one vocabulary: one tokenizer and one processor serve both.

N scored rows, D hidden size (D_s, D_t). A unit of the loss is a token.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gold_kernels import JSDMetrics, fused_linear_jsd
from gold_trainer import loading, models
from gold_trainer.batches import Example, MicroBatch, WindowBatch
from gold_trainer.collator import Processor, build_side
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives import one_family
from gold_trainer.objectives.objective import Objective, common_options
from gold_trainer.sides import Side


class SameVocabulary(Objective):
    """Generalized JSD of fused_linear_jsd."""

    counts = ()

    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None:
        self.collator = student.collator
        self.collators = {"student": self.collator, "teacher": self.collator}
        self.distillation_weight, self.crossentropy_weight = 1.0, 0.0
        self.sums = JSDMetrics._fields
        self.options = {
            **common_options(args, student, teacher),
            "beta": args.beta,
            "temperature": args.loss_temperature,
            "vocab_size": one_family.shared_vocab_size(
                student.head,
                teacher.head,
                self.collator.processor,
                self.collator.placeholder_ids,
            ),
        }

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
        if given is None:
            given = loading.find_tokenizer(*loading.teacher_source(teacher_model, args))
        if given is not None:
            one_family.check_vocabularies(student, given)
        return student

    def prompts(self, batch: WindowBatch, writer: str) -> list[Example]:
        return batch.examples

    def with_completions(
        self, batch: WindowBatch, writer: str, examples: list[Example]
    ) -> WindowBatch:
        return replace(batch, examples=examples, teacher_examples=examples)

    def prepare(self, batch: WindowBatch, to_device: Callable[[Tensor], Tensor]) -> MicroBatch:
        side = build_side(self.collator.processor, batch.examples, to_device)
        return MicroBatch(side, side, batch.is_on_policy)

    def num_units(self, batches: list[WindowBatch]) -> int:
        return sum(len(e.completion_ids) for batch in batches for e in batch.examples)

    def loss(
        self,
        student_hidden: Tensor,  # (N, D_s)
        student_head: nn.Linear,
        teacher_hidden: Tensor,  # (N, D_t)
        teacher_head: nn.Linear,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        num_rows = student_hidden.shape[0]
        row_weights, _ = self.term_weights(item_weights, num_rows, num_rows, student_hidden.device)
        loss, metrics = fused_linear_jsd(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            row_weights,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            **self.options,
        )
        given = {name: value for name, value in metrics._asdict().items() if value is not None}
        return loss, {name: value.sum() for name, value in given.items()}

    def batch_counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"tokens": len(batch.student.labels), "completions": batch.num_completions}

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """Means over scored tokens."""
        return {name: totals[name] / max(totals["tokens"], 1) for name in self.sums}
