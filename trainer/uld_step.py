"""The loss of a micro-batch across tokenizers, and its metrics.

N_s, N_t scored rows of a side, G aligned groups, D hidden size (D_s, D_t).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gold_kernels import TokenAlignment, ULDMetrics, VocabOverlap, fused_linear_uld
from gold_trainer.metrics import MetricWindow
from gold_trainer.pairing import SKIP_REASONS, CompletionPairs
from gold_trainer.uld_config import ULDFields

MATCHED = ("matched_loss", "unmatched_loss", "student_matched_mass", "teacher_matched_mass")


class ULDBatch(NamedTuple):
    """What a micro-batch has beside hidden states."""

    alignment: TokenAlignment
    skip_reasons: list[str | None]  # of every completion; None for one that is distilled
    labels: Tensor  # (N_s,) int64, the student's completion tokens
    num_completions: int
    is_on_policy: bool


class ULDObjective:
    """uld_distillation_weight times ULD or hybrid, plus uld_crossentropy_weight times CE on
    completions that the student did not write: on its own the expected gradient of CE is 0.
    """

    def __init__(self, args: ULDFields, pairs: CompletionPairs, loss_options: dict[str, Any]):
        self.distillation_weight = args.uld_distillation_weight
        self.crossentropy_weight = args.uld_crossentropy_weight
        overlap = None
        if args.uld_use_hybrid_loss:
            aligner = pairs.aligner
            overlap = VocabOverlap.from_token_bytes(aligner.student, aligner.teacher)
        self.overlap = overlap
        self.options = {
            **loss_options,
            "student_temperature": args.uld_student_temperature,
            "teacher_temperature": args.uld_teacher_temperature,
            "overlap": overlap,
            "matched_weight": args.uld_hybrid_matched_weight,
            "unmatched_weight": args.uld_hybrid_unmatched_weight,
        }

    def window(self) -> "ULDMetricWindow":
        return ULDMetricWindow(
            self.distillation_weight, self.crossentropy_weight, self.overlap is not None
        )

    def loss(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_head: nn.Linear,
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_head: nn.Linear,
        batch: ULDBatch,
        item_weights: Tensor | None,  # (2,) of a group and of a label; None: 1 / G and 1 / N_s
        window: "ULDMetricWindow",
    ) -> Tensor:  # ()
        sizes = batch.alignment.num_groups, student_hidden.shape[0]
        if item_weights is None:
            shares = [1 / max(size, 1) for size in sizes]
            item_weights = torch.tensor(shares, device=student_hidden.device)
        group_weight, label_weight = item_weights.unbind()
        row_weights = (self.distillation_weight * group_weight).expand(sizes[0])
        hard = {}
        if self.crossentropy_weight and not batch.is_on_policy:
            label_weight = self.crossentropy_weight * label_weight
            hard = {"labels": batch.labels, "label_weights": label_weight.expand(sizes[1])}
        loss, metrics = fused_linear_uld(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            row_weights,
            alignment=batch.alignment,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            **hard,
            **self.options,
        )
        crossentropy = None
        if hard:  # summed over labels
            crossentropy = (
                loss.detach() - row_weights[:1].sum() * metrics.loss.sum()
            ) / label_weight
        window.add_batch(metrics, crossentropy, batch)
        return loss


class ULDMetricWindow(MetricWindow):
    """Means over groups, tokens, labels, bytes or samples, as each name says."""

    COUNTS = (
        *("tokens", "labels", "completions", "groups", "scored_bytes", "completion_bytes"),
        *(f"skipped_{reason}" for reason in SKIP_REASONS),
    )
    VALUES = (*ULDMetrics._fields, "crossentropy")

    def __init__(self, distillation_weight: float, crossentropy_weight: float, is_hybrid: bool):
        self.weights = distillation_weight, crossentropy_weight
        self.is_hybrid = is_hybrid
        super().__init__()

    def add_batch(self, metrics: ULDMetrics, crossentropy: Tensor | None, batch: ULDBatch) -> None:
        """Add one micro-batch; no host sync."""
        alignment = batch.alignment
        counts = [
            alignment.num_student_rows,
            0 if crossentropy is None else alignment.num_student_rows,
            *(batch.num_completions, alignment.num_groups),
            *(alignment.scored_bytes, alignment.completion_bytes),
            *(batch.skip_reasons.count(reason) for reason in SKIP_REASONS),
        ]
        sums = [value.sum() for value in metrics]
        sums.append(torch.zeros_like(sums[0]) if crossentropy is None else crossentropy)
        self._add(counts, torch.stack(sums), batch.is_on_policy)

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        num_groups, num_tokens = max(sums["groups"], 1), max(sums["tokens"], 1)
        uld_loss = sums["loss"] / num_groups
        crossentropy = sums["crossentropy"] / max(sums["labels"], 1)
        result = {
            "loss": self.weights[0] * uld_loss + self.weights[1] * crossentropy,
            "uld_loss": uld_loss,
            "groups_per_token": sums["groups"] / num_tokens,
            "scored_bytes": sums["scored_bytes"] / max(sums["completion_bytes"], 1),
        }
        if self.weights[1]:
            result["crossentropy"] = crossentropy
        if self.is_hybrid:
            result |= {name: sums[name] / num_groups for name in MATCHED}
        return result | {name: sums[name] for name in self._skips()}

    @classmethod
    def _skips(cls) -> Sequence[str]:
        return [name for name in cls.COUNTS if name.startswith("skipped_")]
