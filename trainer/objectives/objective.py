"""What the trainer asks of a loss in training.

N_s, N_t scored rows of student and teacher, D hidden size (D_s, D_t).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gold_trainer.batches import Example, MicroBatch, SideInputs, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.logit_form import LogitForm
from gold_trainer.models import Head
from gold_trainer.rendering.collator import GOLDCollator, Processor, build_side
from gold_trainer.rendering.pairing import PairCollator
from gold_trainer.sides import Side
from gold_trainer.weighting.fields import refuse_text
from gold_trainer.weighting.log_probs import ScoredSide
from gold_trainer.weighting.tokens import ScoredTokens
from gold_trainer.weighting.weighting import Weighting

CROSS_ENTROPY = "cross_entropy"  # name of its sum, as the fused losses return it
TOKEN_WEIGHT = "token_weight"  # of token_weighting, of a unit


class Objective(ABC):
    """A loss over units, and a cross-entropy over labels:

        loss = distillation_weight * mean over units + crossentropy_weight * mean over labels

    A unit is what the loss compares: a token, or an aligned group of tokens. Labels are the tokens
    of completions that the student did not write: on its own samples the gradient of the
    cross-entropy is 0 in expectation. Both means are over the global batch. Its units and labels
    are counted on all ranks before the first loss of the window. With token_weighting a unit's
    loss counts with its weight in the first mean, which stays one over the number of units.
    """

    counts: ClassVar[tuple[str, ...]]  # what batch_counts counts, beside tokens and completions
    sums: tuple[str, ...]  # names of the sums that loss returns; one may be absent in a batch
    collator: GOLDCollator | PairCollator
    collators: dict[str, GOLDCollator]  # with which "student" and "teacher" write
    distillation_weight: float
    crossentropy_weight: float
    is_teacher_apart: bool = False  # its tensors are made for passes of their own
    forms: tuple[LogitForm, LogitForm]  # of student and teacher
    weighting: Weighting | None = None  # of tokens
    is_absent: bool  # the teacher, which takes examples and no tensors

    @abstractmethod
    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None: ...

    @staticmethod
    @abstractmethod
    def check_pair(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        """ValueError for models that this loss cannot compare."""

    @staticmethod
    @abstractmethod
    def teacher_processor(
        teacher_model: PreTrainedModel | str,
        args: GOLDConfig,
        given: Processor | None,
        student: Processor,
    ) -> Processor:
        """The processor with which the teacher sees rows; ValueError where it does not fit the
        student's.
        """

    @abstractmethod
    def prompts(self, batch: WindowBatch, writer: str) -> list[Example]:
        """The examples whose prompts the writer, "student" or "teacher", is to complete."""

    @abstractmethod
    def with_completions(
        self, batch: WindowBatch, writer: str, examples: list[Example]
    ) -> WindowBatch:
        """The batch, both sides, with these examples that the writer has completed."""

    @abstractmethod
    def prepare(self, batch: WindowBatch, to_device: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Tensors of a micro-batch whose turn has come; pictures become pixels here."""

    @abstractmethod
    def num_units(self, batches: list[WindowBatch]) -> int: ...

    @abstractmethod
    def loss(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_head: Head,
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_head: Head,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,) of a unit and of a label; None: means of the batch
    ) -> tuple[Tensor, dict[str, Tensor]]:  # (), and () sums by name for the log
        ...

    @abstractmethod
    def batch_counts(self, batch: MicroBatch) -> dict[str, int]:
        """What the batch adds to the counts of the log, by name; "tokens" and "completions"
        always.
        """

    @abstractmethod
    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """What is logged, "loss" always, from totals of counts and sums."""

    def num_items(self, batches: list[WindowBatch]) -> list[int]:
        """Units and labels of the batches."""
        off_policy = [batch for batch in batches if not batch.is_on_policy]
        return [self.num_units(batches), count_tokens(off_policy)]

    def has_labels(self, batch: MicroBatch) -> bool:
        """Whether the cross-entropy is part of this batch's loss."""
        return self.crossentropy_weight > 0 and not batch.is_on_policy

    def label_options(self, batch: MicroBatch, label_weights: Tensor) -> dict[str, Any]:
        """Options of a fused loss for the cross-entropy, where it is part of this batch's loss."""
        if not self.has_labels(batch):
            return {}
        return {"labels": batch.student.labels, "label_weights": label_weights}

    def loss_means(self, name: str, num_units: float, totals: dict[str, float]) -> dict[str, float]:
        """The loss for the log and, where a cross-entropy is part of it, its two parts.

        A part of weight 0 is not computed and not logged; the loss of nothing is NaN.
        """
        unit_mean, num_labels = mean_of(totals["loss"], num_units), totals["labels"]
        parts = [self.distillation_weight * unit_mean] if num_units else []
        result = {}
        if self.crossentropy_weight:
            result["crossentropy"] = totals[CROSS_ENTROPY] / max(num_labels, 1)
            parts += [self.crossentropy_weight * result["crossentropy"]] if num_labels else []
            if self.distillation_weight:
                result[name] = unit_mean
        return {"loss": sum(parts) if parts else math.nan, **result}

    @property
    def entries(self) -> tuple[int | None, int | None]:
        """Entries of both heads that take part; None: all."""
        return self.forms[0].num_entries, self.forms[1].num_entries

    def weigh_tokens(self, weighting: Weighting | None) -> None:
        """Take the weighting, before the first loss. What the units weigh is logged from then
        on.
        """
        self.weighting = weighting
        if weighting is not None:
            refuse_text(weighting.name, not self.collators["student"].is_vlm)
            self.sums = (*self.sums, TOKEN_WEIGHT)

    def without_detail(
        self, processor: Processor, batch: WindowBatch, to_device: Callable[[Tensor], Tensor]
    ) -> SideInputs | None:
        """The teacher's second look, where token_weighting takes one."""
        weighting = self.weighting
        if weighting is None or weighting.detail is None:
            return None
        has_pictures = any(example.images for example in batch.teacher_examples)
        if weighting.is_alone and not has_pictures:  # others may run the teacher together
            return None
        examples = weighting.detail.without_detail(batch.teacher_examples)
        if self.is_absent:
            return SideInputs.without_tensors(examples)
        return build_side(
            processor,
            examples,
            to_device,
            batch.teacher_unscored,
            shares_prompts=batch.shares_prompts,
        )

    def _own_weights(
        self,
        batch: MicroBatch,
        student: tuple[Tensor, Head],
        teacher: tuple[Tensor, Head] | None,
        *,
        may_wait: bool,  # for the device
    ) -> Tensor | None:  # (num_units,); None: all alike
        if self.weighting is None:
            return None
        forms, entries = self.forms, self.entries
        tokens = ScoredTokens(
            batch,
            self.collators["student"].tokenizer,
            ScoredSide.of(*student, forms[0], entries[0]),
            None if teacher is None else ScoredSide.of(*teacher, forms[1], entries[1]),
        )
        return self.weighting.units(tokens, may_wait=may_wait)

    def term_weights(
        self,
        batch: MicroBatch,
        student: tuple[Tensor, Head],  # (N_s, D_s) hidden states, and their head
        teacher: tuple[Tensor, Head] | None,  # (N_t, D_t); None: no hidden states are known
        item_weights: Tensor | None,  # (2,)
        num_units: int,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # (num_units,), (num_units,), (N_s,)
        """What token_weighting gives to each unit, None where there is none; what each unit and
        each label weighs in the loss of the batch.
        """
        own = self._own_weights(batch, student, teacher, may_wait=item_weights is None)
        num_labels, device = student[0].shape[0], student[0].device
        if item_weights is None:
            item_weights = even_weights(num_units, num_labels, device)
        unit_weight, label_weight = item_weights.unbind()
        units = (self.distillation_weight * unit_weight).expand(num_units)
        return (
            own,
            units if own is None else units * own,
            (self.crossentropy_weight * label_weight).expand(num_labels),
        )


def even_weights(num_units: int, num_labels: int, device: torch.device) -> Tensor:  # (2,)
    """What a unit and a label weigh where the batch is all that there is."""
    shares = [1 / max(size, 1) for size in (num_units, num_labels)]
    return torch.tensor(shares, device=device)


def mean_of(total: float, number: float) -> float:
    """The mean of nothing is NaN: it is no number to choose a checkpoint by."""
    return total / number if number else math.nan


def summed(values: Mapping[str, Tensor | None], weights: Tensor | None) -> dict[str, Tensor]:
    """Sums over units, for the log; the loss counts with the weights of its units."""
    sums = {name: value.sum() for name, value in values.items() if value is not None}
    loss = values["loss"]
    if weights is not None and loss is not None:
        sums |= {"loss": (weights * loss).sum(), TOKEN_WEIGHT: weights.sum()}
    return sums


def count_tokens(batches: list[WindowBatch]) -> int:
    """Tokens of the student's completions."""
    return sum(len(example.written_ids) for batch in batches for example in batch.examples)


def form_options(*forms: LogitForm) -> dict[str, Any]:  # of student and teacher, measured
    """Options of every fused loss: what is made of its heads' outputs."""
    return {
        "logit_scale": tuple(form.scale for form in forms),
        "final_logit_softcapping": tuple(form.softcap for form in forms),
    }


def memory_options(args: GOLDConfig) -> dict[str, Any]:
    """Options of every fused loss: where it runs and what memory it takes."""
    options: dict[str, Any] = {"chunk_size": args.chunk_size, "backend": args.loss_backend}
    if args.loss_budget_mib is not None:
        options["budget_bytes"] = int(args.loss_budget_mib * 2**20)
    if args.logits_dtype == "bfloat16":  # None keeps float32, and float64 for float64 models
        options["logits_dtype"] = torch.bfloat16
    return options
